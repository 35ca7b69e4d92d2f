"""From training to the answer of a server: train, export, serve, ask.

    pip install --no-deps -r examples/requirements.txt
    pip install tensorflow-serving-api
    python examples/serve_grpc.py --backend jax

Fine-tunes all-MiniLM-L6-v2 on rated movie sentences for a moment, writes a
SavedModel with its parity report, starts a server in a process of its own, and
asks it over gRPC, in TF Serving's own messages: one question at a time, and
200 at once. Raw strings go in where tensorflow-text is installed.
"""

import argparse
import concurrent.futures
import os
import pathlib
import subprocess
import sys

import assets
import numpy as np

SERVER = pathlib.Path(__file__).with_name("savedmodel_server.py")


def main(args):
    """Train, export, serve, ask."""
    # Keras reads its backend once, when it is imported.
    if args.backend:
        os.environ["KERAS_BACKEND"] = args.backend

    import keras_geolora

    classifier, sentences = fine_tuned(args.examples)
    folder = pathlib.Path(args.folder)
    keras_geolora.export(classifier, folder, preprocess=True)

    questions = sentences[: args.requests]
    expected = classifier.predict(questions, verbose=0)
    server, ask = start(folder)
    try:
        for sentence in questions[:3]:
            logits = ask({"text": [sentence]})[1]["logits"][0]
            praise = 1 / (1 + np.exp(logits[0] - logits[1]))
            print(f"  {praise:4.0%}  {sentence}")
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            found = pool.map(lambda text: ask({"text": [text]}), questions)
            answers = [outputs["logits"][0] for _, outputs in found]
    finally:
        server.terminate()
        server.wait()
    difference = np.abs(np.array(answers) - expected).max()
    print(
        f"{len(answers)} requests at once: at most {difference:.1e} from "
        "`classifier.predict`."
    )
    if not difference <= 1e-5:
        sys.exit("That is too far.")


def fine_tuned(examples):
    """Returns a MiniLM that learned from movie sentences, and those."""
    import keras
    import keras_hub

    import keras_geolora  # noqa: F401  adds the methods to `keras.Model`
    from keras_geolora import GeoLoRA

    keras.utils.set_random_seed(0)
    preset = assets.minilm_folder()
    sentences, liked = assets.movie_sentences(seed=0)
    sentences = np.array(sentences[:examples])
    classifier = keras_hub.models.TextClassifier.from_preset(
        preset,
        num_classes=2,
        preprocessor=keras_hub.models.BertTextClassifierPreprocessor(
            keras_hub.tokenizers.BertTokenizer.from_preset(preset),
            sequence_length=40,
        ),
    )
    classifier.enable_geolora(rank=8)
    classifier.compile(
        optimizer=GeoLoRA(keras.optimizers.AdamW(1e-3)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    classifier.fit(sentences, liked[:examples], batch_size=32)
    return classifier, sentences


def start(folder):
    """Starts a server for a folder; returns it and a `client` of it."""
    server = subprocess.Popen(
        [sys.executable, str(SERVER), str(folder), "--port", "0"],
        env=dict(os.environ, CUDA_VISIBLE_DEVICES="-1"),
        stdout=subprocess.PIPE,
        text=True,
    )
    line = server.stdout.readline()
    if not line:
        sys.exit(f"The server ended with status {server.wait()}.")
    print(f"\n{line.rstrip()}")
    address = f"127.0.0.1:{line.rsplit(':')[-1].strip()}"
    return server, client(address, folder.name)


def client(address, model):
    """Returns a function that asks a server of TF Serving's kind.

    It takes the inputs by name, and returns the version that answered and the
    outputs by name.
    """
    import grpc
    import tensorflow as tf
    from tensorflow_serving.apis import (
        predict_pb2,
        prediction_service_pb2_grpc,
    )

    channel = grpc.insecure_channel(address)
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)

    def ask(inputs):
        request = predict_pb2.PredictRequest()
        request.model_spec.name = model
        for name, x in inputs.items():
            request.inputs[name].CopyFrom(tf.make_tensor_proto(x))
        response = stub.Predict(request, timeout=60)
        outputs = response.outputs.items()
        return (
            response.model_spec.version.value,
            {name: tf.make_ndarray(x) for name, x in outputs},
        )

    return ask


def parse_args():
    """Read the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["tensorflow", "jax", "torch"])
    parser.add_argument("--examples", type=int, default=320)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--folder", default="serving/movies")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
