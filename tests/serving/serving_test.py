"""A fine-tuned MiniLM, served: C++ without Python, gRPC, raw strings."""

import concurrent.futures
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import real_sentences
import serving
from real_sentences import create

import keras_geolora
from keras_geolora import GeoLoRA

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))

pytestmark = pytest.mark.slow("trains and exports the real model")
# Whatever Keras runs on, a process with TensorFlow writes the SavedModel. The
# tests of its answers compare it with the model of every backend.
written_by_tensorflow = pytest.mark.backend_independent(
    "another runtime reads what TensorFlow has written"
)


@pytest.fixture(scope="module")
def data():
    return real_sentences.load()


@pytest.fixture(scope="module")
def served(data, tmp_path_factory, forked):
    """A folder with two versions: tokens in, strings in; and answers."""
    preset, texts, liked = data
    keras.utils.set_random_seed(0)
    classifier = create(preset)
    classifier.enable_geolora(rank=4)
    classifier.compile(
        GeoLoRA(keras.optimizers.AdamW(1e-3)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    classifier.fit(texts, liked, batch_size=32, verbose=0)
    folder = tmp_path_factory.mktemp("serving") / "movies"
    tokens = keras_geolora.export(
        classifier, folder, samples=texts[:4], verbose=False
    )
    strings = keras_geolora.export(
        classifier, folder, preprocess=True, baseline=False, verbose=False
    )
    inputs = {
        name: keras.ops.convert_to_numpy(x).astype("int32")
        for name, x in classifier.preprocessor(list(texts[:4])).items()
    }
    logits = classifier.predict(texts, verbose=0)
    return folder, tokens, strings, inputs, logits


def test_the_report_compares_with_the_base_model(served):
    _, tokens, strings, _, _ = served
    assert tokens["same_operations"]
    assert tokens["bytes"] < 1.01 * tokens["base"]["bytes"]
    for report in (tokens, strings):
        (entry,) = report["signatures"].values()
        assert entry["max_difference"] < 1e-5
    assert set(entry["inputs"]) == {"text"}


def test_strings_are_answered_as_by_the_task(served, data):
    folder, _, strings, _, logits = served
    assert strings["version"] == 2
    _, texts, _ = data
    found = serving.load(folder / "2")({"text": list(texts)})["logits"]
    np.testing.assert_allclose(found, logits, atol=1e-5)


@written_by_tensorflow
def test_the_cpp_runtime_answers_without_python(served, tmp_path):
    folder, _, _, inputs, logits = served
    program = serving.compiled_program(tmp_path)
    names_in, (operation, index) = serving.places(folder / "1", "logits")
    words = [
        f"{names_in[name][0]}={','.join(map(str, x[0]))}"
        for name, x in inputs.items()
    ]
    run = subprocess.run(
        [str(program), str(folder / "1"), operation, index, *words],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found = np.array(run.stdout.split(), dtype="float32")
    np.testing.assert_allclose(found, logits[0], atol=1e-5)


@written_by_tensorflow
def test_200_requests_at_once_are_answered_over_grpc(served, data):
    import grpc
    import savedmodel_server
    import serve_grpc

    folder, _, _, _, logits = served
    texts = np.resize(data[1], 200)
    server, port = savedmodel_server.serve(folder)
    try:
        ask = serve_grpc.client(f"127.0.0.1:{port}", folder.name)
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            found = list(pool.map(lambda text: ask({"text": [text]}), texts))
        found = [outputs["logits"][0] for _, outputs in found]
        np.testing.assert_allclose(
            found, np.resize(logits, (200, 2)), atol=1e-5
        )
        lost = serve_grpc.client(f"127.0.0.1:{port}", "other")
        with pytest.raises(grpc.RpcError, match="Servable not found: other"):
            lost({"text": ["text"]})
    finally:
        server.stop(None).wait()
