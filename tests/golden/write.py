"""Writes the golden files: what this version saves, for all later ones to load.

    KERAS_BACKEND=jax python tests/golden/write.py

They go to `tests/golden/VERSION/BACKEND`, which must not exist: files that a
version wrote are never written again. `tests/files/golden_test.py` loads them.
"""

import pathlib
import pickle
import sys

import keras
import numpy as np

import keras_geolora
from keras_geolora import GeoLoRA

HERE = pathlib.Path(__file__).parent
WORDS, LENGTH, ROWS = 12, 4, 8


def dense():
    x = inputs = keras.Input((6,))
    x = keras.layers.Dense(8, activation="tanh", name="one")(x)
    x = keras.layers.Dropout(0.2, seed=3)(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))


def conv():
    x = inputs = keras.Input((6, 6, 2))
    x = keras.layers.Conv2D(4, 3, activation="tanh", name="one")(x)
    x = keras.layers.Conv2D(4, 2, name="two")(x)
    x = keras.layers.Flatten()(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))


def attention():
    ids = keras.Input((LENGTH,), dtype="int32")
    table = keras.layers.ReversibleEmbedding(WORDS, 8, name="one")
    x = table(ids) + keras.layers.Embedding(WORDS, 8, name="other")(ids)
    x = keras.layers.MultiHeadAttention(2, 4, name="two")(x, x)
    return keras.Model(ids, table(x, reverse=True))


def built_with_rank():
    """Layers of this package, used as layers."""
    x = inputs = keras.Input((LENGTH, 6))
    x = keras_geolora.GeoLoRADense(8, rank=2, name="one")(x)
    x = keras_geolora.GeoLoRAEinsumDense(
        "abc,cd->abd", (LENGTH, 6), rank=2, name="two"
    )(x)
    x = keras_geolora.GeoLoRAConv1D(4, 2, rank=2, name="three")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))


def hub():
    import keras_hub

    return keras_hub.models.BertBackbone(
        vocabulary_size=WORDS,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=8,
        max_sequence_length=LENGTH,
        dropout=0.0,  # without a seed, torch draws from elsewhere
    )


KINDS = {f.__name__: f for f in (dense, conv, attention, built_with_rank, hub)}


def pretrained(kind):
    """A model of a kind, with the same values on every machine."""
    keras.utils.set_random_seed(1)
    model = KINDS[kind]()
    rng = np.random.default_rng(2)
    for variable in model.weights:
        if "adapter" in variable.path or "seed" in variable.path:
            continue
        size = 0.5 / np.sqrt(variable.shape[0])
        variable.assign(size * rng.normal(size=variable.shape))
    return model


def data(model):
    """Inputs and targets, in the structures that a model has."""
    rng = np.random.default_rng(0)

    def array(tensor):
        shape = (ROWS, *(LENGTH if n is None else n for n in tensor.shape[1:]))
        if "int" not in tensor.dtype:
            return rng.normal(size=shape).astype("float32")
        most = 2 if "segment" in tensor.name or "mask" in tensor.name else WORDS
        return rng.integers(most, size=shape).astype("int32")

    def arrays(tensors):
        if isinstance(tensors, dict):  # backends order dicts differently
            return {name: array(tensors[name]) for name in sorted(tensors)}
        return array(tensors)

    return arrays(model.input), arrays(model.output)


def train(model, epochs=1):
    x, y = data(model)
    model.fit(x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0)


def predictions(model):
    """What a model answers, as a list of arrays."""
    answers = model.predict(data(model)[0], verbose=0)
    if isinstance(answers, dict):
        return [answers[name] for name in sorted(answers)]
    return [answers]


def adapted(kind):
    """A model of a kind that trains, and has trained a little."""
    model = pretrained(kind)
    options = {"rank": 2, "targets": "all-linear" if kind == "hub" else "all"}
    if kind in ("dense", "conv"):
        options |= {"exclude": "head", "modules_to_save": "head"}
    if kind != "built_with_rank":
        model.enable_geolora(**options)
    inner, budget = keras.optimizers.AdamW(1e-2), None
    if kind == "attention":
        inner, budget = keras.optimizers.SGD(0.05, momentum=0.9), 12
    model.compile(GeoLoRA(inner, rank_budget=budget), loss="mse")
    train(model, epochs=3)
    return model


def write(folder):
    expected = {}

    def note(name, model):
        for number, answer in enumerate(predictions(model)):
            expected[f"{name}/{number}"] = answer

    for kind in KINDS:
        model = adapted(kind)
        if kind == "dense":  # a second adapter, and one that rests
            model.enable_geolora(
                rank=3, exclude="head", modules_to_save="head", name="second"
            )
            model.compile(GeoLoRA(keras.optimizers.Adam(1e-2)), loss="mse")
            train(model, epochs=2)
        note(kind, model)
        model.save(folder / f"{kind}.keras")
        if kind != "built_with_rank":
            model.save_geolora(folder / f"{kind}.safetensors")
        if kind == "dense":
            (folder / f"{kind}.pickle").write_bytes(pickle.dumps(model))
            model.save_weights(folder / f"{kind}.weights.h5")
        if kind == "hub":
            keras_geolora.export_peft(model, folder / "peft", prefix="")
        train(model)
        note(f"{kind}, trained on", model)

    model = pretrained("dense")
    model.quantize("int8", filters=["one"])
    model.enable_geolora(rank=2, exclude="head", modules_to_save="head")
    model.compile(GeoLoRA(keras.optimizers.AdamW(1e-2)), loss="mse")
    train(model)
    note("quantized", model)
    model.save(folder / "quantized.keras")

    model = adapted("dense")
    model.merge_geolora()
    note("merged", model)
    model.save(folder / "merged.keras")
    np.savez_compressed(folder / "expected.npz", **expected)


if __name__ == "__main__":
    backend = keras.backend.backend()
    folder = HERE / keras_geolora.__version__ / backend
    if folder.exists():
        sys.exit(f"{folder} exists: what a version wrote stays as it is.")
    folder.mkdir(parents=True)
    write(folder)
