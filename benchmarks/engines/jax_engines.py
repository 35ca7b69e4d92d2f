"""JAX: what `keras.distribution` offers, on processors as on accelerators."""

import os
import re

import numpy as np

from engines.single import Single

# One number of a type takes so many bytes.
BYTES = {"pred": 1, "s32": 4, "u32": 4, "f32": 4}
COLLECTIVES = re.compile(
    r"= (.+?) (?:all-reduce|all-gather|reduce-scatter|all-to-all"
    r"|collective-permute|collective-broadcast)(?:-start)?\("
)
TENSOR = re.compile(r"(\w+)\[([\d,]*)\]")


class Spread(Single):
    """Devices of this process, in a mesh whose first axis are replicas."""

    devices_of_replica = 1

    def __init__(self, args):
        count = args.replicas * self.devices_of_replica
        # Looked at once, when JAX is asked for devices.
        os.environ["XLA_FLAGS"] = (
            os.environ.get("XLA_FLAGS", "")
            + f" --xla_force_host_platform_device_count={count}"
        )
        # See `keras_geolora.virtual_devices`.
        os.environ["PJRT_NPROC"] = str(4 * count)
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
        self.distribute(args.replicas)

    @staticmethod
    def processes(replicas):
        return 1

    def distribute(self, replicas):
        """Sets the distribution of all that Keras makes from now on."""
        import keras

        self.distribution = self.distribution_over(replicas)
        keras.distribution.set_distribution(self.distribution)

    def distribution_over(self, replicas):
        raise NotImplementedError

    def replicas(self, variable):
        """Puts together what the devices of a replica hold."""
        mesh = self.distribution.device_mesh.backend_mesh.devices
        held = {}
        for shard in variable.value.addressable_shards:
            (replica, *_), *_ = np.argwhere(mesh == shard.device)
            held.setdefault(int(replica), []).append(shard)
        return {
            replica: assemble(shards, variable.shape, variable.path)
            for replica, shards in held.items()
        }

    def exchanged(self, model, x, y, batch):
        return sizes_of_collectives(
            compiled_train_step(model, x[:batch], y[:batch])
        )


class DataParallel(Spread):
    """A copy of the model on every device."""

    def distribution_over(self, replicas):
        import keras

        devices = keras.distribution.list_devices()
        return keras.distribution.DataParallel(
            devices=devices[:replicas], auto_shard_dataset=False
        )


class ModelParallel(Spread):
    """Every copy of the model is on four devices."""

    devices_of_replica = 4

    def distribution_over(self, replicas):
        import keras

        mesh = keras.distribution.DeviceMesh(
            (replicas, self.devices_of_replica), ["batch", "model"]
        )
        # Written for the pretrained model, without adapters in mind: these keys
        # match all weights of a layer except the bias.
        layouts = keras.distribution.LayoutMap(mesh)
        layouts["(?!.*(bias|output)).*(first|third).*"] = (None, "model")
        layouts["(?!.*(bias|output)).*(second|logits).*"] = ("model", None)
        layouts["network/(first|third)/bias"] = ("model",)
        return keras.distribution.ModelParallel(
            layout_map=layouts, batch_dim_name="batch"
        )


class MultiProcess(DataParallel):
    """A process for each replica, as on several machines."""

    def __init__(self, args):
        import keras

        self.process = args.process
        keras.distribution.initialize(args.address, args.replicas, args.process)
        self.distribute(args.replicas)

    @staticmethod
    def processes(replicas):
        return replicas

    def fit(self, model, x, y, batch):
        import keras

        # Keras takes from every process its share of a batch.
        count = self.distribution.num_processes
        own = [
            a.reshape(-1, count, batch // count, a.shape[-1])[:, self.process]
            for a in (x, y)
        ]
        x, y = (a.reshape(-1, a.shape[-1]) for a in own)
        super().fit(model, x, y, batch // count)
        # To save a model, Keras creates variables, and under a distribution
        # the process that writes would wait for the others to do so, too.
        keras.distribution.set_distribution(None)

    def close(self):
        import jax

        jax.distributed.shutdown()


def assemble(shards, shape, path):
    """Returns the whole array of which devices hold pieces.

    Those that hold the same piece must hold the same bytes.
    """
    whole, pieces = np.zeros(shape, shards[0].data.dtype), {}
    for shard in shards:
        piece = np.asarray(shard.data)
        same = pieces.setdefault(str(shard.index), piece)
        assert piece.tobytes() == same.tobytes(), path
        whole[shard.index] = piece
    return whole


def compiled_train_step(model, x, y):
    """Returns the program of a train step, compiled as Keras does it."""
    import jax
    import keras

    distribution = keras.distribution.distribution()
    x, y = (
        keras.distribution.distribute_tensor(
            a, distribution.get_data_layout(a.shape)
        )
        for a in (x, y)
    )
    model._symbolic_build(data_batch=(x, y))
    variables = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([v.value for v in group] for group in variables)
    shardings = jax.tree.map(lambda value: value.sharding, state)
    step = jax.jit(model.train_step, out_shardings=(None, shardings))
    return step.lower(state, (x, y)).compile().as_text()


def sizes_of_collectives(program):
    """Returns the bytes of what a program exchanges between devices.

    Args:
        program: String, a compiled HLO module.

    Returns:
        List of ints, for the result of every collective operation, of all
        devices together where they gather.
    """
    return [
        BYTES[dtype] * int(np.prod([int(n) for n in shape.split(",") if n]))
        for results in COLLECTIVES.findall(program)
        for dtype, shape in TENSOR.findall(results)
    ]


ENGINES = {
    "single": Single,
    "data_parallel": DataParallel,
    "model_parallel": ModelParallel,
    "multi_process": MultiProcess,
}
