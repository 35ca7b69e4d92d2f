"""Buffers shrink to the ranks found, and nothing else changes."""

import gc
import weakref

import keras
import numpy as np
import pytest
from inner_optimizers import INNER
from keras import ops

import keras_geolora
from keras_geolora import GeoLoRA, GeoLoRADense
from keras_geolora.callbacks import EpochCompaction

RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 8)).astype("float32")
Y = (np.tanh(X @ RNG.normal(size=(8, 8)))).astype("float32")


def model_of(optimizer=None, compiled=False, **options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dense(8),
        ]
    )
    options = {"rank": 2, "max_rank": 6, "seed": 1, **options}
    model.enable_geolora(**options)
    model.compile(
        optimizer or cutting(INNER["adamw"]()),
        loss="mse",
        run_eagerly=not compiled,
    )
    return model


def cutting(inner):
    """A GeoLoRA under which ranks stay small."""
    return GeoLoRA(inner, tolerance=0.6, cut_interval=1)


def take_steps(model, count):
    for i in range(count):
        batch = slice(8 * (i % 6), 8 * (i % 6) + 8)
        model.train_on_batch(X[batch], Y[batch])


def widths(model):
    return [layer.adapter.max_rank for layer in model.layers]


def deltas(model):
    return [ops.convert_to_numpy(layer.delta()) for layer in model.layers]


def test_outputs_stay_and_buffers_shrink():
    model = model_of()
    take_steps(model, 5)
    before, ranks = model.predict(X, verbose=0), [x.rank for x in model.layers]
    optimizer, inner = model.optimizer, model.optimizer.inner_optimizer
    updates = int(optimizer.iterations)
    slots = sum(np.prod(v.shape, dtype=int) for v in optimizer.variables)
    paths = [v.path for v in model.weights]

    assert model.compact_geolora(multiple=2) is model

    assert widths(model) == [-(-rank // 2) * 2 for rank in ranks]
    assert max(widths(model)) < 6
    assert [x.rank for x in model.layers] == ranks
    np.testing.assert_array_equal(model.predict(X, verbose=0), before)
    assert [v.path for v in model.weights] == paths
    assert model.optimizer is optimizer
    assert type(optimizer.inner_optimizer) is type(inner)
    assert int(optimizer.iterations) == updates
    assert slots > sum(np.prod(v.shape, dtype=int) for v in optimizer.variables)


@pytest.mark.parametrize("inner", INNER)
def test_training_goes_on_exactly_where_it_was(inner):
    left, right = (model_of(cutting(INNER[inner]())) for _ in range(2))
    for model in (left, right):
        take_steps(model, 5)
    left.optimizer.settle()  # as a compaction does
    # With twice the rank, no step finds more directions than there is room.
    right.compact_geolora(2 * max(layer.rank for layer in right.layers))
    assert max(widths(right)) < 6
    for model in (left, right):
        take_steps(model, 4)
    # Adafactor's means over columns include those that are not in use.
    bound = 0.2 if inner == "adafactor" else 1e-4
    for a, b in zip(deltas(left), deltas(right), strict=True):
        assert np.linalg.norm(a - b) <= bound * np.linalg.norm(a)
    assert widths(left) == [6, 6, 6]
    rates = [float(m.optimizer.learning_rate) for m in (left, right)]
    assert rates[0] == pytest.approx(rates[1], rel=1e-6)


def test_loss_scaling_goes_on_where_it_was():
    scaling = keras.optimizers.LossScaleOptimizer(
        cutting(keras.optimizers.Adam(1e-2)), initial_scale=64.0
    )
    model = model_of(scaling)
    take_steps(model, 3)
    wrapped = scaling.inner_optimizer
    model.compact_geolora(1)
    assert model.optimizer is scaling and scaling.inner_optimizer is wrapped
    assert float(scaling.dynamic_scale) == 64.0
    assert int(scaling.step_counter) == 3
    take_steps(model, 1)
    assert int(scaling.step_counter) == 4
    assert all(np.isfinite(d).all() for d in deltas(model))


@pytest.mark.parametrize("scaled", [False, True])
def test_every_optimizer_stays_the_same_object(scaled):
    inner = keras.optimizers.Adam(1e-2)
    optimizer = outer = cutting(inner)
    if scaled:
        outer = keras.optimizers.LossScaleOptimizer(
            optimizer, initial_scale=8.0
        )
    model = model_of(outer)
    take_steps(model, 3)
    model.compact_geolora(1)
    assert max(widths(model)) < 6
    assert model.optimizer is outer
    assert (outer.inner_optimizer if scaled else outer) is optimizer
    assert optimizer.inner_optimizer is inner
    assert int(inner.iterations) == 3
    inner.learning_rate = 0.0
    before = deltas(model)
    take_steps(model, 2)
    assert int(inner.iterations) == 5
    for x, y in zip(before, deltas(model), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_variables_without_decay_stay_so():
    inner = keras.optimizers.AdamW(1e-2, weight_decay=0.5)
    model = model_of(cutting(inner), train_bias=True)
    biases = [layer.bias for layer in model.layers]
    model.optimizer.exclude_from_weight_decay(var_list=biases)
    take_steps(model, 2)
    model.compact_geolora(1)
    inner = model.optimizer.inner_optimizer
    decays = {v.name: inner._use_weight_decay(v) for v in model.weights}
    assert decays["bias"] is False and decays["U"] is True


def test_a_custom_loop_names_its_optimizer():
    model, optimizer = model_of(), cutting(keras.optimizers.Adam(1e-2))
    optimizer.build(model.trainable_variables)
    model.compact_geolora(1, optimizer=optimizer)
    variables = model.trainable_variables
    optimizer.apply([ops.ones(v.shape) for v in variables], variables)
    assert int(optimizer.iterations) == 1


def test_checkpoints_fit_other_buffers(tmp_path):
    model = model_of()
    take_steps(model, 4)
    wide, held = str(tmp_path / "wide.weights.h5"), model.get_weights()
    model.save_weights(wide)
    first = model.predict(X, verbose=0)
    model.compact_geolora(1)
    narrow_widths = widths(model)
    take_steps(model, 2)
    second = model.predict(X, verbose=0)
    narrow = str(tmp_path / "narrow.weights.h5")
    model.save_weights(narrow)

    model.load_weights(wide)
    assert widths(model) == [6, 6, 6]
    np.testing.assert_array_equal(model.predict(X, verbose=0), first)
    model.load_weights(narrow)
    assert widths(model) == narrow_widths
    np.testing.assert_array_equal(model.predict(X, verbose=0), second)
    model.set_weights(held)
    np.testing.assert_array_equal(model.predict(X, verbose=0), first)

    fresh = model_of()
    fresh.load_weights(narrow)
    np.testing.assert_array_equal(fresh.predict(X, verbose=0), second)
    assert int(fresh.optimizer.iterations) == 6
    take_steps(fresh, 1)


def test_a_saved_model_keeps_its_buffers(tmp_path):
    model = model_of()
    take_steps(model, 4)
    model.compact_geolora(1)
    assert_that_a_file_goes_on(model, tmp_path / "model.keras")


def assert_that_a_file_goes_on(model, path):
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert widths(loaded) == widths(model)
    for each in (model, loaded):
        take_steps(each, 2)
    for a, b in zip(deltas(model), deltas(loaded), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_saved_model_keeps_the_buffers_of_layers_of_its_own(tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((8,)), GeoLoRADense(8, rank=2, max_rank=6)]
    )
    model.compile(cutting(keras.optimizers.SGD(0.1)), loss="mse")
    take_steps(model, 4)
    model.compact_geolora(1)
    assert widths(model) < [6]
    assert_that_a_file_goes_on(model, tmp_path / "model.keras")


def test_all_adapters_shrink_and_stay_in_order():
    model = model_of(name="first")
    model.enable_geolora(rank=1, max_rank=6, name="second")
    weights = [v.path for v in model.weights]
    model.compact_geolora(1)
    assert [v.path for v in model.weights] == weights
    assert model.geolora_adapters() == ["second", "first"]
    for layer in model.layers:
        found = layer.adapters_by_name()
        assert [found["first"].max_rank, found["second"].max_rank] == [2, 1]
        assert found["second"].trainable and not found["first"].trainable


def test_dropout_goes_on_with_its_numbers():
    left, right = (model_of(dropout=0.3) for _ in range(2))
    for model in (left, right):
        take_steps(model, 3)
    right.compact_geolora(2 * max(layer.rank for layer in right.layers))
    losses = [model.train_on_batch(X, Y) for model in (left, right)]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)


def test_a_callback_compacts_within_fit(capsys):
    model = model_of(compiled=True)
    history = model.fit(
        X,
        Y,
        batch_size=8,
        epochs=3,
        validation_data=(X, Y),
        callbacks=[
            EpochCompaction(multiple=2, verbose=1),
            keras.callbacks.EarlyStopping(
                "val_loss", patience=3, restore_best_weights=True
            ),
        ],
        verbose=0,
    )
    assert max(widths(model)) < 6
    assert (
        "Epoch 1: the buffers of the adapters shrink" in capsys.readouterr().out
    )
    loss = history.history["val_loss"]
    assert loss[2] < loss[0]
    found = model.evaluate(X, Y, verbose=0)
    assert found == pytest.approx(min(loss), rel=1e-4)


def test_little_saving_is_none():
    model = model_of(rank=5)
    model.compact_geolora(1, min_saving=0.25)
    assert widths(model) == [6, 6, 6]
    model.compact_geolora(1, min_saving=0.1)
    assert widths(model) == [5, 5, 5]


def test_a_part_shrinks_with_the_model_that_trains_it():
    keras.utils.set_random_seed(0)
    part = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8)])
    part.enable_geolora(rank=2, max_rank=6)
    model = keras.Sequential([part, GeoLoRADense(8, rank=1, max_rank=6)])
    # As above: compiled, XLA adds up fewer columns in another order.
    model.compile(
        cutting(keras.optimizers.Adam(1e-2)), loss="mse", run_eagerly=True
    )
    take_steps(model, 2)
    before = model.predict(X, verbose=0)
    ranks = [part.layers[0].rank, model.layers[1].rank]
    model.compact_geolora(1)
    found = [part.layers[0].adapter.max_rank, model.layers[1].adapter.max_rank]
    assert found == ranks
    np.testing.assert_array_equal(model.predict(X, verbose=0), before)
    take_steps(model, 1)


@pytest.mark.parametrize(
    "error, options",
    [
        (TypeError, {"multiple": 1.5}),
        (TypeError, {"multiple": True}),
        (ValueError, {"multiple": 0}),
        (ValueError, {"min_saving": 1}),
        (ValueError, {"min_saving": -0.1}),
    ],
)
def test_wrong_options_are_refused(error, options):
    (name,) = options
    with pytest.raises(error, match=f"`{name}`.*Received: {name}="):
        model_of().compact_geolora(**options)


def test_a_model_without_adapters_is_refused():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="can be compacted"):
        keras_geolora.compact_geolora(model)


@pytest.mark.parametrize("what", ["rate", "budget", "class"])
def test_functions_and_local_classes_survive_compaction(what):
    class Own(keras.optimizers.SGD):
        pass

    inner, options = keras.optimizers.SGD(0.01, momentum=0.9), {}
    if what == "rate":
        inner = keras.optimizers.SGD(lambda: 0.01, momentum=0.9)
    elif what == "class":
        inner = Own(0.01, momentum=0.9)
    else:
        options = {"rank_budget": lambda updates: 6}
    optimizer = GeoLoRA(inner, 0.6, cut_interval=1, **options)
    model = model_of(optimizer)
    take_steps(model, 3)
    model.compact_geolora(1)
    assert widths(model) < [6, 6, 6]
    assert type(model.optimizer.inner_optimizer) is type(inner)
    before = deltas(model)
    take_steps(model, 1)
    assert int(model.optimizer.iterations) == 4
    assert any(
        np.any(x != y) for x, y in zip(before, deltas(model), strict=True)
    )


def test_an_optimizer_of_other_variables_is_refused_before_anything_changes():
    model = model_of()
    take_steps(model, 3)
    stranger = GeoLoRA("adam")
    stranger.build([keras.Variable(np.ones(3, "float32"))])
    with pytest.raises(ValueError, match="optimizer built for 1 variab"):
        model.compact_geolora(1, optimizer=stranger)
    assert widths(model) == [6, 6, 6]


def test_what_was_cut_off_is_given_back_to_the_system():
    model = model_of()
    take_steps(model, 3)
    old = weakref.ref(model.layers[0].adapter)
    model.compact_geolora(1)
    take_steps(model, 1)
    gc.collect()
    assert old() is None


def test_the_guard_of_fit_bears_buffers_that_shrink_in_the_first_epoch(
    tmp_path,
):
    interrupted = model_of()
    fit = {"batch_size": 8, "verbose": 0}
    backup = keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)
    callbacks = [EpochCompaction(1, 0), backup]
    interrupted.fit(X, Y, epochs=1, callbacks=callbacks, **fit)
    assert widths(interrupted) != [6, 6, 6]
    resumed = model_of()
    resumed.fit(X, Y, epochs=2, callbacks=[backup], **fit)
    assert widths(resumed) == widths(interrupted)
