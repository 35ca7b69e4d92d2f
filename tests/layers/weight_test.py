"""Weights that belong to no layer of their own: sums, gradients, reading."""

import gradients_test as plain
import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

from keras_geolora.keras_internals import unlocked
from keras_geolora.layers.raw_weights import with_raw_weights
from keras_geolora.layers.tree import places
from keras_geolora.layers.weight import AdaptedWeight

# JAX has no float64 unless it is asked for.
WIDE = pytest.param(
    "float64",
    marks=pytest.mark.skipif(
        keras.backend.backend() == "jax", reason="it has no float64"
    ),
)
EXPERTS, INPUTS, HIDDEN = 3, 6, 4


@keras.saving.register_keras_serializable("tests")
class Experts(keras.layers.Layer):
    """A mixture as KerasHub writes it: every expert sees every row."""

    def build(self, shape):
        self.gate = self.add_weight(
            name="gate", shape=(EXPERTS, INPUTS, HIDDEN)
        )
        self.out = self.add_weight(name="out", shape=(EXPERTS, HIDDEN, INPUTS))
        self.bias = self.add_weight(name="bias", shape=(EXPERTS, HIDDEN))

    def call(self, x):
        hidden = ops.einsum("ti,eih->eth", x, self.gate)
        hidden = ops.tanh(hidden + self.bias[:, None])
        return ops.sum(ops.einsum("eth,ehi->eti", hidden, self.out), axis=0)


@keras.saving.register_keras_serializable("tests")
class Listed(keras.layers.Layer):
    """Its weights are in a list, and have no names."""

    def build(self, shape):
        self.maps = [self.add_weight(shape=(INPUTS, INPUTS)) for _ in range(2)]

    def call(self, x):
        for kernel in self.maps:
            x = ops.tanh(ops.matmul(x, kernel))
        return x


@keras.saving.register_keras_serializable("tests")
class Reader(keras.layers.Layer):
    """Reads the weight of another layer, which it holds."""

    def build(self, shape):
        self.owner = Listed(name="owner")
        self.owner.build(shape)

    def call(self, x):
        for kernel in self.owner.maps:
            x = ops.matmul(x, ops.transpose(kernel))
        return x


layers = keras.layers
SEQUENCE = 3, INPUTS


def recurrent(cls):
    return lambda **options: cls(HIDDEN, return_sequences=True, **options)


def both_ways(**options):
    return layers.Bidirectional(layers.GRU(HIDDEN), **options)


def stacked(**options):
    cells = [layers.LSTMCell(HIDDEN), layers.SimpleRNNCell(HIDDEN)]
    return layers.RNN(cells, **options)


def convolution(cls):
    return lambda **options: cls(HIDDEN, 2, **options)


def batched(**options):
    return layers.EinsumDense("bac,acd->bad", (SEQUENCE[0], HIDDEN), **options)


def positions(**options):
    return keras_hub.layers.PositionEmbedding(SEQUENCE[0], **options)


# What makes the layer, the shape of its inputs, and how many weights it has.
KINDS = {
    "experts": (Experts, (INPUTS,), 2),
    "listed": (Listed, (INPUTS,), 2),
    "read by another": (Reader, (INPUTS,), 2),
    "lstm": (recurrent(layers.LSTM), SEQUENCE, 2),
    "gru": (recurrent(layers.GRU), SEQUENCE, 2),
    "simple rnn": (recurrent(layers.SimpleRNN), SEQUENCE, 2),
    "bidirectional": (both_ways, SEQUENCE, 4),
    "stacked cells": (stacked, SEQUENCE, 4),
    "transposed": (convolution(layers.Conv1DTranspose), SEQUENCE, 1),
    "separable": (convolution(layers.SeparableConv1D), SEQUENCE, 1),
    "batched": (batched, SEQUENCE, 1),
    "positions": (positions, SEQUENCE, 1),
}
# In loops, on JAX forward and on TensorFlow twice, Keras has no second
# derivatives.
TWICE = list(KINDS)[:3]


def model_of(kind="experts", **options):
    keras.utils.set_random_seed(0)
    create, shape, _ = KINDS.get(kind) or (kind, (INPUTS,), 0)
    layer = create(name="moe", **options)
    return keras.Sequential([keras.Input(shape), layer], name="net")


def rows(model):
    return plain.random((5, *model.input_shape[1:]))


def adapted(kind="experts", scale=0.5, **options):
    model = model_of(kind, **options)
    model.enable_geolora(2, max_rank=3, targets="all", scale=scale, seed=0)
    return model


def weights(model):
    return {
        path.removeprefix("moe/"): weight
        for path, weight in places(model)
        if isinstance(weight, AdaptedWeight)
    }


def move(model):
    """Cores that are not zero, different for every matrix."""
    rng = np.random.default_rng(3)
    for weight in weights(model).values():
        S = np.zeros(weight.adapter.S.shape, "float32")
        S[..., 0, 0], S[..., 1, 1] = rng.uniform(1, 2, (2, *S.shape[:-2]))
        weight.adapter.S.assign(S)


def flat(x):
    """One matrix, or several, as an array with three axes."""
    x = np.array(ops.convert_to_numpy(x))
    return x.reshape((-1, *x.shape[-2:]))


def compare_gradients(model, order=1, loss_of=None):
    """With those of the whole weight, projected."""
    move(model)
    x = ops.convert_to_tensor(rows(model))

    def loss(model):
        return plain.LOSSES[order](lambda x: model(x, training=True), x)

    found = {}
    for name, weight in weights(model).items():
        a = weight.adapter
        factors = [a.U, a.S, a.V]
        values = [ops.convert_to_numpy(v) for v in factors]
        found[name] = values, plain.gradients(model, factors, values, loss)
    adapters = weights(model)
    model.merge_geolora()
    for name, ((U, _, V), grads) in found.items():
        variable = adapters[name].variable
        values = [ops.convert_to_numpy(variable)]
        (G,) = plain.gradients(model, [variable], values, loss)
        G = adapters[name].kernel_view.to_matrix(G)
        G, U, V = flat(0.5 * G), flat(U), flat(V)
        Ut = U.swapaxes(-1, -2)
        exact = G @ V, Ut @ G @ V, G.swapaxes(-1, -2) @ U
        for one, right in zip(grads, exact, strict=True):
            error = np.linalg.norm(flat(one) - right)
            assert error < 1e-4 * np.linalg.norm(right) + 1e-6


@pytest.mark.parametrize(
    "kind, order",
    [*((kind, 1) for kind in KINDS), *((kind, 2) for kind in TWICE)],
)
def test_gradients_are_those_of_the_weight_projected(kind, order):
    model = adapted(kind)
    assert len(weights(model)) == KINDS[kind][2]
    compare_gradients(model, order)


@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow",
    reason="`tf.recompute_grad` sees variables only, no values in their place",
)
def test_a_layer_that_is_computed_again_reads_the_sum_there_too():
    with keras.RematScope("full"):
        model = adapted()
    compare_gradients(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_no_bit_and_a_merge_nothing_else(kind):
    model = model_of(kind)
    model.trainable = False  # torch may take other kernels for what trains
    x = rows(model)
    before = ops.convert_to_numpy(model(x))
    model = adapted(kind)
    model.trainable = False
    np.testing.assert_array_equal(ops.convert_to_numpy(model(x)), before)
    model.trainable = True
    move(model)
    after = ops.convert_to_numpy(model(x))
    assert np.abs(after - before).max() > 1e-2
    with model.geolora_disabled():
        np.testing.assert_array_equal(ops.convert_to_numpy(model(x)), before)
    model.merge_geolora()
    np.testing.assert_allclose(ops.convert_to_numpy(model(x)), after, atol=1e-5)
    model.unmerge_geolora()
    np.testing.assert_array_equal(ops.convert_to_numpy(model(x)), after)
    model.remove_geolora()
    model.trainable = False
    np.testing.assert_array_equal(ops.convert_to_numpy(model(x)), before)


def test_without_adapters_nothing_is_left_of_them():
    model = model_of()
    layer, variable = model.layers[0], model.layers[0].gate
    before = type(layer), type(variable), sorted(vars(layer))
    paths = [v.path for v in model.variables]
    model.enable_geolora(rank=1, targets="experts")
    assert type(layer) is not Experts and isinstance(layer, Experts)
    model.remove_geolora()
    assert (type(layer), type(variable), sorted(vars(layer))) == before
    assert [v.path for v in model.variables] == paths
    assert all(v.trainable for v in model.variables)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", WIDE])
def test_the_sum_is_rounded_only_once(policy):
    class Seeing(Experts):
        def call(self, x):
            seen.append(self.gate.value)
            return super().call(x)

    seen = []
    model = adapted(Seeing, dtype=policy)
    move(model)
    seen.clear()
    model(plain.random((5, INPUTS)))
    weight = weights(model)["gate"]
    stored = weight.variable.dtype
    wide = "float64" if stored == "float64" else "float32"
    exact = ops.cast(weight.variable, wide) + ops.cast(weight.delta(), wide)
    expected = ops.cast(exact, model.layers[0].compute_dtype)
    assert seen[0].dtype == expected.dtype
    assert bool(ops.all(ops.equal(seen[0], expected)))


def test_an_owner_stays_frozen_but_for_its_adapters():
    model = adapted()
    layer = model.layers[0]
    layer.trainable = False
    assert not model.trainable_variables
    layer.trainable = True
    trains = {v.path.rpartition("/")[2] for v in model.trainable_variables}
    assert trains >= set("USV") and not trains & {"gate", "out"}


def test_a_weight_that_a_user_thaws_has_a_gradient():
    model = adapted()
    move(model)
    layer = model.layers[0]
    layer.gate.trainable = True
    x = ops.convert_to_tensor(plain.random((5, INPUTS)))
    value = ops.convert_to_numpy(layer.gate)
    (found,) = plain.gradients(
        model, [layer.gate], [value], lambda m: ops.sum(m(x) ** 2)
    )
    assert np.abs(found).max() > 1e-3


def test_random_bases_are_orthonormal_and_differ_between_experts():
    U = weights(adapted())["gate"].adapter.U
    U = np.array(ops.convert_to_numpy(U))
    gram = U.swapaxes(-1, -2) @ U
    np.testing.assert_allclose(
        gram, np.tile(np.diag([1.0, 1, 0]), (EXPERTS, 1, 1)), atol=1e-6
    )
    assert np.abs(U[0] - U[1]).max() > 0.1


def test_every_expert_has_a_rank_of_its_own():
    adapter = weights(adapted())["gate"].adapter
    U, S, V = (np.array(x) for x in adapter.trimmed())
    U[0, :, 1] = S[0, 1] = S[0, :, 1] = V[0, :, 1] = 0
    adapter.assign_factors(U, S, V)
    assert adapter.ranks.tolist() == [1, 2, 2] and adapter.rank == 2
    assert adapter.parameters_per_rank == INPUTS + HIDDEN + 1
    assert adapter.kernel_norm().shape == (EXPERTS,)


def test_a_batched_adapter_cannot_be_called():
    adapter = weights(adapted())["gate"].adapter
    with pytest.raises(ValueError, match="of 3 matrices"):
        adapter(plain.random((2, INPUTS)))


def test_a_dropout_is_refused():
    with pytest.raises(ValueError, match=r"dropout=0.1, weight"):
        model_of().enable_geolora(targets="experts", dropout=0.1)


def test_an_owner_cannot_be_saved_without_its_model():
    with pytest.raises(ValueError, match=r"'moe' with adapted weights"):
        adapted().layers[0].get_config()


def test_weights_that_two_layers_hold_are_left_alone():
    reader = Reader()
    reader.build((None, INPUTS))
    with unlocked(reader):
        reader.mine = reader.owner.maps[0]
    model = keras.Sequential([keras.Input((INPUTS,)), reader])
    paths = with_raw_weights(model).values()
    found = [x.variable for x in paths if isinstance(x, AdaptedWeight)]
    assert len(found) == 1 and found[0] is reader.owner.maps[1]


@keras.saving.register_keras_serializable("tests")
class Grouped(keras.layers.Layer):
    """A weight whose axes nobody could guess."""

    def build(self, shape):
        self.w = self.add_weight(name="w", shape=(2, INPUTS, 2, HIDDEN))

    def call(self, x):
        return ops.einsum("ti,aibo->tabo", x, self.w)


def test_a_user_says_what_the_axes_of_a_weight_are(tmp_path):
    model = model_of(Grouped)
    axes = {".*/w": "brcc"}
    model.enable_geolora(2, targets=".*/w", weight_axes=axes, scale=0.5)
    weight = weights(model)["w"]
    assert weight.adapter.U.shape == (2, INPUTS, 4)
    assert weight.adapter.V.shape == (2, 2 * HIDDEN, 4)
    compare_gradients(model)
    model.unmerge_geolora()
    expected = ops.convert_to_numpy(model(rows(model)))
    model.save(tmp_path / "model.keras")
    model.save_geolora(tmp_path / "adapter.safetensors")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    fresh = model_of(Grouped).load_geolora(tmp_path / "adapter.safetensors")
    for other in (loaded, fresh):
        found = ops.convert_to_numpy(other(rows(other)))
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    "axes, error, message",
    [
        ({".*/w": "brc"}, ValueError, "Received: 'brc' for 'net/moe/w'|brc"),
        ({".*/w": "bbrr"}, ValueError, "Received: 'bbrr'"),
        ({"x": "rc"}, ValueError, r"Received: \['x'\], which match none"),
        ("rc", TypeError, "Received: weight_axes='rc'"),
    ],
)
def test_axes_that_make_no_sense_are_refused(axes, error, message):
    with pytest.raises(error, match=message):
        model_of(Grouped).enable_geolora(targets="all", weight_axes=axes)


def test_biases_beside_weights_are_not_passed_over_in_silence():
    message = r"'moe/gate' beside \['bias'\], ... \(2 in all\)"
    with pytest.raises(ValueError, match=message):
        model_of().enable_geolora(targets="experts", train_bias=True)
    model_of("listed").enable_geolora(targets="all", train_bias=True)


def test_a_weight_that_a_model_holds_is_named():
    class Holder(keras.Model):
        def __init__(self):
            super().__init__(name="holder")
            self.dense = keras.layers.Dense(INPUTS)
            self.own = self.add_weight(name="own", shape=(INPUTS, INPUTS))

        def call(self, x):
            return ops.matmul(self.dense(x), self.own)

    model = Holder()
    model(plain.random((2, INPUTS)))
    with pytest.raises(ValueError, match=r"make them in a layer: .*own\."):
        model.enable_geolora(targets=".*own")
    lines = []
    model.enable_geolora(targets="all")
    model.geolora_summary(print_fn=lines.append)
    assert any("No adapter reaches" in x and "own" in x for x in lines)
