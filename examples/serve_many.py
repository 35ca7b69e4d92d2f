"""Sixteen adapters over one base, served and exchanged while clients ask.

    pip install --no-deps -r examples/requirements.txt
    pip install tensorflow-serving-api
    python examples/serve_many.py --backend jax

Fine-tunes an adapter of all-MiniLM-L6-v2 on rated movie sentences, makes
fifteen others of it, of other strengths and ranks, and exports all to one
SavedModel whose rows have an adapter each. A server in a process of its own is
asked 200 questions at once, over gRPC in TF Serving's own messages, or with
`--rest` over HTTP in TF Serving's JSON. In the middle of that one adapter is
exchanged and another one added, without exporting the base again. Every answer
is compared with the model in memory.
"""

import argparse
import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import numpy as np

QUESTIONS, THREADS, PATIENCE = 200, 32, 120


def main(args):
    """Train, export, serve, ask, and exchange adapters meanwhile."""
    # Keras reads its backend once, when it is imported.
    if args.backend:
        os.environ["KERAS_BACKEND"] = args.backend

    import keras_geolora

    model, inputs = with_sixteen_adapters(args.examples)
    folder = pathlib.Path(args.folder)
    shutil.rmtree(folder, ignore_errors=True)
    keras_geolora.export(model, folder, route=True, capacity=20, max_rank=16)
    names = model.geolora_adapters()
    before = answers(model, inputs, ["", *names])

    file = folder.parent / "new.safetensors"
    model.combine_geolora("new", {"mix_14": 0.5, "mix_2": -0.5}, rank=16)
    model.save_geolora(file)
    new = answers(model, inputs, ["new"])["new"]
    after = {**before, "new": new, "mix_3": new}

    server, ask = (start_rest if args.rest else start_grpc)(args, folder)
    swap = threading.Thread(
        target=exchange, args=[folder, {"new": file, "mix_3": file}]
    )
    seen = []

    def question(number):
        if number == QUESTIONS // 2:
            swap.start()
        row, name = number % len(before[""]), ["", *names][number % 17]
        name = "mix_3" if number % 4 == 0 else name
        one = {key: x[row : row + 1] for key, x in inputs.items()}
        found = ask({**one, "adapter": [name]})
        known = {"old": before[name][row], "new": after[name][row]}
        far = {key: np.abs(found - y).max() for key, y in known.items()}
        seen.append(min(far, key=far.get) if name == "mix_3" else "same")
        return min(far.values())

    try:
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            far = list(pool.map(question, range(QUESTIONS)))
            # The server has looked and loaded within some seconds.
            end = time.monotonic() + PATIENCE
            while seen.count("new") < 20 and time.monotonic() < end:
                more = range(len(far), len(far) + THREADS)
                far += pool.map(question, more)
        swap.join()
        one = {key: x[:1] for key, x in inputs.items()}
        far.append(np.abs(ask({**one, "adapter": ["new"]}) - new[0]).max())
    finally:
        server.terminate()
        server.wait()
    print(
        f"{len(far)} requests, {THREADS} at once, over 16 adapters and the "
        f"base: at most {max(far):.1e} from the model; the exchanged adapter "
        f"was answered {seen.count('old')} times by the old version and "
        f"{seen.count('new')} times by the new one."
    )
    if not max(far) <= 1e-5 or "new" not in seen:
        sys.exit("That is not right.")


def with_sixteen_adapters(examples):
    """Returns a classifier with adapters, and tokens to ask about."""
    import keras
    from serve_grpc import fine_tuned

    classifier, sentences = fine_tuned(examples)
    tokens = classifier.preprocessor(list(sentences))
    for i in range(15):
        weights = {"default": 1 - i / 7.3}
        classifier.combine_geolora(f"mix_{i}", weights, rank=1 + i)
    inputs = {
        name: keras.ops.convert_to_numpy(x[:40]).astype("int32")
        for name, x in tokens.items()
    }
    return classifier, inputs


def answers(model, inputs, names):
    """Returns the outputs of the model for each adapter; "" is the base."""
    found = {}
    for name in filter(None, names):
        model.activate_geolora(name)
        found[name] = outputs(model, inputs)
    if "" in names:
        with model.geolora_disabled():
            found[""] = outputs(model, inputs)
    return found


def outputs(model, inputs):
    """Returns what `predict` does, without a trace for every adapter."""
    import keras

    return keras.ops.convert_to_numpy(model(inputs, training=False))


def exchange(folder, files):
    """Writes the next version, with other adapters."""
    import keras_geolora

    keras_geolora.add_to_export(folder, files)


def start_grpc(args, folder):
    """Starts the server that speaks gRPC; returns it and how to ask it."""
    import serve_grpc

    server, ask = serve_grpc.start(folder)
    return server, lambda inputs: ask(inputs)[1]["logits"][0]


def start_rest(args, folder):
    """Starts the server that speaks REST; returns it and how to ask it."""
    import serve_rest

    port = serve_rest.free_port()
    python = serve_rest.python_of(args.environment)
    server = subprocess.Popen(
        [str(python), str(serve_rest.SERVER), str(folder)]
        + [f"--model_name={folder.name}", f"--http_port={port}"],
        env=dict(os.environ, CUDA_VISIBLE_DEVICES="-1"),
    )
    address = f"http://127.0.0.1:{port}/v1/models/{folder.name}"
    serve_rest.wait_for(server, address)
    print(f"POST {address}:predict")

    def ask(inputs):
        row = {name: np.asarray(x)[0].tolist() for name, x in inputs.items()}
        return np.array(serve_rest.ask(address, row))

    return server, ask


def parse_args():
    """Read the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["tensorflow", "jax", "torch"])
    parser.add_argument("--examples", type=int, default=320)
    parser.add_argument("--folder", default="serving/many")
    parser.add_argument("--rest", action="store_true")
    parser.add_argument("--environment", default=".nox/kserve")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
