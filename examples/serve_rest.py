"""From training to the answer of a server that speaks TF Serving's REST.

    pip install --no-deps -r examples/requirements.txt
    python examples/serve_rest.py --backend torch

Fine-tunes all-MiniLM-L6-v2 on rated movie sentences for a moment, exports a
SavedModel of tokens, and serves it by KServe's model server, which answers
requests in TF Serving's JSON. KServe and TensorFlow go to an environment of
their own, `--environment`, because KServe wants older packages; that takes a
few minutes, once. Then 200 requests are asked at once.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
from serve_grpc import fine_tuned

SERVER = pathlib.Path(__file__).with_name("kserve_server.py")
PACKAGES = ["kserve==0.21.0", "tensorflow==2.21.0"]


def main(args):
    """Train, export, serve, ask."""
    # Keras reads its backend once, when it is imported.
    if args.backend:
        os.environ["KERAS_BACKEND"] = args.backend

    import keras

    import keras_geolora

    classifier, sentences = fine_tuned(args.examples)
    folder = pathlib.Path(args.folder)
    keras_geolora.export(classifier, folder)
    questions = sentences[: args.requests]
    expected = classifier.predict(questions, verbose=0)
    tokens = {
        name: keras.ops.convert_to_numpy(x).astype("int32")
        for name, x in classifier.preprocessor(list(questions)).items()
    }

    port = free_port()
    server = subprocess.Popen(
        [str(python_of(args.environment)), str(SERVER), str(folder)]
        + [f"--model_name={folder.name}", f"--http_port={port}"],
        env=dict(os.environ, CUDA_VISIBLE_DEVICES="-1"),
    )
    try:
        address = f"http://127.0.0.1:{port}/v1/models/{folder.name}"
        wait_for(server, address)
        print(f"\nPOST {address}:predict")
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            rows = [
                {name: x[i].tolist() for name, x in tokens.items()}
                for i in range(len(questions))
            ]
            answers = list(pool.map(lambda row: ask(address, row), rows))
    finally:
        server.terminate()
        server.wait()
    for logits, sentence in zip(answers[:3], questions[:3], strict=True):
        praise = 1 / (1 + np.exp(logits[0] - logits[1]))
        print(f"  {praise:4.0%}  {sentence}")
    difference = np.abs(np.array(answers) - expected).max()
    print(
        f"{len(answers)} requests at once: at most {difference:.1e} from "
        "`classifier.predict`."
    )
    if not difference <= 1e-5:
        sys.exit("That is too far.")


def ask(address, row):
    """Asks for one row, in TF Serving's JSON; returns its logits."""
    body = json.dumps({"instances": [row]}).encode()
    request = urllib.request.Request(
        f"{address}:predict", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["predictions"][0]


def python_of(environment):
    """Returns the Python of an environment with KServe, made if need be."""
    environment = pathlib.Path(environment)
    done = environment / "installed.txt"
    wanted = "\n".join(PACKAGES)
    python = environment / "bin" / "python"
    if not done.exists() or done.read_text() != wanted:
        print(f"Installing {', '.join(PACKAGES)} to {environment}")
        subprocess.run(
            [sys.executable, "-m", "venv", str(environment)], check=True
        )
        pip = [str(python), "-m", "pip", "install", "-q"]
        # Older ones take very long to find versions that go together.
        subprocess.run([*pip, "--upgrade", "pip"], check=True)
        subprocess.run([*pip, *PACKAGES], check=True)
        done.write_text(wanted)
    return python


def free_port():
    """Returns a port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(server, address, seconds=180):
    """Waits until the server is ready."""
    for _ in range(seconds):
        if server.poll() is not None:
            sys.exit(f"The server ended with status {server.returncode}.")
        try:
            with urllib.request.urlopen(address, timeout=5) as response:
                if json.load(response).get("ready"):
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(1)
    sys.exit(f"The server was not ready after {seconds} seconds.")


def parse_args():
    """Read the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["tensorflow", "jax", "torch"])
    parser.add_argument("--examples", type=int, default=320)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--folder", default="serving/movies")
    parser.add_argument("--environment", default=".nox/kserve")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
