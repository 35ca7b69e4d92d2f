"""GeoLoRA in training: `fit`, callbacks, precision, loops of one's own."""

import keras
import numpy as np
import pytest
import reference
from moving import anew

import keras_geolora
from keras_geolora import GeoLoRA


def linear_data(sigma, seed=0, samples=64, input_dim=12):
    """Inputs, and outputs of a linear map with given singular values."""
    rng = np.random.default_rng(seed)
    U, S, V = reference.random_factors(rng, input_dim, 8, sigma)
    # Uncorrelated inputs: every direction is learnt at the same rate.
    x = np.linalg.qr(rng.normal(size=(samples, input_dim)))[0] * samples**0.5
    return x.astype("float32"), (x @ U @ S @ V.T).astype("float32")


def linear_model(*layers_before, rank=2, max_rank=5):
    """An adapted layer with a kernel of zeros, so that its update is all."""
    model = keras.Sequential(
        [
            keras.Input((12,)),
            *layers_before,
            keras.layers.Dense(8, kernel_initializer="zeros", name="dense"),
        ]
    )
    return model.enable_geolora(rank=rank, max_rank=max_rank, seed=0)


def by_sgd(*layers_before, **options):
    model = linear_model(*layers_before)
    model.compile(GeoLoRA(keras.optimizers.SGD(0.5), **options), loss="mse")
    return model


def deep_data():
    return linear_data([3.0, 2.0, 1.0], samples=32, input_dim=8)


def deep_model():
    """Two adapted layers of one shape, the same at every call."""
    init = keras.initializers.GlorotUniform
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(
                8, activation="tanh", kernel_initializer=init(1)
            ),
            keras.layers.Dense(8, kernel_initializer=init(2)),
        ]
    )
    return model.enable_geolora(rank=2, max_rank=4, seed=0)


def adapters(model):
    return [layer.adapter for layer in model.layers if hasattr(layer, "rank")]


def deltas(model):
    return [keras.ops.convert_to_numpy(a.delta()) for a in adapters(model)]


def to_numpy(variables):
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


def factors(model):
    return to_numpy(v for a in adapters(model) for v in a.factors)


def assert_identical(these, those):
    for x, y in zip(these, those, strict=True):
        np.testing.assert_array_equal(x, y)


def assert_close(these, those):
    for x, y in zip(these, those, strict=True):
        error = np.linalg.norm(x - y) / np.linalg.norm(y)
        assert error < 1e-5


# One step after the other, written as each backend wants it.


def loop_of_tensorflow(model, batches):
    import tensorflow as tf

    for x, y in batches:
        with tf.GradientTape() as tape:
            loss = keras.ops.mean(keras.ops.square(model(x) - y))
        grads = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply(grads, model.trainable_variables)


def loop_of_jax(model, batches):
    import jax

    def loss_of(trainable, frozen, x, y):
        prediction, _ = model.stateless_call(trainable, frozen, x)
        return keras.ops.mean(keras.ops.square(prediction - y))

    @jax.jit
    def step(trainable, frozen, state, x, y):
        _, grads = jax.value_and_grad(loss_of)(trainable, frozen, x, y)
        return model.optimizer.stateless_apply(state, grads, trainable)

    model.optimizer.build(model.trainable_variables)
    trainable = [v.value for v in model.trainable_variables]
    frozen = [v.value for v in model.non_trainable_variables]
    state = [v.value for v in model.optimizer.variables]
    for x, y in batches:
        trainable, state = step(trainable, frozen, state, x, y)
    for variables, values in (
        (model.trainable_variables, trainable),
        (model.optimizer.variables, state),
    ):
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)


def loop_of_torch(model, batches):
    import torch

    for x, y in batches:
        model.zero_grad()
        y = keras.ops.convert_to_tensor(y)
        keras.ops.mean(keras.ops.square(model(x) - y)).backward()
        grads = [v.value.grad for v in model.trainable_variables]
        with torch.no_grad():
            model.optimizer.apply(grads, model.trainable_variables)


LOOPS = {
    "tensorflow": loop_of_tensorflow,
    "jax": loop_of_jax,
    "torch": loop_of_torch,
}
run_custom_loop = LOOPS[keras.backend.backend()]


def batches_of(x, y, epochs=2, size=16):
    for _ in range(epochs):
        for i in range(0, len(x), size):
            yield x[i : i + size], y[i : i + size]


# The ways to train agree.


def test_factors_are_among_the_parameters_that_zero_grad_clears():
    if keras.backend.backend() != "torch":
        pytest.skip("only torch keeps gradients in the variables")
    model = deep_model()
    known = {id(p) for p in model.parameters()}
    assert {id(v.value) for v in model.trainable_variables} <= known


def test_the_factors_of_two_layers_have_different_paths():
    paths = [v.path for v in deep_model().trainable_variables]
    assert len(set(paths)) == len(paths)


@pytest.mark.filterwarnings("ignore:None of the 1 adapters has moved")
def test_gradients_of_former_batches_are_forgotten():
    model = anew(by_sgd)
    x, y = linear_data([3.0, 2.0])
    model.fit(x, y, verbose=0)
    before = deltas(model)
    model.fit(x, model.predict(x, verbose=0), verbose=0)  # no gradient
    assert_close(deltas(model), before)


@pytest.fixture(scope="module")
def fitted():
    """A model after `fit`, the one that all other ways are compared to."""
    return trained_by_fit(jit_compile=False)


def compiled(model, **options):
    inner = keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(GeoLoRA(inner, cut_interval=2), loss="mse", **options)
    return model


def trained_by_fit(**options):
    model = compiled(deep_model(), **options)
    x, y = deep_data()
    model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    return model


def test_the_model_to_compare_with_has_moved(fitted):
    assert all(np.linalg.norm(delta) > 0.1 for delta in deltas(fitted))


def test_fit_with_jit_compile_gives_the_same_factors(fitted):
    if keras.backend.backend() == "torch":
        pytest.skip("torch.compile needs a C++ compiler and two minutes")
    assert_close(deltas(trained_by_fit(jit_compile=True)), deltas(fitted))


def test_adam_with_its_bound_trains_with_jit_compile():
    if keras.backend.backend() == "torch":
        pytest.skip("torch.compile needs a C++ compiler and two minutes")
    model = deep_model()
    model.compile(
        GeoLoRA(keras.optimizers.Adam(0.03)), loss="mse", jit_compile=True
    )
    x, y = deep_data()
    history = model.fit(x, y, batch_size=16, epochs=6, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]


def test_train_on_batch_gives_the_same_factors(fitted):
    model = compiled(deep_model())
    for x, y in batches_of(*deep_data()):
        model.train_on_batch(x, y)
    assert_close(deltas(model), deltas(fitted))


@pytest.mark.parametrize("train", ["fit", "train_on_batch"])
def test_no_step_has_to_build_the_optimizer(train, monkeypatch):
    built, apply = [], GeoLoRA.apply

    def watched(self, *args, **kwargs):
        built.append(self.built)
        return apply(self, *args, **kwargs)

    monkeypatch.setattr(GeoLoRA, "apply", watched)
    model = compiled(deep_model())
    x, y = deep_data()
    getattr(model, train)(x[:16], y[:16])
    assert built and all(built)


def test_a_custom_loop_gives_the_same_factors(fitted):
    model = compiled(deep_model())
    run_custom_loop(model, batches_of(*deep_data()))
    assert_close(deltas(model), deltas(fitted))


def test_several_steps_per_execution_give_the_same_factors(fitted):
    if keras.backend.backend() == "torch":
        pytest.skip("Keras on torch has no `steps_per_execution`")
    model = trained_by_fit(steps_per_execution=2)
    assert_close(deltas(model), deltas(fitted))


def test_training_goes_on_from_a_file_as_if_without_a_break(tmp_path):
    x, y = deep_data()
    options = {"batch_size": 16, "shuffle": False, "verbose": 0}
    model, copy = compiled(deep_model()), compiled(deep_model())
    model.fit(x, y, **options)
    model.save_weights(tmp_path / "model.weights.h5")
    copy.optimizer.build(copy.trainable_variables)
    copy.load_weights(tmp_path / "model.weights.h5")
    model.fit(x, y, **options)
    copy.fit(x, y, **options)
    assert_identical(factors(copy), factors(model))


# Ranks.

calls = []


def counted(x):
    calls.append(x)
    return x


def often_cut():
    model = linear_model(keras.layers.Lambda(counted))
    optimizer = GeoLoRA(keras.optimizers.SGD(2.0), cut_interval=2)
    model.compile(optimizer, loss="mse")
    return model


def test_a_changing_rank_traces_nothing_anew():
    if keras.backend.backend() == "torch":
        pytest.skip("torch runs every step eagerly: there are no traces")
    model = anew(often_cut)
    ranks = [adapters(model)[0].rank]
    options = {"batch_size": 64, "shuffle": False, "verbose": 0}
    model.fit(*linear_data([4.0, 3.0, 2.0, 1.0]), **options)
    traces = len(calls)
    for sigma in ([4.0, 3.0, 2.0, 1.0], [4.0], [4.0, 3.0]):
        x, y = linear_data(sigma)
        model.fit(np.tile(x, (20, 1)), np.tile(y, (20, 1)), **options)
        ranks.append(adapters(model)[0].rank)
    assert ranks == [2, 4, 1, 2]
    assert len(calls) == traces


def test_fit_finds_the_rank_of_the_data():
    model = anew(often_cut)
    x, y = linear_data([4.0, 3.0, 2.0])
    history = model.fit(x, y, batch_size=64, epochs=25, verbose=0).history
    assert adapters(model)[0].rank == 3
    assert history["mean_rank"][-1] == 3.0
    assert history["skipped_steps"] == [0] * 25
    assert history["loss"][-1] < 1e-2 * history["loss"][0]


# Callbacks and learning rates.


def test_a_scheduled_learning_rate_reaches_the_inner_optimizer():
    model = anew(by_sgd)
    schedule = keras.callbacks.LearningRateScheduler(
        lambda epoch: [0.5, 0.25, 0.0][epoch]
    )
    seen = []
    watch = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(deltas(model)[0])
    )
    x, y = linear_data([3.0, 2.0])
    history = model.fit(x, y, epochs=3, callbacks=[schedule, watch], verbose=0)
    assert history.history["learning_rate"] == [0.5, 0.25, 0.0]
    assert float(model.optimizer.inner_optimizer.learning_rate) == 0.0
    assert np.abs(seen[1] - seen[0]).max() > 1e-3
    np.testing.assert_allclose(seen[2], seen[1], atol=1e-6)


def test_the_learning_rate_is_reduced_on_a_plateau():
    model = anew(by_sgd)
    plateau = keras.callbacks.ReduceLROnPlateau(
        monitor="loss", factor=0.1, patience=1, min_delta=1e9
    )
    x, y = linear_data([3.0, 2.0])
    history = model.fit(x, y, epochs=3, callbacks=[plateau], verbose=0)
    rates = history.history["learning_rate"]
    np.testing.assert_allclose(rates, [0.5, 0.5, 0.05], rtol=1e-5)
    rate = float(model.optimizer.learning_rate)
    assert rate == pytest.approx(0.005)


def test_a_schedule_of_keras_works_in_fit():
    model = linear_model()
    schedule = keras.optimizers.schedules.CosineDecay(0.5, decay_steps=8)
    model.compile(GeoLoRA(keras.optimizers.SGD(schedule)), loss="mse")
    x, y = linear_data([3.0, 2.0])
    model.fit(x, y, batch_size=16, epochs=2, verbose=0)
    at_the_end = deltas(model)[0]
    assert float(model.optimizer.learning_rate) == pytest.approx(0, abs=1e-6)
    with pytest.warns(UserWarning, match="check the learning rate"):
        model.fit(x, y, batch_size=16, verbose=0)
    np.testing.assert_allclose(deltas(model)[0], at_the_end, atol=1e-6)


@pytest.mark.parametrize("accumulation", [None, 4])
def test_a_cut_takes_columns_away_and_nothing_else(accumulation):
    model = linear_model()
    inner = keras.optimizers.Adam(
        0.01, gradient_accumulation_steps=accumulation
    )
    model.compile(GeoLoRA(inner, tolerance=0.0, cut_interval=1000), loss="mse")
    x, y = linear_data([3.0, 0.1])
    for _ in range(6):
        model.train_on_batch(x, y)
    optimizer, adapter = model.optimizer, adapters(model)[0]
    delta, full = deltas(model)[0], adapter.rank
    optimizer.tolerance = 0.5
    optimizer.cut()
    rank = adapter.rank
    assert rank < full
    P, sigma, Qt = np.linalg.svd(delta)
    best = (P[:, :rank] * sigma[:rank]) @ Qt[:rank]
    np.testing.assert_allclose(deltas(model)[0], best, atol=1e-6)
    assert np.linalg.norm(sigma[rank:]) <= 0.5 * np.linalg.norm(sigma)
    sums = getattr(inner, "_accumulated_gradients", [])
    for slot in [*inner._momentums, *sums]:
        if slot.shape == adapter.U.shape:
            assert not to_numpy([slot])[0][:, rank:].any(), slot.path
    for _ in range(4):
        model.train_on_batch(x, y)
    assert not np.array_equal(deltas(model)[0], best)  # training goes on


def test_gradient_accumulation_in_fit_equals_larger_batches():
    x, y = linear_data([3.0, 2.0])
    small, large = linear_model(), anew(by_sgd)
    inner = keras.optimizers.SGD(0.5, gradient_accumulation_steps=4)
    small.compile(GeoLoRA(inner), loss="mse")
    small.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    large.fit(x, y, batch_size=32, epochs=2, shuffle=False, verbose=0)
    assert_close(deltas(small), deltas(large))


def test_early_stopping_restores_the_best_factors():
    model = anew(by_sgd)
    best = []
    watch = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: best.append(factors(model))
    )
    stop = keras.callbacks.EarlyStopping(
        "loss", patience=1, min_delta=1e9, restore_best_weights=True
    )
    x, y = linear_data([3.0, 2.0])
    model.fit(x, y, epochs=5, callbacks=[watch, stop], verbose=0)
    assert len(best) == 2
    assert_identical(factors(model), best[0])


# Steps that are not finite.


def two_branches():
    """Two adapted layers side by side, each with its own output."""
    x = keras.Input((12,))
    outputs = [keras.layers.Dense(8, name=name)(x) for name in ("one", "two")]
    model = keras.Model(x, outputs).enable_geolora(rank=2, seed=0)
    model.compile(GeoLoRA(keras.optimizers.Adam(0.03)), loss=["mse", "mse"])
    return model


def test_a_bad_batch_leaves_its_adapter_and_is_counted():
    model = two_branches()
    x, y = linear_data([3.0, 2.0], samples=48)
    model.fit(x, [y, y], batch_size=16, verbose=0)
    one, two = model.get_layer("one"), model.get_layer("two")
    stays, moves = (x.adapter.factors_as_arrays() for x in (one, two))
    bad = np.full_like(y[:16], np.nan)
    model.train_on_batch(x[:16], [bad, y[:16]])
    assert_identical(one.adapter.factors_as_arrays(), stays)
    moved = two.adapter.factors_as_arrays()
    assert all(np.isfinite(factor).all() for factor in moved)
    assert not np.array_equal(moved.S, moves.S)


def test_the_history_counts_bad_batches_and_training_goes_on():
    model = two_branches()
    x, y = linear_data([3.0, 2.0], samples=48)
    bad = y.copy()
    bad[20, 3] = np.nan
    options = {"batch_size": 16, "shuffle": False, "verbose": 0}
    history = model.fit(x, [bad, y], epochs=2, **options).history
    assert history["skipped_steps"] == [1, 2]
    history = model.fit(x, [y, y], epochs=4, **options).history
    assert history["skipped_steps"] == [2] * 4
    assert history["loss"][-1] < history["loss"][0]
    assert all(np.isfinite(delta).all() for delta in deltas(model))


# Mixed precision.


@pytest.fixture
def mixed_float16():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy(before)


def by_sgd_in_float16():
    return by_sgd()


def test_half_precision_trains_with_loss_scaling_around(mixed_float16):
    model = by_sgd(cut_interval=2)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert isinstance(model.optimizer.inner_optimizer, GeoLoRA)
    x, y = linear_data([3.0, 2.0, 1.0])
    history = model.fit(x, y, batch_size=64, epochs=20, verbose=0).history
    assert history["loss"][-1] < 0.1 * history["loss"][0]
    assert history["skipped_steps"][-1] == 0
    assert adapters(model)[0].rank == 3
    assert adapters(model)[0].U.dtype == "float32"


def test_an_overflow_of_half_precision_keeps_the_factors(mixed_float16):
    model = anew(by_sgd_in_float16)
    x, y = linear_data([3.0, 2.0, 1.0])
    model.train_on_batch(x, y)
    before = factors(model)
    scale = float(model.optimizer.dynamic_scale)
    model.train_on_batch(6e4 * x, y)
    assert_identical(factors(model), before)
    assert float(model.optimizer.dynamic_scale) == scale / 2
    model.train_on_batch(x, y)
    after = factors(model)
    assert all(np.isfinite(v).all() for v in after)
    assert not np.array_equal(after[1], before[1])


def test_a_fixed_and_a_dynamic_loss_scale_do_not_add_up(mixed_float16):
    x, y = linear_data([3.0, 2.0, 1.0])
    fixed = linear_model()
    inner = keras.optimizers.SGD(0.5, loss_scale_factor=16.0)
    fixed.compile(GeoLoRA(inner), loss="mse")
    models = anew(by_sgd_in_float16), fixed
    for model in models:
        for _ in range(2):
            model.train_on_batch(x, y)
    np.testing.assert_allclose(*map(np.linalg.norm, map(deltas, models)), 1e-2)


# Optimizers that may not train adapters.


@pytest.mark.parametrize("optimizer", ["adam", keras.optimizers.SGD()])
def test_compile_of_an_adapted_model_shows_the_line_to_write(optimizer):
    message = (
        r"(?s)model\.compile\(optimizer=keras_geolora\.GeoLoRA\("
        "keras.optimizers.AdamW.*Received: optimizer="
    )
    with pytest.raises(ValueError, match=message):
        deep_model().compile(optimizer, loss="mse")


def test_fit_of_a_model_compiled_before_it_was_adapted_is_refused():
    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(8)])
    model.compile("sgd", loss="mse")
    model.enable_geolora(rank=2)
    with pytest.raises(ValueError, match=r"You must call `compile\(\)`"):
        model.fit(*linear_data([1.0]), verbose=0)


def test_an_adapted_part_of_a_plain_model_is_refused_in_fit():
    model = keras.Sequential([deep_model(), keras.layers.Dense(8)])
    model.compile("adam", loss="mse")
    with pytest.raises(RuntimeError, match="Received an optimizer other than"):
        model.fit(*deep_data(), verbose=0)


def test_a_custom_loop_with_another_optimizer_is_refused():
    model = deep_model()
    plain = keras.Sequential([keras.Input((8,)), *model.layers])
    plain.compile("adam", loss="mse")
    with pytest.raises(RuntimeError, match="Received an optimizer other than"):
        run_custom_loop(plain, batches_of(*deep_data()))


# Variables without adapters, in compiled training.


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_fit_of_a_plain_model_is_that_of_the_inner_optimizer(name):
    x, y = linear_data([3.0, 2.0])
    weights = []
    for wrap in (lambda o: o, GeoLoRA):
        model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(8)])
        rng = np.random.default_rng(0)
        model.set_weights([rng.normal(size=w.shape) for w in model.weights])
        optimizer = wrap(keras.optimizers.get(name))
        model.compile(optimizer, loss="mse")
        model.fit(x, y, batch_size=16, shuffle=False, epochs=2, verbose=0)
        weights.append(model.get_weights())
    assert_identical(*weights)


def test_the_rank_logger_works_on_a_model_around_an_adapted_part():
    model = keras.Sequential([deep_model(), keras.layers.Dense(8)])
    model.compile(GeoLoRA("sgd"), loss="mse")
    logger = keras_geolora.callbacks.RankLogger()
    x, y = deep_data()
    history = model.fit(x, y, callbacks=[logger], verbose=0).history
    assert history["skipped_steps"] == [0]
    assert 1 <= history["mean_rank"][0] <= 4
