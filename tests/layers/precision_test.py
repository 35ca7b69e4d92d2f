"""Low precision and quantized kernels under float32 factors."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_geolora import GeoLoRA
from keras_geolora.layers.tree import adapted_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:Invalid quantization mode"),
    # Keras' quantized embedding transposes a vector.
    pytest.mark.filterwarnings("ignore:The use of `x.T`"),
]

X = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
Y = X @ np.random.default_rng(1).normal(size=(8, 8)).astype("float32")


def create(policy="float32"):
    keras.utils.set_random_seed(0)
    with_policy = {"dtype": policy}
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(8, activation="relu", **with_policy),
            keras.layers.EinsumDense(
                "ab,bcd->acd", (2, 4), bias_axes="d", **with_policy
            ),
            keras.layers.Flatten(**with_policy),
            keras.layers.Dense(8, name="head", dtype="float32"),
        ]
    )


def tokens():
    return np.random.default_rng(2).integers(0, 30, (32, 5))


def language_model(policy="float32", tie_weights=True):
    keras.utils.set_random_seed(0)
    embedding = keras.layers.ReversibleEmbedding(
        30, 8, tie_weights=tie_weights, dtype=policy, name="embedding"
    )
    inputs = keras.Input((5,), dtype="int32")
    x = keras.layers.Dense(8, activation="gelu", dtype=policy)(
        embedding(inputs)
    )
    return keras.Model(inputs, embedding(x, reverse=True))


def predict(model, x=X):
    return np.array(model.predict(x, verbose=0)).astype("float32")


def losses(model, x=X, y=Y, loss="mse", epochs=8, rate=0.02):
    optimizer = GeoLoRA(keras.optimizers.AdamW(rate), max_update_ratio=0.05)
    if any(v.compute_dtype == "float16" for v in model.layers):
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(optimizer, loss=loss)
    history = model.fit(x, y, epochs=epochs, batch_size=16, verbose=0)
    return history.history["loss"]


POLICIES = ["mixed_bfloat16", "mixed_float16", "bfloat16"]


@pytest.mark.parametrize("policy", POLICIES)
def test_factors_stay_float32_and_the_model_learns(policy):
    model = create(policy)
    before = predict(model)
    model.enable_geolora(rank=4, seed=0)
    np.testing.assert_array_equal(predict(model), before)
    for layer in adapted_layers(model).values():
        assert {v.dtype for v in layer.trainable_variables} == {"float32"}
    history = losses(model)
    assert history[-1] < 0.7 * history[0]
    outputs = predict(model)
    model.merge_geolora()
    scale = np.abs(outputs).max()
    assert np.abs(predict(model) - outputs).max() < 0.03 * scale


@pytest.mark.skipif(
    keras.backend.backend() == "jax",
    reason="JAX has float64 only where the whole process asks for it",
)
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_float64_model_is_adapted_trained_and_merged(everywhere):
    if everywhere:
        keras.config.set_floatx("float64")
    try:
        model = create("float64")
        before = predict(model)
        model.enable_geolora(rank=4, seed=0)
        np.testing.assert_array_equal(predict(model), before)
        for layer in adapted_layers(model).values():
            factors = layer.trainable_variables
            assert {v.dtype for v in factors} == {"float32"}
        assert model.layers[0].compute_dtype == "float64"
        history = losses(model)
        assert history[-1] < 0.7 * history[0]
        model.optimizer.cut()
        outputs = predict(model)
        model.merge_geolora()
        np.testing.assert_allclose(predict(model), outputs, atol=1e-5)
    finally:
        keras.config.set_floatx("float32")


def test_a_small_step_moves_a_bfloat16_model():
    """A step of 1e-4 is lost in bfloat16 weights, not in our factors."""
    model = create("bfloat16")
    model.enable_geolora(rank=4, seed=0)
    losses(model, epochs=1, rate=1e-4)
    for layer in adapted_layers(model).values():
        assert np.abs(ops.convert_to_numpy(layer.delta())).max() > 1e-5


def quantized(mode):
    model = create()
    if mode == "int4 in blocks":
        config = keras.quantizers.Int4QuantizationConfig(block_size=4)
        model.quantize("int4", config=config)
    else:
        model.quantize(mode)
    return model


@pytest.mark.parametrize("mode", ["int8", "int4", "int4 in blocks"])
def test_a_quantized_base_is_adapted_and_trained(mode):
    model = quantized(mode)
    before = predict(model)
    kernels = [ops.convert_to_numpy(x).copy() for x in model.weights]
    norms = [
        float(np.linalg.norm(ops.convert_to_numpy(layer.kernel)))
        for layer in create().layers
        if hasattr(layer, "kernel")
    ]
    model.enable_geolora(rank=3, seed=0)
    np.testing.assert_array_equal(predict(model), before)
    layers = adapted_layers(model)
    assert len(layers) == 3
    for layer, norm in zip(layers.values(), norms, strict=True):
        assert 0.7 * norm < layer.adapter.kernel_norm() < 1.4 * norm
    history = losses(model)
    assert history[-1] < 0.7 * history[0]
    after = predict(model)
    with model.geolora_disabled():
        np.testing.assert_array_equal(predict(model), before)
    with pytest.raises(ValueError, match="quantization_mode='int"):
        model.merge_geolora()
    np.testing.assert_array_equal(predict(model), after)
    model.remove_geolora()
    for old, new in zip(kernels, model.weights, strict=True):
        np.testing.assert_array_equal(old, ops.convert_to_numpy(new))


class Block(keras.layers.Layer):
    """What calibration wants: layers between an embedding and a head."""

    def __init__(self):
        super().__init__()
        self.up = keras.layers.Dense(8, activation="relu")
        self.down = keras.layers.EinsumDense(
            "abc,cd->abd", (None, 8), bias_axes="d"
        )

    def call(self, x):
        return x + self.down(self.up(x))


@pytest.mark.parametrize("mode", ["gptq", "awq"])
def test_a_calibrated_base_is_adapted_and_trained(mode):
    keras.utils.set_random_seed(0)
    embedding, block = keras.layers.Embedding(30, 8), Block()
    model = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            embedding,
            block,
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(8, name="head"),
        ]
    )
    ids, y = tokens(), Y[:32]
    config = {"gptq": "GPTQConfig", "awq": "AWQConfig"}[mode]
    config = getattr(keras.quantizers, config)(
        dataset=[row[None].astype("int32") for row in ids],
        tokenizer=lambda text: text,
        num_samples=8,
        sequence_length=5,
        group_size=4,
        quantization_layer_structure={
            "pre_block_layers": [embedding],
            "sequential_blocks": [block],
        },
    )
    model.quantize(mode, config=config)
    before = predict(model, ids)
    model.enable_geolora(rank=3, seed=0)
    np.testing.assert_array_equal(predict(model, ids), before)
    assert block.up.quantization_mode == block.down.quantization_mode == mode
    for layer in (block.up, block.down):
        assert layer.adapter.kernel_norm() > 1
    history = losses(model, ids, y)
    assert history[-1] < history[0]
    assert not np.array_equal(predict(model, ids), before)
    with model.geolora_disabled():
        np.testing.assert_array_equal(predict(model, ids), before)
    with pytest.raises(ValueError, match=f"quantization_mode='{mode}'"):
        model.merge_geolora()


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("mode", [None, "int8", "int4", "bfloat16"])
def test_reversible_embeddings_are_adapted_in_both_directions(
    mode, tie_weights
):
    policy = mode if mode == "bfloat16" else "float32"
    model = language_model(policy, tie_weights)
    if mode in ("int8", "int4"):
        model.quantize(mode)
    ids = tokens()
    before = predict(model, ids)
    model.enable_geolora(rank=3, targets="embedding", seed=0)
    np.testing.assert_array_equal(predict(model, ids), before)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    history = losses(model, ids, ids, loss, epochs=4, rate=0.05)
    assert history[-1] < history[0]
    with model.geolora_disabled():
        np.testing.assert_array_equal(predict(model, ids), before)
    if mode is None:
        outputs = predict(model, ids)
        model.merge_geolora()
        np.testing.assert_allclose(predict(model, ids), outputs, atol=1e-5)


def test_float8_is_refused():
    model = create()
    model.quantize("float8")
    with pytest.raises(ValueError, match="quantization_mode='float8'"):
        model.enable_geolora(rank=2)
    assert not adapted_layers(model)


def test_an_adapted_model_is_not_quantized():
    model = create()
    model.enable_geolora(rank=2)
    with pytest.raises(ValueError, match="before it is adapted"):
        model.quantize("int8")
