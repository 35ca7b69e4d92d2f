"""TensorFlow: `tf.distribute`, on logical CPU devices and on two workers."""

import contextlib
import json
import os
from unittest import mock

import tensorflow as tf

from engines.single import Single
from keras_geolora.optimizer.geolora import find_geolora


class Mirrored(Single):
    """`MirroredStrategy`: replicas are logical devices of one process."""

    def __init__(self, args):
        (cpu,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * args.replicas
        )
        self.strategy = tf.distribute.MirroredStrategy(
            [f"CPU:{i}" for i in range(args.replicas)]
        )

    @staticmethod
    def processes(replicas):
        return 1

    def scope(self):
        return self.strategy.scope()

    def replicas(self, variable):
        held = self.strategy.experimental_local_results(variable.value)
        return {replica_of(one): one.numpy() for one in held}

    def exchanged(self, model, x, y, batch):
        rows = slice(batch // self.strategy.num_replicas_in_sync)
        sizes = []

        @tf.function
        def step(x, y):
            sizes.clear()  # a function that makes variables is traced twice
            self.strategy.run(model.train_step, [(x, y)])

        with self.strategy.scope():
            model.optimizer.build(model.trainable_variables)
        with recorded(sizes):
            step.get_concrete_function(x[rows], y[rows])
        return sizes


class MultiWorker(Mirrored):
    """`MultiWorkerMirroredStrategy`: a process for each replica.

    Trains by a loop: `fit` of Keras cannot build a model on rows of workers.
    """

    def __init__(self, args):
        os.environ["TF_CONFIG"] = json.dumps(
            {
                "cluster": {"worker": args.addresses},
                "task": {"type": "worker", "index": args.process},
            }
        )
        self.strategy = tf.distribute.MultiWorkerMirroredStrategy()

    @staticmethod
    def processes(replicas):
        return replicas

    def fit(self, model, x, y, batch):
        rows = tf.data.Dataset.from_tensor_slices((x, y)).batch(batch)
        with self.strategy.scope():
            model.optimizer.build(model.trainable_variables)

        @tf.function
        def step(data):
            self.strategy.run(model.train_step, [data])

        for data in self.strategy.experimental_distribute_dataset(rows):
            step(data)
        find_geolora(model.optimizer).cut()  # as `fit` does after an epoch


def replica_of(variable):
    """Returns the number of the replica whose part of a variable this is."""
    device = tf.DeviceSpec.from_string(variable.device)
    return device.task + device.device_index


@contextlib.contextmanager
def recorded(sizes):
    """Notes the size of every tensor that replicas bring together.

    All that a strategy reduces or sends to others, be it for a gradient or for
    a variable that aggregates what it is assigned, goes through these methods.
    """

    def note(per_replica):
        (one, *_) = tf.nest.flatten(
            getattr(per_replica, "values", per_replica), expand_composites=True
        )
        sizes.append(one.shape.num_elements() * one.dtype.size)

    ops = tf.distribute.CrossDeviceOps
    reduce, batch_reduce, broadcast = (
        ops.reduce,
        ops.batch_reduce,
        ops.broadcast,
    )

    def noted_reduce(self, op, value, *args, **options):
        note(value)
        return reduce(self, op, value, *args, **options)

    def noted_batch_reduce(self, op, pairs, *args, **options):
        for value, _ in pairs:
            note(value)
        return batch_reduce(self, op, pairs, *args, **options)

    def noted_broadcast(self, tensor, *args, **options):
        note(tensor)
        return broadcast(self, tensor, *args, **options)

    with mock.patch.multiple(
        ops,
        reduce=noted_reduce,
        batch_reduce=noted_batch_reduce,
        broadcast=noted_broadcast,
    ):
        yield


ENGINES = {"single": Single, "mirrored": Mirrored, "multi_worker": MultiWorker}
