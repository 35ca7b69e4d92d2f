"""SavedModels that take the name of an adapter for every row."""

import concurrent.futures
import json
import pathlib
import shutil
import subprocess
import sys
import threading

import keras
import numpy as np
import pytest
import serving
import tensorflow as tf
from moving import move

import keras_geolora
from keras_geolora.layers.tree import adapted_layers

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))

pytestmark = pytest.mark.usefixtures("forked")
# Whatever Keras runs on, a process with TensorFlow writes the SavedModel. The
# tests of its answers compare it with the model of every backend.
written_by_tensorflow = pytest.mark.backend_independent(
    "another runtime reads what TensorFlow has written"
)
NAMES = [f"a{i}" for i in range(16)]


def pretrained():
    """A network of words and numbers, with a head that trains."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((4,), dtype="int32", name="words"),
            keras.layers.Embedding(20, 8),
            keras.layers.Dense(8, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dense(3, name="scores"),
        ]
    )


def add_adapter(model, name, rank, strength):
    model.enable_geolora(
        rank=rank,
        max_rank=rank,
        name=name,
        targets="all",
        exclude="scores",
        modules_to_save="scores",
        train_bias=True,
    )
    move(model)
    # `move` draws the same numbers every time.
    for layer in adapted_layers(model).values():
        S = layer.adapter.S
        S.assign(strength * np.array(keras.ops.convert_to_numpy(S)))


def outputs(model, words):
    """Returns what `predict` does, without a trace for every adapter."""
    return keras.ops.convert_to_numpy(model(words, training=False))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder with one version for 16 adapters, and answers of the model."""
    model = pretrained()
    for i, name in enumerate(NAMES):
        add_adapter(model, name, rank=1 + i % 4, strength=0.5 + i / 8)
    words = np.random.default_rng(0).integers(20, size=(8, 4)).astype("int32")
    answers = {}
    for name in NAMES:
        model.activate_geolora(name)
        answers[name] = outputs(model, words)
    with model.geolora_disabled():
        answers[""] = outputs(model, words)
    folder = tmp_path_factory.mktemp("serving") / "words"
    report = keras_geolora.export(
        model, folder, route=True, capacity=18, max_rank=6, verbose=False
    )
    files = folder.parent / "files"
    files.mkdir()
    for name in NAMES[:2]:
        model.save_geolora(files / name, name=name)
    return folder, report, model, words, answers, files


def new_adapter(words, file):
    """Trains an adapter elsewhere; returns its answers and writes its file."""
    other = pretrained()
    add_adapter(other, "elsewhere", rank=5, strength=-2)
    other.save_geolora(file)
    return outputs(other, words)


@pytest.fixture(scope="module")
def copied(served, tmp_path_factory):
    """A copy of the folder, with an adapter added and one exchanged."""
    folder, _, _, words, answers, files = served
    copy = tmp_path_factory.mktemp("later") / "words"
    shutil.copytree(folder, copy)
    answers = dict(answers)
    answers["new"] = new_adapter(words, files / "new")
    answers["a3"] = answers["a1"]
    del answers["a5"]
    report = keras_geolora.add_to_export(
        copy,
        {"new": files / "new", "a3": files / "a1"},
        remove=["a5"],
        verbose=False,
    )
    return copy, report, words, answers


def mixed(words, answers, start=0):
    """Returns inputs with an adapter in every row, and expected outputs."""
    names = sorted(answers)
    mix = [names[(start + i) % len(names)] for i in range(len(words))]
    expected = np.stack([answers[name][i] for i, name in enumerate(mix)])
    return {"words": words, "adapter": mix}, expected


def check(folder, words, answers):
    ask = serving.load(folder)
    for start in range(len(answers)):
        inputs, expected = mixed(words, answers, start)
        np.testing.assert_allclose(ask(inputs)["scores"], expected, atol=1e-5)


def test_every_row_is_answered_as_by_its_adapter(served):
    folder, report, _, words, answers, _ = served
    check(folder / "1", words, answers)
    effects = [np.abs(y - answers[""]).max() for y in answers.values()]
    assert sorted(effects)[1] > 1e-2
    assert np.abs(answers["a0"] - answers["a1"]).max() > 1e-2
    assert report["form"] == "by row"
    entry = report["signatures"]["serving_default"]
    assert sorted(entry["adapters"]) == sorted(NAMES)
    assert entry["capacity"] == 18
    assert entry["inputs"]["adapter"] == {"shape": [None], "dtype": "string"}
    assert entry["max_difference"] < 1e-5
    assert entry["milliseconds"] > 0


def test_one_copy_of_the_base_is_stored(served):
    folder, _, model, _, _, _ = served
    values = serving.number_of_values(folder / "1")
    with model.geolora_disabled():
        base = sum(int(np.prod(v.shape)) for v in pretrained().variables)
    # Each place holds two factors for a layer, its bias, and the head.
    kernels = [(20, 8), (8, 8), (32, 8)]
    place = sum(6 * (rows + columns) for rows, columns in kernels)
    place += 8 + 8 + 8 * 3 + 3
    names = 1
    seeds = values - base - 19 * (place + names)
    assert 0 <= seeds < 19  # and states of dropouts, two numbers each


def test_an_unknown_name_is_an_error_that_lists_the_adapters(served):
    folder, _, _, words, _, _ = served
    ask = serving.load(folder / "1")
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        ask({"words": words[:2], "adapter": ["a1", "french"]})
    assert "Received:] [french] [The adapters are:] [" in str(caught.value)
    for name in NAMES:
        assert name in str(caught.value).partition("adapters are")[2]
    with pytest.raises(tf.errors.InvalidArgumentError, match="/"):
        ask({"words": words[:1], "adapter": ["/"]})  # that of a free place


def test_one_name_stands_for_all_rows(served):
    folder, _, _, words, answers, _ = served
    ask = serving.load(folder / "1")
    found = ask({"words": words, "adapter": ["a2"]})["scores"]
    np.testing.assert_allclose(found, answers["a2"], atol=1e-5)


def test_adapters_are_added_exchanged_and_removed(served, copied):
    copy, report, words, answers = copied
    assert report["version"] == 2 and report["from_version"] == 1
    check(copy / "2", words, answers)
    check(copy / "1", words, served[4])  # which is as it was
    ask = serving.load(copy / "2")
    with pytest.raises(tf.errors.InvalidArgumentError, match="a5"):
        ask({"words": words, "adapter": ["a5"] * 8})
    assert json.loads((copy / "2" / "geolora_report.json").read_text()) == (
        report
    )
    assert "max_difference" not in report["signatures"]["serving_default"]


def test_versions_share_the_weights_of_the_base_on_the_disk(copied):
    copy, report, _, _ = copied
    for file in (
        "saved_model.pb",
        "variables/variables.data-00000-of-00002",
    ):
        assert (copy / "1" / file).samefile(copy / "2" / file)
    assert report["new_bytes"] < 0.5 * report["bytes"]
    shutil.rmtree(copy / "1")
    check(copy / "2", copied[2], copied[3])


def test_what_cannot_be_added_leaves_nothing_behind(served, tmp_path):
    folder, _, _, _, _, files = served
    a0 = files / "a0"
    with pytest.raises(ValueError, match="All places are taken"):
        keras_geolora.add_to_export(folder, {"x": a0, "y": a0, "z": a0})
    with pytest.raises(ValueError, match="name='french'"):
        keras_geolora.add_to_export(folder, remove=["french"])
    with pytest.raises(ValueError, match="Received: adapters={}"):
        keras_geolora.add_to_export(folder)
    with pytest.raises(ValueError, match="name='a/b'"):
        keras_geolora.add_to_export(folder, {"a/b": a0})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        keras_geolora.add_to_export(folder, {"x": folder / "nowhere"})
    with pytest.raises(FileNotFoundError, match="no places for adapters"):
        keras_geolora.add_to_export(tmp_path, {"x": a0})
    assert [x.name for x in folder.iterdir()] == ["1"]


def test_options_of_routes_are_checked(tmp_path):
    model = pretrained()
    model.enable_geolora(rank=1)
    with pytest.raises(ValueError, match="route=False, capacity=3"):
        keras_geolora.export(model, tmp_path, capacity=3)
    with pytest.raises(ValueError, match="max_rank=0|`max_rank` must lie"):
        keras_geolora.export(model, tmp_path, route=True, max_rank=0)
    inputs = keras.Input((4,), name="adapter")
    model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    model.enable_geolora(rank=1)
    with pytest.raises(ValueError, match=r"with inputs \['adapter'\]"):
        keras_geolora.export(model, tmp_path, route=True)
    assert not list(tmp_path.iterdir())


@written_by_tensorflow
def test_the_cpp_runtime_takes_the_name_of_an_adapter(copied, tmp_path):
    copy, _, words, answers = copied
    program = serving.compiled_program(tmp_path)
    inputs, (operation, index) = serving.places(copy / "2", "scores")
    for name in ("new", ""):
        run = subprocess.run(
            [
                str(program),
                str(copy / "2"),
                operation,
                index,
                f"{inputs['words'][0]}={','.join(map(str, words[0]))}",
                f"{inputs['adapter'][0]}=@{name}",
            ],
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        found = np.array(run.stdout.split(), dtype="float32")
        np.testing.assert_allclose(found, answers[name][0], atol=1e-5)
    run = subprocess.run(
        [*run.args[:-1], f"{inputs['adapter'][0]}=@french"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and "[french]" in run.stderr


@written_by_tensorflow
def test_200_requests_during_a_swap_are_all_answered_right(
    served, copied, tmp_path
):
    import savedmodel_server
    import serve_grpc

    folder, _, _, words, before, files = served
    _, _, _, after = copied
    shutil.copytree(folder, tmp_path / "words")
    folder = tmp_path / "words"
    server, port = savedmodel_server.serve(
        folder, threads=16, poll_seconds=0.05
    )
    swapped = threading.Event()

    def ask(number):
        if number == 100:
            keras_geolora.add_to_export(
                folder,
                {"new": files / "new", "a3": files / "a1"},
                remove=["a5"],
                verbose=False,
            )
            swapped.set()
        # Ask for what is there in both versions, and differs for one name.
        name = "a3" if number % 3 == 0 else f"a{6 + number % 10}"
        row = number % len(words)
        inputs = {"words": words[row : row + 1], "adapter": [name]}
        version, outputs = client(inputs)
        expected = {1: before, 2: after}[version][name][row]
        np.testing.assert_allclose(outputs["scores"][0], expected, atol=1e-5)
        return version

    try:
        client = serve_grpc.client(f"127.0.0.1:{port}", folder.name)
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            versions = list(pool.map(ask, range(200)))
        assert swapped.is_set()
        while 2 not in versions:  # as soon as the server has looked
            versions.append(ask(3))
        inputs = {"words": words[:1], "adapter": ["new"]}
        _, outputs = client(inputs)
        np.testing.assert_allclose(
            outputs["scores"][0], after["new"][0], atol=1e-5
        )
        with pytest.raises(Exception, match="a5"):
            client({"words": words[:1], "adapter": ["a5"]})
    finally:
        server.stop(None).wait()
    assert set(versions) == {1, 2}
