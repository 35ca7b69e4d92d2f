"""The adapter and the layers that carry it."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_geolora import (
    GeoLoRA,
    GeoLoRADense,
    GeoLoRAEinsumDense,
    GeoLoRAEmbedding,
    LowRankAdapter,
)
from keras_geolora.layers import adapted as adapted_module
from keras_geolora.layers.factor import TRAINED_ROLES
from keras_geolora.layers.products import low_rank_rows

# Every kind of equation that Keras and KerasHub use: inputs' shape,
# equation, output_shape, bias axes, and the kernel as a matrix.
EINSUMS = [
    ((2, 3, 8), "abc,cde->abde", (None, 2, 4), "de", (8, 8)),  # query
    ((2, 3, 2, 4), "abcd,cde->abe", (None, 6), "e", (8, 6)),  # attention out
    ((2, 3, 8), "abc,cd->abd", (None, 5), None, (8, 5)),
    ((2, 3, 8), "...x,xy->...y", 5, "y", (8, 5)),
    ((2, 8), "...x,xy->...y", 5, None, (8, 5)),
    ((2, 3, 8), "bqm,muh->bquh", (None, 2, 4), None, (8, 8)),
    ((2, 3, 2, 4), "bquh,uhm->bqm", (None, 6), None, (8, 6)),
    ((2, 3, 8), "btd,ndh->btnh", (None, 2, 4), None, (8, 8)),  # Gemma query
    ((2, 3, 2, 4), "btnh,nhd->btd", (None, 6), None, (8, 6)),
    ((2, 3, 4), "abc,bd->acd", (4, 5), None, (3, 5)),  # over time
    ((2, 8, 3), "ab...,bc->ac...", (5,), None, (8, 5)),
]


def random(shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def move(layer, seed=1):
    """Gives the adapter some update, as training would."""
    sigma = np.zeros(layer.adapter.max_rank)
    rank = layer.rank
    sigma[:rank] = np.linspace(1.0, 0.5, rank)
    layer.adapter.S.assign(np.diag(sigma))


def pair(equation, output_shape, bias_axes):
    """A layer with an adapter and the same Keras layer without."""
    arguments = {"bias_axes": bias_axes, "activation": "tanh"}
    adapted = GeoLoRAEinsumDense(
        equation, output_shape, rank=2, scale=0.5, seed=3, **arguments
    )
    return adapted, keras.layers.EinsumDense(
        equation, output_shape, **arguments
    )


@pytest.mark.parametrize("shape, equation, output, bias, matrix", EINSUMS)
def test_einsum_adds_the_update_to_the_kernel(
    shape, equation, output, bias, matrix
):
    adapted, plain = pair(equation, output, bias)
    x = random(shape)
    fresh = adapted(x)
    plain(x)
    plain.kernel.assign(adapted.kernel)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(fresh), ops.convert_to_numpy(plain(x))
    )
    assert adapted.kernel_view.matrix_shape == matrix
    move(adapted)
    plain.kernel.assign(adapted.kernel + adapted.delta())
    np.testing.assert_allclose(
        ops.convert_to_numpy(adapted(x)),
        ops.convert_to_numpy(plain(x)),
        atol=2e-6,
    )


@pytest.mark.parametrize("shape, equation, output, bias, matrix", EINSUMS)
def test_rank_of_an_einsum_means_rank(shape, equation, output, bias, matrix):
    layer, _ = pair(equation, output, bias)
    layer(random(shape))
    move(layer)
    delta = layer.kernel_view.to_matrix(ops.convert_to_numpy(layer.delta()))
    assert delta.shape == matrix
    assert np.linalg.matrix_rank(delta) == 2


@pytest.mark.parametrize(
    "equation, output_shape", [("abc,bcd->abd", (3, 5)), ("abc,cd->ad", 5)]
)
def test_an_equation_that_is_no_product_of_matrices_is_refused(
    equation, output_shape
):
    layer = GeoLoRAEinsumDense(equation, output_shape, rank=2)
    with pytest.raises(ValueError, match=f"equation='{equation}'"):
        layer(random((2, 3, 8)))


def test_dense_adds_the_update_to_the_kernel():
    layer = GeoLoRADense(5, activation="relu", rank=2, scale=2.0, seed=0)
    x = random((2, 3, 8))
    layer(x)
    move(layer)
    kernel = ops.convert_to_numpy(layer.kernel + layer.delta())
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer(x)), np.maximum(x @ kernel, 0), atol=2e-6
    )


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_a_fresh_adapter_changes_no_bit_of_few_rows_either(activation):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(16, activation) for _ in range(3)]
    model = keras.Sequential([keras.Input((16,)), *layers])
    for layer in layers:
        layer.bias.assign(random((16,)))
    x = random((2, 16))
    before = model.predict_on_batch(x)
    model.enable_geolora(rank=2)
    after = model.predict_on_batch(x)
    np.testing.assert_array_equal(after, before)


def test_no_update_is_formed_for_few_rows(monkeypatch):
    def delta(self):
        raise AssertionError("an update was formed")

    layer = GeoLoRADense(16, rank=2)
    layer.build((None, 16))
    move(layer)
    kernel = ops.convert_to_numpy(layer.kernel + layer.delta())
    x = random((2, 16))
    monkeypatch.setattr(adapted_module.LowRankAdapter, "delta", delta)
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer(x)), x @ kernel, atol=2e-6
    )


def test_without_a_rank_it_is_the_keras_layer():
    ours, theirs = GeoLoRADense(5), keras.layers.Dense(5)
    x = random((2, 8))
    ours(x), theirs(x)
    theirs.set_weights(ours.get_weights())
    np.testing.assert_array_equal(
        ops.convert_to_numpy(ours(x)), ops.convert_to_numpy(theirs(x))
    )
    assert not ours.is_adapted
    assert set(ours.get_config()) == set(theirs.get_config())
    assert len(ours.trainable_variables) == 2


def test_the_factors_alone_train():
    layer = GeoLoRADense(5, rank=2)
    layer.build((None, 8))
    adapter = layer.adapter
    assert [id(v) for v in layer.trainable_variables] == [
        id(v) for v in adapter.factors[: len(TRAINED_ROLES)]
    ]


def test_the_bias_trains_on_request():
    layer = GeoLoRADense(5, rank=2, train_bias=True)
    layer.build((None, 8))
    names = {v.name for v in layer.trainable_variables}
    assert names == {*TRAINED_ROLES, "bias"}


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_factors_are_float32_under_mixed_precision(policy):
    layer = GeoLoRADense(5, rank=2, dtype=policy, seed=0)
    x = random((4, 8))
    y = layer(x)
    assert keras.backend.standardize_dtype(y.dtype) == policy[6:]
    assert {v.dtype for v in layer.trainable_variables} == {"float32"}
    move(layer)
    exact = x @ ops.convert_to_numpy(layer.kernel + layer.delta())
    found = ops.convert_to_numpy(ops.cast(layer(x), "float32"))
    np.testing.assert_allclose(found, exact, atol=0.1)


@pytest.mark.parametrize("shape, equation, output, bias, matrix", EINSUMS)
def test_training_and_inference_compute_the_same(
    shape, equation, output, bias, matrix
):
    layer, _ = pair(equation, output, bias)
    x = random(shape)
    layer(x)
    move(layer)
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer(x, training=True)),
        ops.convert_to_numpy(layer(x, training=False)),
        atol=2e-6,
    )


def test_dropout_acts_in_training_only():
    adapter = LowRankAdapter(64, 5, rank=2, dropout=0.5, seed=0)
    adapter.S.assign(np.diag([1.0, 1.0, 0.0, 0.0]))
    x = random((4, 64))
    calm = ops.convert_to_numpy(adapter(x, training=False))
    dropped = ops.convert_to_numpy(adapter(x, training=True))
    exact = x @ ops.convert_to_numpy(adapter.delta())
    np.testing.assert_allclose(calm, exact, atol=2e-6)
    assert np.abs(dropped - exact).max() > 0.1


def test_config_round_trip_rebuilds_the_layer():
    layer = GeoLoRADense(
        5, rank=2, max_rank=3, scale=0.5, dropout=0.1, train_bias=True, seed=1
    )
    layer.build((None, 8))
    twin = GeoLoRADense.from_config(layer.get_config())
    twin.build((None, 8))
    twin.set_weights(layer.get_weights())
    x = random((2, 8))
    np.testing.assert_array_equal(
        ops.convert_to_numpy(twin(x)), ops.convert_to_numpy(layer(x))
    )
    assert twin.adapter.max_rank == 3 and twin.adapter.scale == 0.5


def test_merging_a_layer_gives_back_the_keras_layer():
    layer = GeoLoRADense(5, rank=2, seed=0)
    x = random((2, 8))
    layer(x)
    move(layer)
    adapted = ops.convert_to_numpy(layer(x))
    layer.merge()
    assert type(layer) is keras.layers.Dense
    assert [v.name for v in layer.variables] == ["kernel", "bias"]
    assert len(layer.trainable_variables) == 2
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer(x)), adapted, atol=2e-6
    )


@pytest.mark.parametrize(
    "arguments, error, received",
    [
        ({"rank": 0}, ValueError, "rank=0"),
        ({"rank": -1}, ValueError, "rank=-1"),
        ({"rank": 9}, ValueError, "rank=9"),
        ({"rank": 2.5}, TypeError, "rank=2.5"),
        ({"rank": True}, TypeError, "rank=True"),
        ({"rank": "8"}, TypeError, "rank='8'"),
        ({"rank": 4, "max_rank": 3}, ValueError, "max_rank=3"),
        ({"rank": 4, "max_rank": 6}, ValueError, "max_rank=6"),
        ({"rank": 2, "min_rank": 3}, ValueError, "min_rank=3"),
        ({"rank": 2, "dropout": 1.0}, ValueError, "dropout=1.0"),
        ({"rank": 2, "dropout": "x"}, TypeError, "dropout='x'"),
        ({"rank": 2, "scale": "x"}, TypeError, "scale='x'"),
        ({"rank": 2, "scale": 0.0}, ValueError, "scale=0.0"),
        ({"rank": 2, "scale": float("nan")}, ValueError, "scale=nan"),
    ],
)
def test_wrong_options_are_refused(arguments, error, received):
    with pytest.raises(error, match=received):
        GeoLoRADense(5, **arguments).build((None, 8))


def test_options_without_a_rank_are_refused():
    with pytest.raises(ValueError, match="rank=None, {'max_rank': 8"):
        GeoLoRADense(5, max_rank=8)


def test_a_layer_without_adapter_has_no_rank_and_no_update():
    layer = GeoLoRADense(5, name="plain")
    layer.build((None, 8))
    for ask in (lambda: layer.rank, layer.delta, layer.merge):
        with pytest.raises(ValueError, match="layer 'plain' without an ad"):
            ask()


def test_only_the_plain_class_can_be_adapted():
    embedding = keras.layers.Embedding(4, 3)
    with pytest.raises(TypeError, match="of type Embedding"):
        GeoLoRADense.adapt(embedding, rank=2)


def test_a_layer_with_keras_lora_is_refused():
    layer = keras.layers.Dense(5, name="lora")
    layer.build((None, 8))
    layer.enable_lora(2)
    with pytest.raises(ValueError, match="'lora' with lora_enabled=True"):
        GeoLoRADense.adapt(layer, rank=2)
    assert type(layer) is keras.layers.Dense


@pytest.mark.parametrize("training", [True, False])
def test_integers_are_numbers_to_a_dense_layer(training):
    layer = GeoLoRADense(5, rank=2)
    layer.build((None, 8))
    x = np.arange(16).reshape(2, 8)
    y = layer(x, training=training)
    expected = x @ ops.convert_to_numpy(layer.kernel)
    # Sums of 120 terms near zero keep the rounding of their largest term.
    np.testing.assert_allclose(
        ops.convert_to_numpy(y), expected, rtol=1e-5, atol=1e-5
    )


def test_masks_pass_an_adapted_layer():
    tokens = keras.Input((4,), dtype="int32")
    x = keras.layers.Embedding(9, 8, mask_zero=True)(tokens)
    x = keras.layers.Dense(8, name="dense")(x)
    model = keras.Model(tokens, keras.layers.LSTM(3)(x))
    ids = np.array([[1, 2, 0, 0], [3, 4, 5, 0]])
    before = model.predict(ids, verbose=0)
    model.enable_geolora(rank=2, targets="all")
    np.testing.assert_array_equal(model.predict(ids, verbose=0), before)
    model(ids, training=True)  # a warning would be an error


def test_an_adapted_layer_is_not_quantized():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.enable_geolora(rank=2)
    layer = model.layers[0]
    with pytest.raises(ValueError, match="before it is adapted"):
        layer.quantize("int8")
    model.remove_geolora()
    layer.quantize("int8")
    assert layer.quantization_mode == "int8"


def test_merging_keeps_the_precision_of_a_kernel():
    if keras.backend.backend() == "jax":
        pytest.skip("JAX has float64 only where the whole process asks for it")
    layer = keras.layers.Dense(4, dtype="float64")
    model = keras.Sequential([keras.Input((8,), dtype="float64"), layer])
    before = ops.convert_to_numpy(layer.kernel).copy()
    model.enable_geolora(rank=2)
    model.merge_geolora()
    np.testing.assert_array_equal(ops.convert_to_numpy(layer.kernel), before)


@pytest.mark.parametrize("integers", [True, False])
def test_adapters_train_inside_a_branch(integers):
    """As in the prompt encoder of SAM."""

    class Branching(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            if integers:
                self.inner = GeoLoRAEmbedding(5, 4, rank=2, seed=0)
            else:
                self.inner = GeoLoRADense(4, rank=2, seed=0)
            self.inner.build((None, 4))

        def call(self, x):
            inputs = ops.cast(x[:, 0] > 0, "int32") if integers else x
            return ops.cond(
                ops.max(x) > 0, lambda: self.inner(inputs), lambda: x
            )

        def compute_output_shape(self, input_shape):
            return input_shape

    model = keras.Sequential([keras.Input((4,)), Branching()])
    model.compile(GeoLoRA("adam"), loss="mse", jit_compile=False)
    x = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
    model.fit(x, x, epochs=2, verbose=0)
    core = model.layers[0].inner.adapter.S
    assert np.any(ops.convert_to_numpy(core))


def test_rows_are_counted_exactly():
    U = np.zeros((2**24 + 1, 1), "float32")
    S, V = np.ones((1, 1), "float32"), np.ones((2, 1), "float32")
    ids = np.array([0])
    with pytest.raises(ValueError, match="16777217 rows"):
        low_rank_rows(ids, (U, S, V, 0 * U, 0 * V), 1.0, "float32")
    U = U[:-1]
    U[-1], U[-2] = 3, 5
    last = np.array([2**24 - 1, 2**24 - 2])
    factors = map(ops.convert_to_tensor, (U, S, V, 0 * U, 0 * V))
    y = low_rank_rows(last, tuple(factors), 1.0, "float32")
    np.testing.assert_array_equal(ops.convert_to_numpy(y)[:, 0], [3, 5])


def sparse(x):
    """The same values as a sparse tensor, for Keras on this backend."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.sparse.from_dense(x)
    from jax.experimental.sparse import BCOO

    return BCOO.fromdense(x)


@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="Keras has none on torch"
)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_sparse_inputs_train_as_dense_ones(policy, dropout):
    x = random((16, 8)) * (random((16, 8), 1) > 0.5)
    deltas = []
    for is_sparse in (True, False):
        keras.utils.set_random_seed(0)
        layer = keras.layers.Dense(8, dtype=policy)
        model = keras.Sequential([keras.Input((8,), sparse=is_sparse), layer])
        model.enable_geolora(rank=2, seed=0, dropout=dropout)
        model.compile(GeoLoRA(keras.optimizers.SGD(0.1)), loss="mse")
        inputs = sparse(x) if is_sparse else x
        # Two steps take less time than a trace.
        on_tensorflow = keras.backend.backend() == "tensorflow"
        model.run_eagerly = on_tensorflow and not is_sparse
        for _ in range(2):
            model.train_on_batch(inputs, x)
        deltas.append(ops.convert_to_numpy(layer.delta()))
        before = ops.convert_to_numpy(ops.cast(model(inputs), "float32"))
        model.merge_geolora()
        after = ops.convert_to_numpy(ops.cast(model(inputs), "float32"))
        np.testing.assert_allclose(after, before, atol=0.03)
    assert np.abs(deltas[0]).max() > 0.01
    tolerance = 1e-5 if policy == "float32" else 0.01
    np.testing.assert_allclose(*deltas, atol=tolerance)


def test_sparse_ids_look_up_rows():
    if keras.backend.backend() == "torch":
        pytest.skip("Keras has no sparse tensors on torch")
    ids = np.array([[1, 0, 2], [0, 4, 0]], "int32")
    layer = GeoLoRAEmbedding(5, 4, rank=2, seed=0)
    layer.build()
    move(layer)
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer(sparse(ids))),
        ops.convert_to_numpy(layer(ids)),
        atol=1e-6,
    )


def not_built(**options):
    return GeoLoRADense(6, rank=2, **options)


def built(**options):
    layer = not_built(**options)
    layer.build((None, 8))
    return layer


def adapted_in_place(**options):
    layer = keras.layers.Dense(6)
    layer.build((None, 8))
    return GeoLoRADense.adapt(layer, rank=2, **options)


def trains(layer):
    """What trains of a layer; a model does not ask the layer itself."""
    return sorted(v.name for v in layer.variables if v.trainable)


@pytest.mark.parametrize("train_bias", [True, False])
@pytest.mark.parametrize("create", [not_built, built, adapted_in_place])
def test_the_kernel_stays_frozen_whatever_its_layer_is(create, train_bias):
    layer = create(train_bias=train_bias)
    expected = [*sorted(TRAINED_ROLES)] + ["bias"] * train_bias
    for trainable in (False, False, True, True):
        layer.trainable = trainable
        if not layer.built:
            layer.build((None, 8))
        assert layer.trainable is trainable
        assert trains(layer) == (expected if trainable else [])
    layer.kernel.trainable = True
    for trainable in (False, True):
        layer.trainable = trainable
    assert trains(layer) == sorted([*expected, "kernel"])
    layer.trainable = False
    layer.merge()
    assert trains(layer) == []
    layer.trainable = True
    assert trains(layer) == ["bias", "kernel"]


def test_of_several_adapters_the_active_one_follows_its_layer():
    layer = adapted_in_place(name="one")
    GeoLoRADense.adapt(layer, name="two", rank=2)
    for trainable in (False, True):
        layer.trainable = trainable
    assert len(trains(layer)) == len(TRAINED_ROLES) and layer.adapter.trainable
    layer.trainable = False
    layer.activate_adapter("one")
    assert trains(layer) == []


@pytest.mark.parametrize("where", ["become_adapted", "name_scopes_of"])
def test_an_interrupted_conversion_leaves_a_plain_layer(monkeypatch, where):
    def interrupt(*args):
        raise KeyboardInterrupt

    layer = keras.layers.Dense(4)
    layer.build((None, 8))
    before, flags = set(vars(layer)), [v.trainable for v in layer.variables]
    monkeypatch.setattr(adapted_module, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        GeoLoRADense.adapt(layer, rank=2)
    assert type(layer) is keras.layers.Dense and set(vars(layer)) == before
    assert [v.trainable for v in layer.variables] == flags
