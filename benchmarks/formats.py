"""Which formats of `model.export` a merged model reaches, and how exactly.

    KERAS_BACKEND=jax python benchmarks/formats.py

Exports a one-layer BERT classifier, adapted, trained a step and merged, in
every format of Keras, by plain `model.export` with free batch and length, and
if that fails with fixed ones. Every file is run and compared with the model.
Prints one row of a Markdown table for each format. Packages that a format asks
for (`onnx`, `tf2onnx`, `onnxruntime`, `onnxscript`, `openvino`) are not
installed by this script; where one is missing the row says so.
"""

import pathlib
import tempfile

import keras
import keras_hub
import numpy as np

import keras_geolora
from keras_geolora import GeoLoRA

FORMATS = {
    "tf_saved_model": "saved",
    "onnx": "model.onnx",
    "openvino": "model.xml",
    "litert": "model.tflite",
    "torch": "model.pt2",
}


def main():
    """Prints the table."""
    model, x = merged_classifier()
    expected = model.predict(x, verbose=0)
    print(f"| format | {keras.backend.backend()} |\n|---|---|")
    for name, file in FORMATS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / file
            print(f"| `{name}` | {attempt(model, name, path, x, expected)} |")


def merged_classifier():
    """Returns a merged model and a batch of tokens."""
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=50,
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=32,
    )
    model = keras_hub.models.BertTextClassifier(
        backbone, num_classes=2, preprocessor=None
    )
    model.enable_geolora(rank=2)
    model.compile(
        GeoLoRA(keras.optimizers.Adam(1e-2)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    rng = np.random.default_rng(0)
    x = {
        "token_ids": rng.integers(50, size=(4, 8)).astype("int32"),
        "segment_ids": np.zeros((4, 8), "int32"),
        "padding_mask": np.ones((4, 8), "int32"),
    }
    model.fit(x, np.arange(4) % 2, verbose=0)
    return keras_geolora.merge_geolora(model), x


def attempt(model, name, path, x, expected):
    """Says in a few words what came of exporting."""
    fixed = {
        key: keras.InputSpec(shape=a.shape, dtype="int32", name=key)
        for key, a in x.items()
    }
    free = None
    for signature in (None, [fixed]):
        try:
            model.export(
                str(path),
                format=name,
                verbose=False,
                input_signature=signature,
            )
            answer = RUNTIMES[name](path, x)
        except Exception as error:
            free = free or reason(error)
            continue
        difference = np.abs(np.asarray(answer) - expected).max()
        how = "" if signature is None else f", only with fixed sizes ({free})"
        return f"works{how}, difference {difference:.0e}"
    return f"fails: {free}"


def reason(error):
    """The first line of an error, short."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[0].strip()[:90]}"


def run_saved_model(path, x):
    """Asks the default signature of a SavedModel."""
    import tensorflow as tf

    served = tf.saved_model.load(str(path)).signatures["serving_default"]
    named = {k: tf.constant(a) for k, a in x.items()}
    (answer,) = served(**named).values()
    return answer


def run_onnx(path, x):
    """Asks onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    given = {i.name: x[i.name.split(":")[0]] for i in session.get_inputs()}
    return session.run(None, given)[0]


def run_openvino(path, x):
    """Asks OpenVINO on the CPU."""
    import openvino

    compiled = openvino.compile_model(str(path), "CPU")
    given = {i: x[i.any_name.split(":")[0]] for i in compiled.inputs}
    return list(compiled(given).values())[0]


def run_litert(path, x):
    """Asks the interpreter that comes with TensorFlow."""
    import tensorflow as tf

    interpreter = tf.lite.Interpreter(model_path=str(path))
    runner = interpreter.get_signature_runner()
    (answer,) = runner(**x).values()
    return answer


def run_torch(path, x):
    """Asks the program that `torch.export` wrote."""
    import torch

    program = torch.export.load(str(path)).module()
    return program({k: torch.tensor(a) for k, a in x.items()}).detach()


RUNTIMES = {
    "tf_saved_model": run_saved_model,
    "onnx": run_onnx,
    "openvino": run_openvino,
    "litert": run_litert,
    "torch": run_torch,
}

if __name__ == "__main__":
    main()
