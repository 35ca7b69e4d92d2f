"""Models that are changed after they were compiled and trained."""

import contextlib
import functools
import warnings
import zipfile

import keras
import numpy as np
import pytest
from keras import ops
from moving import move

import keras_geolora  # noqa: F401
from keras_geolora import GeoLoRA, GeoLoRADense
from keras_geolora.layers.factor import TRAINED_ROLES
from keras_geolora.model.substitution import Substitution

X = np.random.default_rng(0).normal(size=(16, 8)).astype("float32")
Y = np.random.default_rng(1).normal(size=(16, 8)).astype("float32")
BACKEND = keras.backend.backend()
CALL_COMPILE = r"You must call `compile\(\)`"


def plain():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(8, activation="tanh", name="one"),
            keras.layers.Dense(8, name="two"),
        ]
    )


def adapted(**options):
    return plain().enable_geolora(**{"rank": 2, "seed": 0, **options})


def compile_(model, rate=1e-2, **options):
    optimizer = GeoLoRA(keras.optimizers.Adam(rate))
    model.compile(optimizer, loss="mse", **options)
    return model


def fit(model, epochs=2, x=X, y=Y):
    model.fit(x, y, 8, epochs=epochs, shuffle=False, verbose=0)
    return model


def trained(**options):
    return fit(compile_(adapted(**options)))


def moved(model):
    """As after a training, but nothing was traced."""
    compile_(model)
    move(model)
    model.optimizer.build(model.trainable_variables)
    model.make_train_function()
    return model


def predict(model, x=X):
    return model.predict(x, verbose=0)


def as_arrays(variables):
    return [np.array(ops.convert_to_numpy(v)) for v in variables]


def assert_same(variables, others):
    for one, other in zip(as_arrays(variables), others, strict=True):
        np.testing.assert_array_equal(one, other)


def reload(model, folder):
    model.save(folder / "m.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return keras.saving.load_model(folder / "m.keras")


# What was compiled for other variables.

CHANGES = {
    "another adapter": lambda m: m.enable_geolora(rank=1, name="other"),
    "a sum": lambda m: m.combine_geolora("sum", {"default": 0.5}),
    "merged": lambda m: m.merge_geolora(),
    "removed": lambda m: m.remove_geolora(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_gives_up_what_was_compiled(change, tmp_path):
    model = moved(adapted())
    CHANGES[change](model)
    assert not model.compiled
    with pytest.raises(ValueError, match=CALL_COMPILE):
        model.fit(X, Y)
    loaded = reload(model, tmp_path)
    assert not loaded.compiled
    np.testing.assert_array_equal(predict(loaded), predict(model))


def test_activating_gives_up_what_was_compiled(tmp_path):
    model = moved(adapted())
    model.enable_geolora(rank=1, name="other")
    moved(model)
    model.activate_geolora("other")  # which it is
    assert model.compiled
    model.activate_geolora("default")
    assert not model.compiled
    np.testing.assert_array_equal(
        predict(reload(model, tmp_path)), predict(model)
    )


def test_loading_another_adapter_gives_up_what_was_compiled(tmp_path):
    moved(adapted()).save_geolora(tmp_path / "a.safetensors")
    model = moved(adapted())
    model.load_geolora(tmp_path / "a.safetensors")
    assert model.compiled  # the same variables with other values
    model.load_geolora(tmp_path / "a.safetensors", name="other")
    assert not model.compiled


def test_an_optimizer_starts_anew_where_factors_are_loaded(tmp_path):
    path = tmp_path / "a.safetensors"
    moved(adapted()).save_geolora(path)
    model, fresh = trained(), compile_(adapted())
    inner = model.optimizer.inner_optimizer
    model.optimizer.learning_rate = 3e-3
    fresh.load_geolora(path)
    fresh.optimizer.learning_rate = 3e-3
    fit(fresh)
    for load in (model.load_geolora, lambda p: model.average_geolora([p])):
        assert int(model.optimizer.iterations) == 4
        load(path)
        assert model.optimizer.inner_optimizer is inner
        assert int(model.optimizer.iterations) == 0
        fit(model)
        np.testing.assert_allclose(predict(model), predict(fresh), atol=1e-5)


def test_what_goes_on_training_stays_compiled():
    model = moved(adapted())
    model.enable_geolora(rank=1, name="other")
    fit(compile_(model))
    model.delete_geolora("default")
    model.compact_geolora(multiple=1)
    assert model.compiled
    fit(model)


def test_a_model_compiled_before_it_was_adapted_gives_it_up():
    model = plain()
    model.compile("sgd", loss="mse")
    fit(model)
    model.enable_geolora(rank=2)
    assert not model.compiled


def test_a_merged_model_is_as_before_its_first_compile():
    model, fresh = trained(), plain()
    predict(fresh)
    model.merge_geolora(reversible=False)
    predict(model)
    of_fit = {"history", "stop_training", "_eval_epoch_iterator"}
    of_fit |= {"_called", "_jax_state", "_tracked"}
    assert set(vars(model)) - of_fit == set(vars(fresh)) - of_fit
    for name in ("compiled", "loss", "_compile_loss", "_compile_metrics"):
        assert vars(model)[name] == vars(fresh)[name]


@pytest.mark.parametrize("end", ["merge_geolora", "remove_geolora"])
def test_no_file_of_a_plain_model_has_a_trace(end, tmp_path):
    model = moved(adapted(exclude="two", modules_to_save="two"))
    with model.geolora_disabled():
        predict(model)
    getattr(model, end)()
    model.save(tmp_path / "m.keras")
    model.save_weights(tmp_path / "m.weights.h5")
    with zipfile.ZipFile(tmp_path / "m.keras") as file:
        content = b"".join(map(file.read, file.namelist()))
    content += (tmp_path / "m.weights.h5").read_bytes()
    if BACKEND == "tensorflow":
        import tensorflow as tf

        saved = tf.train.Checkpoint(model=model).save(tmp_path / "ckpt")
        content += str(tf.train.list_variables(saved)).encode()
        graph = tf.train.load_checkpoint(saved)
        content += bytes(graph.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH"))
        model.export(tmp_path / "exported", verbose=False)
        pb = tmp_path / "exported" / "saved_model.pb"
        content += pb.read_bytes()
    if BACKEND == "torch":
        content += str(list(model.state_dict())).encode()
    for trace in (b"geolora", b"adapter"):
        assert trace not in content.lower()


def test_unmerging_brings_the_optimizer_back_exactly():
    model = trained()

    def state():
        return [*model.weights, *model.optimizer.variables]

    before = as_arrays(state())
    fit(model)
    after = as_arrays(state())
    for variable, value in zip(state(), before, strict=True):
        variable.assign(value)
    model.merge_geolora()
    assert not model.compiled
    model.compile("sgd", loss="mae")  # to evaluate, for instance
    model.unmerge_geolora()
    assert_same(state(), before)
    fit(model)
    assert_same(state(), after)


def test_weights_of_another_active_adapter_bring_its_optimizer(tmp_path):
    def with_two():
        model = adapted(name="a")
        return model.enable_geolora(rank=1, seed=5, name="b")

    model = fit(compile_(with_two()))
    model.save_weights(tmp_path / "m.weights.h5")
    other = moved(with_two().activate_geolora("a"))
    optimizer = other.optimizer
    other.load_weights(tmp_path / "m.weights.h5")
    assert other.optimizer is optimizer
    assert other.geolora_adapters()[0] == "b"
    for run in (model, other):
        fit(run)
    assert_same(other.weights, as_arrays(model.weights))


def test_a_model_around_a_changed_part_is_not_saved_as_it_was(tmp_path):
    part = adapted()
    whole = keras.Sequential([keras.Input((8,)), part])
    compile_(whole, jit_compile=BACKEND == "jax")
    whole.optimizer.build(whole.trainable_variables)
    part.merge_geolora()
    with pytest.raises(ValueError, match="Compile the model.* 2 adapters"):
        whole.save(tmp_path / "m.keras")
    whole.compile("sgd", loss="mse")
    np.testing.assert_array_equal(
        predict(reload(whole, tmp_path)), predict(whole)
    )


def test_an_interrupted_merge_leaves_the_optimizer(monkeypatch):
    model = moved(adapted())

    def interrupt(layer):
        raise KeyboardInterrupt

    monkeypatch.setattr(GeoLoRADense, "detach_adapters", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.merge_geolora()
    monkeypatch.undo()
    assert model.compiled
    fit(model)


# The pretrained model as a reference.


class WithReference(keras.Sequential):
    """Keeps close to what the pretrained model says."""

    known = None  # what it says, where that is known from elsewhere

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight)
        if self.known is not None:
            reference = self.known
        else:
            with self.geolora_disabled():
                reference = ops.stop_gradient(self(x, training=False))
        return loss + ops.mean(ops.square(y_pred - reference))


def with_reference(**options):
    keras.utils.set_random_seed(0)
    model = WithReference([keras.Input((8,)), *plain().layers])
    options = {"exclude": "two", "modules_to_save": "two", **options}
    return compile_(model.enable_geolora(rank=2, seed=0, **options))


def learned(model):
    """The updates of a model, and what trained beside them."""
    updates = [x.delta() for x in model.layers if getattr(x, "adapter", None)]
    return as_arrays([*updates, *model.layers[-1].weights[:2]])


@functools.cache
def learned_from_what_is_known(with_head):
    """Of a twin that knows what the pretrained model says."""
    twin = with_reference(**HEAD[with_head])
    twin.known = ops.convert_to_tensor(predict(twin)[:8])
    return learned(fit_on_one_batch(twin))


def fit_on_one_batch(model):
    model.fit(X[:8], Y[:8], 8, epochs=2, shuffle=False, verbose=0)
    assert np.abs(predict(model) - predict(plain())).max() > 0.01
    return model


HEAD = {True: {}, False: {"exclude": None, "modules_to_save": None}}


@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize("with_head", HEAD)
def test_the_pretrained_model_is_a_reference_inside_a_loss(eagerly, with_head):
    model = with_reference(**HEAD[with_head])
    model.run_eagerly = eagerly
    fit_on_one_batch(model)
    # Not of the factors, of which rounding may change the signs.
    expected = learned_from_what_is_known(with_head)
    for one, other in zip(learned(model), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    base = plain()
    base.run_eagerly = eagerly  # or a compiler rounds otherwise
    with model.geolora_disabled():
        np.testing.assert_array_equal(predict(model), predict(base))
    model.evaluate(X, Y, verbose=0)


class Failing(WithReference):
    fails = True

    def compute_loss(self, *args, **kwargs):
        with self.geolora_disabled():
            if self.fails:
                raise ValueError("not today")
        return super().compute_loss(*args, **kwargs)


def test_an_error_inside_the_block_leaves_a_model_that_trains(tmp_path):
    keras.utils.set_random_seed(0)
    model = Failing([keras.Input((8,)), *plain().layers])
    model.enable_geolora(rank=2, exclude="two", modules_to_save="two")
    compile_(model)
    before = as_arrays(model.weights)
    with pytest.raises(ValueError, match="not today"):
        fit(model)
    assert_same(model.weights, before)
    model.fails = False
    model.compile(model.optimizer, loss="mse")
    fit(model)
    model.save_geolora(tmp_path / "m.safetensors")


def test_a_reference_between_forward_and_backward_of_torch():
    if BACKEND != "torch":
        pytest.skip("about the graph that torch records")
    import torch

    model = moved(adapted(exclude="two", modules_to_save="two"))
    gradients = []
    for block in (model.geolora_disabled, contextlib.nullcontext):
        loss = (model(X, training=True) ** 2).sum()
        with block():
            model(X)
        variables = [v.value for v in model.trainable_variables]
        gradients.append(torch.autograd.grad(loss, variables))
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_substitution_hides_nothing_else():
    def read(value):
        return float(ops.convert_to_numpy(value))

    seen, hidden, moved = (keras.Variable(float(i)) for i in range(3))
    outer = keras.StatelessScope([(seen, ops.convert_to_tensor(7.0))])
    with outer:
        with Substitution([(hidden, np.float32(9))]):
            assert read(seen) == 7 and read(hidden) == 9
            moved.assign(5.0)
            with pytest.raises(ValueError, match="shows its pretrained value"):
                hidden.assign(3.0)
        assert read(hidden) == 1
    assert read(outer.get_current_value(moved)) == 5
    assert read(moved) == 2


# `compile`, `fit` and `train_step` of a user's own.


class TwoParts(keras.Model):
    """Two optimizers, each for a part."""

    def __init__(self):
        super().__init__()
        self.g = keras.layers.Dense(8, name="g")
        self.d = keras.layers.Dense(8, name="d")

    def call(self, x):
        return self.d(self.g(x))

    def compile(self, g_optimizer, d_optimizer):
        super().compile()
        self.g_optimizer, self.d_optimizer = g_optimizer, d_optimizer

    def train_step(self, data):
        x = data[0] if isinstance(data, tuple) else data
        for part, optimizer in (
            (self.d, self.d_optimizer),
            (self.g, self.g_optimizer),
        ):
            variables = part.trainable_variables
            gradients = self.gradients(x, variables)
            optimizer.apply(gradients, variables)
        return {"loss": ops.mean(self(x))}

    def gradients(self, x, variables):
        if BACKEND == "torch":
            import torch

            loss = ops.mean(self(x, training=True))
            return torch.autograd.grad(loss, [v.value for v in variables])
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = ops.mean(self(x, training=True))
        return tape.gradient(loss, [v.value for v in variables])

    def fit(self, x):
        return super().fit(x, verbose=0)


def two_parts(**options):
    if BACKEND == "jax":
        pytest.skip("Keras on JAX carries the state of one optimizer")
    model = TwoParts()
    model(X)
    model.enable_geolora(rank=1, seed=0, **options)
    optimizers = [GeoLoRA("sgd", 0.9, cut_interval=1) for _ in range(2)]
    model.compile(*optimizers)
    for part, optimizer in zip((model.g, model.d), optimizers, strict=True):
        optimizer.build(part.trainable_variables)
    return model


@pytest.mark.filterwarnings("ignore:The model does not have any trainable")
def test_two_optimizers_train_and_follow_a_compaction():
    model = two_parts()
    for _ in range(2):
        model.fit(X)
        model.compact_geolora(multiple=1)
    assert int(model.g_optimizer.iterations) == 2
    assert model.g.adapter.max_rank == model.g.rank == 1
    for update in as_arrays([model.g.delta(), model.d.delta()]):
        assert np.abs(update).max() > 0


@pytest.mark.parametrize("change", CHANGES)
def test_two_optimizers_are_given_up(change, tmp_path):
    model = two_parts()
    move(model)
    CHANGES[change](model)
    assert model.g_optimizer is model.d_optimizer is None
    with pytest.raises(ValueError, match=CALL_COMPILE):
        model.fit(X)
    model.compile(GeoLoRA("sgd"), GeoLoRA("sgd"))


def test_a_part_without_adapters_may_have_another_optimizer():
    if BACKEND == "jax":
        pytest.skip("Keras on JAX carries the state of one optimizer")
    model = two_parts(exclude="d", modules_to_save="d")
    model.compile(GeoLoRA("sgd"), keras.optimizers.Adam())
    model.fit(X)


# Layers that come and go.


def with_a_new_head(model, name="new"):
    model.pop()
    model.add(keras.layers.Dense(8, name=name))
    return model


@pytest.mark.parametrize("exclude", [None, "two"])
def test_a_new_head_trains_and_is_saved(exclude, tmp_path):
    model = with_a_new_head(adapted(exclude=exclude))
    head = as_arrays(model.layers[-1].weights)
    fit(compile_(model))
    assert np.abs(as_arrays(model.layers[-1].weights)[0] - head[0]).max() > 0
    loaded = reload(model, tmp_path)
    np.testing.assert_array_equal(predict(loaded), predict(model))
    for run in (model, loaded):
        fit(run)
    assert_same(loaded.weights, as_arrays(model.weights))
    loaded.remove_geolora()
    assert_same(loaded.layers[-1].weights, head)


def test_a_new_head_belongs_to_the_adapter(tmp_path):
    model = moved(with_a_new_head(adapted(exclude="two")))
    outputs = predict(model)
    model.save_geolora(tmp_path / "m.safetensors")
    other = with_a_new_head(plain()).load_geolora(tmp_path / "m.safetensors")
    np.testing.assert_allclose(predict(other), outputs, atol=1e-6)
    model.enable_geolora(rank=1, name="b")
    model.activate_geolora("default")
    np.testing.assert_array_equal(predict(model), outputs)
    model.merge_geolora()
    np.testing.assert_allclose(predict(model), outputs, atol=1e-5)


def test_a_model_that_rests_takes_in_a_new_head():
    model = adapted(exclude="two")
    model.trainable = False
    with_a_new_head(model)
    compile_(model)
    assert not model.trainable_variables
    model.trainable = True
    assert len(model.trainable_variables) == len(TRAINED_ROLES) + 2


def test_layers_inside_a_part_may_change(tmp_path):
    part = plain()
    model = keras.Sequential([keras.Input((8,)), part])
    model.enable_geolora(rank=2, exclude="two")
    part.pop()
    part.add(
        keras.Sequential(
            [keras.layers.Dense(8), keras.layers.BatchNormalization()]
        )
    )
    fit(compile_(model))
    assert len(model.trainable_variables) == len(TRAINED_ROLES) + 4
    loaded = reload(model, tmp_path)
    for run in (model, loaded):
        fit(run)
    assert_same(loaded.weights, as_arrays(model.weights))


def test_a_layer_that_brings_adapters_is_refused(tmp_path):
    model = adapted(exclude="two")
    model.add(GeoLoRADense(8, rank=1, name="mine"))
    path = tmp_path / "m.keras"
    path.write_text("an older file")
    for use in (compile_, lambda m: m.save(path)):
        with pytest.raises(ValueError, match=r"new layers \['mine'\]"):
            use(model)
    assert path.read_text() == "an older file"


def test_a_model_without_a_layer_that_was_adapted_is_refused(tmp_path):
    model = adapted(targets="two")
    with_a_new_head(model)
    with pytest.raises(ValueError, match="without any layer of adapter"):
        model.save(tmp_path / "m.keras")
