"""Every backbone of KerasHub is adapted, trained and merged."""

import time

import families
import keras
import numpy as np
import pytest
from keras import ops

import keras_geolora  # noqa: F401  adds the methods to `keras.Model`
from keras_geolora import GeoLoRA
from keras_geolora.layers.factor import factor_of
from keras_geolora.layers.registry import refusal
from keras_geolora.layers.tree import adapted_layers, walk
from keras_geolora.layers.weight import weights_in
from keras_geolora.viewing.reach import Reach

# A choice of kinds; the whole sweep of a compiling backend takes half an hour.
# Such a backend compiles every layer and every shape: it gets fewer.
SHORT = dict(num_layers=1)
SQUARE = SHORT | dict(intermediate_dim=16)
TWO_STAGES = dict(
    stackwise_num_filters=[64, 8],
    stackwise_num_blocks=[1, 1],
    stackwise_num_strides=[1, 2],
)
CHOICE = {
    "BertBackbone": SQUARE,  # Dense and EinsumDense
    "GemmaBackbone": SHORT,  # decoder, reversible embedding
    "GPTNeoXBackbone": SQUARE,  # `enable_lora` of KerasHub finds nothing in it
    "ResNetBackbone": TWO_STAGES,  # convolutions
    "MobileNetBackbone": {},  # depthwise convolutions
    "T5Backbone": SQUARE,  # encoder and decoder
    "WhisperBackbone": SQUARE,  # audio
}
COMPILES = keras.backend.backend() != "torch"


def scored(backbone):
    """A model of a backbone that gives one number for every example."""
    rng = np.random.default_rng(1)
    scores = []
    for output in keras.tree.flatten(backbone.output):
        batched = output.shape and output.shape[0] is None
        if batched and keras.backend.is_float_dtype(output.dtype):
            # Normalized outputs have no loss in their size, but in a sum
            # with weights.
            w = rng.normal(size=(output.shape[-1] or 1,)).astype("float32")
            x = ops.cast(output, "float32") * w
            scores.append(ops.mean(x, axis=tuple(range(1, len(x.shape)))))
    # Some outputs have one row for the whole batch.
    scores = [score + 0.0 * sum(scores) for score in scores]
    return keras.Model(backbone.input, ops.stack(scores, axis=1))


def predict(model, inputs):
    return np.array(model.predict(inputs, batch_size=2, verbose=0))


def examine(name, targets="all", **changes):
    """Adapts, trains and merges a tiny backbone; returns what was seen."""
    start = time.perf_counter()
    keras.utils.set_random_seed(0)
    backbone, inputs = families.build(name, **changes)
    model = scored(backbone)
    model.compile(jit_compile=False)
    # torch may take other kernels for weights that train.
    backbone.trainable = False
    before = predict(model, inputs)
    backbone.trainable = True
    assert np.isfinite(before).all()
    backbone.enable_geolora(rank=1, targets=targets, seed=0)
    model.compile(jit_compile=False)  # it does not know of the change
    np.testing.assert_array_equal(predict(model, inputs), before)
    left_out = {
        type(layer).__name__
        for _, layer in walk(backbone)
        if refusal(layer) is not None
        and hasattr(layer, "kernel")
        and not weights_in(layer)
    }
    reach = Reach.of(backbone)
    vectors = {v.path for v in backbone.weights if is_vector(v)}
    layers = adapted_layers(backbone)
    values = [np.array(ops.convert_to_numpy(v)) for v in model.weights]

    optimizer = GeoLoRA(keras.optimizers.Adam(1e-3), max_update_ratio=None)
    model.compile(optimizer, loss="mse", jit_compile=False)
    target = before + np.sign(
        np.random.default_rng(2).normal(size=before.shape)
    )
    loss = np.mean((before - target) ** 2)
    model.fit(inputs, target, batch_size=2, epochs=3, verbose=0)
    after = predict(model, inputs)
    assert np.mean((after - target) ** 2) < loss

    for variable, value in zip(model.weights, values, strict=True):
        if factor_of(variable) is None:
            same = np.array_equal(ops.convert_to_numpy(variable), value)
            assert same, variable.path
    cores = [ops.convert_to_numpy(layer.adapter.S) for layer in layers.values()]
    row = {
        "family": name.removesuffix("Backbone"),
        "layers": len(layers),
        "moved": sum(bool(core.any()) for core in cores),
        "left out": ", ".join(sorted(left_out)),
        "parameters": sum(
            int(layer.adapter.ranks.sum()) * sum(layer.kernel_view.matrix_shape)
            for layer in layers.values()
        ),
        "of": reach.total,
        "out of reach": reach.share,
        "matrices out of reach": {
            path: size / reach.total
            for path, size in reach.left.items()
            if path not in vectors
        },
        "ranks": f"{min(x.rank for x in layers.values())} to "
        f"{max(x.rank for x in layers.values())}",
    }
    backbone.merge_geolora()
    model.compile(jit_compile=False)
    merged = predict(model, inputs)
    np.testing.assert_allclose(
        merged, after, atol=1e-3 * max(1.0, np.abs(after).max())
    )
    assert not adapted_layers(backbone)
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def is_vector(variable):
    """Whether a variable is a bias, a scale or the like, and no matrix."""
    long = sum(size > 1 for size in variable.shape)
    return long < 2 or variable.path.endswith("bias")


def names():
    if COMPILES:
        return list(CHOICE)
    rare = pytest.mark.slow("its kinds of layers are those of others, too")
    return [
        pytest.param(name, marks=() if name in CHOICE else rare)
        for name in families.names()
    ]


@pytest.mark.filterwarnings("ignore")  # those of KerasHub's own code
@pytest.mark.parametrize("name", names())
def test_a_family_is_adapted_trained_and_merged(name):
    if name.startswith("SAM3") and keras.backend.backend() == "torch":
        pytest.skip("KerasHub calls `torchvision`, which is not installed")
    row = examine(name, **CHOICE[name] if COMPILES else {})
    assert row["moved"] > 0
