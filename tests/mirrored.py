"""What a model does under `tf.distribute.MirroredStrategy`, on two devices.

`mirrored_test.py` runs this in a process of its own, since TensorFlow divides
the CPU into devices only before it starts. Prints what came out of each check,
as JSON: `null`, or where it failed.
"""

import contextlib
import json
import pathlib
import sys
import tempfile
import traceback
from unittest import mock

import keras
import numpy as np
import pytest

import keras_geolora
from keras_geolora import GeoLoRA
from keras_geolora.optimizer.geolora import find_geolora

ROWS = 8  # of a batch
CHECKS = []
rng = np.random.default_rng(0)
X = rng.normal(size=(24 * ROWS, 16)).astype("float32")
Y = np.tanh(X @ rng.normal(size=(16, 4))).astype("float32")


def check(function):
    CHECKS.append(function.__name__)
    return function


def make_model(make_optimizer, **options):
    """Returns a small adapted and compiled model."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((16,)),
            keras.layers.Dense(16, "relu", name="first"),
            keras.layers.Dense(16, "tanh", name="second"),
            keras.layers.Dense(4, name="head"),
        ]
    )
    model.enable_geolora(
        rank=4, targets=["first", "second"], modules_to_save="head", seed=0
    )
    model.compile(optimizer=make_optimizer(), loss="mse", **options)
    return model


def pair(strategy, make_optimizer, **options):
    """Returns equal models, on one replica and on two."""
    one = make_model(make_optimizer, **options)
    with strategy.scope():
        return one, make_model(make_optimizer, **options)


def fit(model, first=0, steps=6, y=Y, **options):
    rows = slice(first * ROWS, (first + steps) * ROWS)
    options = {"shuffle": False, "verbose": 0, **options}
    return model.fit(X[rows], y[rows], ROWS, **options)


def adam(**options):
    return lambda: GeoLoRA(keras.optimizers.Adam(1e-2, **options))


def assert_replicas_agree(model):
    for variable in model.variables + model.optimizer.variables:
        first, second = (v.numpy() for v in variable.value.values)
        assert first.tobytes() == second.tobytes(), variable.path


def assert_same(one, other):
    for layer, twin in zip(one.layers, other.layers, strict=True):
        if hasattr(layer, "adapter"):
            assert layer.rank == twin.rank
            near(layer.adapter.delta(), twin.adapter.delta())
        near(layer.kernel, twin.kernel)


def near(x, y):
    x, y = map(keras.ops.convert_to_numpy, (x, y))
    # Optimizers scale up what is almost zero, and with it what is rounded; a
    # sum that is wrong changes an update by several percent.
    assert np.linalg.norm(x - y) <= 2e-3 * np.linalg.norm(x)


@check
def inner_optimizers_take_the_same_steps(strategy):
    for inner in (
        lambda: keras.optimizers.SGD(1e-2, momentum=0.9),
        lambda: keras.optimizers.AdamW(1e-2, weight_decay=0.1),
        lambda: keras.optimizers.Lamb(1e-2),
        lambda: keras.optimizers.Adafactor(1e-2),
    ):
        one, two = pair(strategy, lambda inner=inner: GeoLoRA(inner()))
        fit(one), fit(two)
        assert_replicas_agree(two)
        assert_same(one, two)


@check
def replicas_agree_on_gradients_that_were_clipped_before_the_sum(strategy):
    _, two = pair(strategy, adam(clipnorm=1e-3))
    fit(two)
    assert_replicas_agree(two)


@check
def a_cut_between_updates_takes_the_sums_of_all_replicas_along(strategy):
    one, two = pair(strategy, adam(gradient_accumulation_steps=4))
    for model in (one, two):
        fit(model, steps=7)
        sums = model.optimizer.inner_optimizer._accumulated_gradients
        assert any(np.any(total.numpy()) for total in sums)
        model.optimizer.tolerance = 0.5
        model.optimizer.cut()
    assert one.layers[0].rank < 8
    fit(one, 7, 5), fit(two, 7, 5)
    assert_replicas_agree(two)
    assert_same(one, two)


@check
def all_replicas_skip_what_the_second_one_cannot_take(strategy):
    for make in (
        adam(),
        adam(gradient_accumulation_steps=2),
        lambda: keras.optimizers.LossScaleOptimizer(adam()()),
    ):
        _, two = pair(strategy, make)
        two.get_layer("head").kernel.trainable = False
        two.get_layer("head").bias.trainable = False
        y = Y.copy()
        y[ROWS - 1] = np.nan  # the last row of the first batch
        fit(two, y=y)
        assert_replicas_agree(two)
        for variable in two.variables + two.optimizer.variables:
            assert np.isfinite(variable.numpy()).all(), variable.path
        skipped = find_geolora(two.optimizer)
        assert skipped.skipped_steps.numpy() == 1


@check
def callbacks_and_reports_read_a_model(strategy):
    _, two = pair(strategy, adam())
    callbacks = keras_geolora.callbacks
    history = callbacks.RankHistory(interval=3)
    with tempfile.TemporaryDirectory() as folder:
        board = callbacks.RankTensorBoard(folder, interval=3)
        fit(two, callbacks=[history, callbacks.RankLogger(), board])
        assert any(pathlib.Path(folder).rglob("events*"))
    assert history.ranks["first"][-1] == two.layers[0].rank
    two.geolora_summary(print_fn=lambda text: None)


@check
def an_adapted_model_is_compacted_and_merged(strategy):
    one, two = pair(strategy, adam())
    for model in (one, two):
        fit(model)
        model.optimizer.tolerance = 0.5
        model.optimizer.cut()
        model.compact_geolora(multiple=4)
        fit(model, 6)
    assert two.layers[0].adapter.U.shape == (16, 4)
    assert_replicas_agree(two)
    assert_same(one, two)
    before = two.predict(X[:ROWS], verbose=0)
    two.merge_geolora()
    near(before, two.predict(X[:ROWS], verbose=0))


@check
def a_sum_of_adapters_trains_on(strategy):
    one, two = pair(strategy, adam())
    for model in (one, two):
        fit(model)
        model.combine_geolora("half", {"default": 0.5})
        model.activate_geolora("half")
        with strategy.scope() if model is two else contextlib.nullcontext():
            model.compile(adam()(), loss="mse")
        fit(model, 6)
    assert_replicas_agree(two)
    assert_same(one, two)


@check
def files_are_written_and_read_in_the_scope_and_outside(strategy):
    one, two = pair(strategy, adam(gradient_accumulation_steps=4))
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/model.keras"
        fit(one, steps=7), fit(two, steps=7)
        two.save(file)
        alone = keras.saving.load_model(file)
        with strategy.scope():
            two.save(file)
            again = keras.saving.load_model(file)
        adapter = f"{folder}/adapter.safetensors"
        two.save_geolora(adapter)
        other = make_model(adam())
        other.load_geolora(adapter)
        near(other.layers[0].adapter.delta(), two.layers[0].adapter.delta())
    for model in (one, alone, again):
        fit(model, 7, 5)
        assert_same(one, model)
    assert_replicas_agree(again)


@check
def a_step_without_a_graph_is_the_same(strategy):
    one, two = pair(strategy, adam(), run_eagerly=True)
    fit(one, steps=2), fit(two, steps=2)
    assert_replicas_agree(two)
    assert_same(one, two)
    near(one(X[:4]), two(X[:4]))


@check
def a_model_is_adapted_outside_of_the_scope_as_inside(strategy):
    with strategy.scope():
        plain = keras.Sequential([keras.Input((16,)), keras.layers.Dense(4)])
        optimizer = adam()()
    plain.enable_geolora(rank=2)
    with strategy.scope():
        plain.compile(optimizer, "mse")
    fit(plain)
    assert_replicas_agree(plain)


@check
def an_optimizer_of_no_scope_is_refused_as_by_keras(strategy):
    outside = adam()()
    with strategy.scope():
        model = make_model(lambda: outside)
    with pytest.raises(RuntimeError, match="Mixing different"):
        fit(model)


@check
def a_model_of_no_scope_is_refused(strategy):
    model = make_model(adam())
    with strategy.scope():
        model.compile(adam()(), "mse")
        with pytest.raises(ValueError, match="adapt the model inside .*first"):
            model.optimizer.build(model.trainable_variables)


@check
def workers_that_update_alone_are_refused(strategy):
    import tensorflow as tf

    kind = tf.distribute.ParameterServerStrategy
    model = make_model(adam())
    servers = mock.Mock(spec=kind)
    with (
        mock.patch.object(tf.distribute, "has_strategy", lambda: True),
        mock.patch.object(tf.distribute, "get_strategy", lambda: servers),
    ):
        with pytest.raises(ValueError, match="MirroredStrategy"):
            model.optimizer.build(model.trainable_variables)


def run():
    """Prints the results of all checks."""
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * 2
    )
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    results = {}
    for name in sys.argv[1:] or CHECKS:
        try:
            results[name] = globals()[name](strategy)
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    run()
