"""SavedModels: the same from every backend, whole, and with equal answers."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import serving
import small_models
from moving import move

import keras_geolora
from keras_geolora import GeoLoRA
from keras_geolora import export as public_export
from keras_geolora.serving.signature import Signature, answers

ROOT = pathlib.Path(__file__).parents[2]
# The functions of the module, which the public function hides.
export_module = sys.modules["keras_geolora.serving.export"]
ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
PYTHON = sys.executable  # no fork: what it imports is looked at

pytestmark = pytest.mark.usefixtures("forked")


def tokens(rows, length, seed=0):
    return small_models.tokens(rows, length, np.random.default_rng(seed))


def train(model):
    model.compile(
        GeoLoRA(keras.optimizers.Adam(1e-2)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(tokens(16, 8), np.arange(16) % 2, verbose=0)


@pytest.fixture(scope="module")
def classifier():
    """A tiny classifier with two adapters, of which "one" is active."""
    model = small_models.classifier()
    model.enable_geolora(rank=2, name="two")
    move(model)
    model.enable_geolora(rank=2, name="one")
    train(model)
    return model


@pytest.fixture(scope="module")
def exported(classifier, tmp_path_factory):
    """The classifier in `path`, with what was there before and the report."""
    path = tmp_path_factory.mktemp("serving") / "classifier"
    before = [keras.ops.convert_to_numpy(v) for v in classifier.weights]
    report = keras_geolora.export(classifier, path, verbose=False)
    return path, before, report


def test_the_graph_is_that_of_the_base_model(exported):
    _, _, report = exported
    assert report["form"] == "merged"
    found = report["signatures"]["serving_default"]["operations"]
    assert found == report["base"]["operations"]
    assert report["same_operations"]
    # A look of our own: one product for each of the layers that have one.
    products = found["MatMul"] + found["Einsum"] + found["BatchMatMulV2"]
    assert products == 8 + 2  # kernels, and attention


def test_the_model_in_memory_stays_as_it_is(exported, classifier):
    _, before, _ = exported
    for value, variable in zip(before, classifier.weights, strict=True):
        now = keras.ops.convert_to_numpy(variable)
        np.testing.assert_array_equal(now, value)
    assert classifier.geolora_adapters()[0] == "one"
    assert classifier.backbone.transformer_layers[0].trainable_variables


def test_answers_are_equal_for_batches_and_lengths_of_any_size(
    exported, classifier
):
    path, _, report = exported
    served = serving.load(path / "1")
    for rows, length in ((1, 3), (5, 8), (2, 32)):
        x = tokens(rows, length, seed=rows)
        expected = classifier.predict(x, verbose=0)
        found = served(x)["logits"]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    entry = report["signatures"]["serving_default"]
    assert set(entry["inputs"]) == set(tokens(1, 1))
    assert entry["inputs"]["token_ids"]["shape"] == [None, None]
    assert entry["max_difference"] <= 1e-5


def test_the_report_is_beside_the_model(exported):
    path, _, report = exported
    assert report["path"] == str(path / "1")
    assert json.loads((path / "1" / "geolora_report.json").read_text()) == (
        report
    )
    assert report["bytes"] > 10_000 and report["base"]["bytes"] > 10_000
    assert report["signatures"]["serving_default"]["milliseconds"] > 0
    assert report["base"]["milliseconds"] > 0
    lines = "\n".join(export_module.table(report))
    assert "serving_default" in lines and "(without adapters)" in lines
    assert [x.name for x in path.iterdir()] == ["1"]  # nothing else is left


def test_adapters_share_one_copy_of_the_weights(classifier, tmp_path, exported):
    report = keras_geolora.export(
        classifier, tmp_path, adapters="all", verbose=False
    )
    assert report["form"] == "beside the kernels"
    assert list(report["signatures"]) == ["serving_default", "one", "two"]
    assert report["signatures"]["serving_default"]["adapter"] == "one"
    x = tokens(4, 8, seed=1)
    answers = {}
    for name in ("one", "two"):
        classifier.activate_geolora(name)
        answers[name] = classifier.predict(x, verbose=0)
        found = serving.load(tmp_path / "1", name)(x)["logits"]
        np.testing.assert_allclose(found, answers[name], atol=1e-5)
    classifier.activate_geolora("one")
    assert np.abs(answers["one"] - answers["two"]).max() > 1e-3
    values = serving.number_of_values(tmp_path / "1")
    one = serving.number_of_values(exported[0] / "1")
    # What belongs to one adapter comes on top of one copy of everything else.
    adaptation = classifier.geolora_adaptation
    own = 0
    for name, adapter in adaptation.adapters.items():
        own += sum(int(np.prod(v.shape)) for v in adapter.co_trained)
        for layer in adapter.layers.values():
            own += sum(x.size for x in layer.adapters_by_name()[name].trimmed())
    assert values == one + own


def test_a_merged_model_is_exported_by_keras_as_well(tmp_path):
    model = keras.Sequential(
        [keras.Input((8,), name="x"), keras.layers.Dense(4, name="head")]
    )
    model.enable_geolora(rank=2)
    with pytest.raises(ValueError, match="keras_geolora.export.*'sequential"):
        model.export(tmp_path / "refused")
    model.merge_geolora()
    x = np.random.default_rng(0).normal(size=(3, 8)).astype("float32")
    expected = model.predict(x, verbose=0)
    report = keras_geolora.export(model, tmp_path / "ours", verbose=False)
    assert "base" not in report
    found = serving.load(tmp_path / "ours" / "1")({"x": x})["head"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if not ON_TENSORFLOW:
        return  # what Keras does there is not ours to test
    model.export(tmp_path / "theirs", verbose=False)
    (found,) = serving.load(tmp_path / "theirs")({"x": x}).values()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_quantized_base_is_served_with_its_adapter_beside(tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((16,), name="x"), keras.layers.Dense(8, name="head")]
    )
    model.quantize("int8")
    model.enable_geolora(rank=2)
    move(model)
    x = np.random.default_rng(0).normal(size=(16, 16)).astype("float32")
    report = keras_geolora.export(
        model, tmp_path, samples=x, tolerance=1e-3, verbose=False
    )
    assert report["form"] == "beside the kernels"


def quantized(depth):
    """An adapted model whose layers round their inputs."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(16, "tanh") for _ in range(depth)]
    model = keras.Sequential([keras.Input((16,), name="x"), *layers])
    model.quantize("int8")
    model.enable_geolora(rank=2)
    move(model)
    return model


def test_a_model_that_rounds_is_judged_by_how_it_rounds(tmp_path):
    model = quantized(depth=6)
    x = np.random.default_rng(0).normal(size=(64, 16)).astype("float32")
    report = keras_geolora.export(model, tmp_path, samples=x, verbose=False)
    found = report["signatures"]["serving_default"]
    assert found["rounding"] > 1e-3
    assert found["allowed_difference"] == 2 * found["rounding"]
    sentence = list(export_module.table(report))[-1]
    assert sentence.startswith("Quantized layers round their inputs")


def test_a_model_that_does_not_round_hardly_moves():
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8)])
    signature = Signature.of(model)
    (batch, _) = signature.draw()
    outputs = answers(model, signature, batch)
    far = export_module.distance_when_shaken(model, signature, batch, outputs)
    assert 0 < far < 1e-4 and not export_module.rounds_inputs(model)


@keras.saving.register_keras_serializable("tests")
class Doubled(keras.Model):
    """A model without a graph."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(4)

    def call(self, x):
        return {"twice": 2 * self.dense(x)}

    def build(self, shape):
        self.dense.build(shape)


def test_a_model_without_a_graph_says_what_goes_in(tmp_path):
    model = Doubled()
    model.build((None, 8))
    model.enable_geolora(rank=2)
    with pytest.raises(ValueError, match="input_signature=None"):
        keras_geolora.export(model, tmp_path)
    spec = keras.InputSpec(shape=(None, 8), dtype="float32")
    assert Signature.of(model, [spec]).specs[0]["name"] == "input_0"
    report = keras_geolora.export(
        model, tmp_path, input_signature=spec, baseline=False, verbose=False
    )
    x = np.ones((2, 8), "float32")
    found = serving.load(report["path"])({"inputs": x})["twice"]
    expected = keras.ops.convert_to_numpy(model(x)["twice"])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_language_model_without_adapters_takes_text(tmp_path):
    model = small_models.writer(8)
    report = keras_geolora.export(
        model, tmp_path, preprocess=True, baseline=False, verbose=False
    )
    assert report["form"] == "none"
    assert "no adapters" in next(export_module.table(report))
    found = serving.load(report["path"])({"text": ["such words"]})
    (inputs, _, _) = model.preprocessor(["such words"])
    (found,) = found.values()
    expected = keras.ops.convert_to_numpy(model(inputs))
    np.testing.assert_allclose(found, expected, atol=1e-5)


class Unknown(Doubled):
    """A class that a file cannot name."""


def test_a_class_that_is_not_registered_is_named(tmp_path):
    model = Unknown()
    model.build((None, 8))
    spec = keras.InputSpec(shape=(None, 8), dtype="float32")
    with pytest.raises(keras_geolora.ExportError, match="'Unknown'"):
        public_export(model, tmp_path, input_signature=spec, verbose=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.backend_independent("it looks at folders")
def test_versions_count_up_and_are_never_overwritten(tmp_path):
    (tmp_path / "7").mkdir()
    assert export_module.next_version(tmp_path) == 8
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(FileExistsError, match="version=7"):
        keras_geolora.export(model, tmp_path, version=7)
    for wrong in (0, True, 1.0, "1"):
        with pytest.raises(ValueError, match=f"version={wrong!r}"):
            keras_geolora.export(model, tmp_path, version=wrong)
    assert [x.name for x in tmp_path.iterdir()] == ["7"]


@pytest.mark.backend_independent("it looks at folders")
def test_somebody_elses_version_is_not_lost(tmp_path):
    written = tmp_path / ".export-mine"
    written.mkdir()
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "saved_model.pb").write_text("another")
    report = {}
    number = export_module.publish(written, tmp_path, None, report)
    assert number == report["version"] == 2
    assert (tmp_path / "1" / "saved_model.pb").read_text() == "another"


def test_other_answers_are_refused_and_leave_nothing(tmp_path, monkeypatch):
    def wrong(model, signature, samples):
        answers = original(model, signature, samples)
        return {name: x + 1 for name, x in answers.items()}

    original = export_module.answers
    monkeypatch.setattr(export_module, "answers", wrong)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(keras_geolora.ExportError, match="difference of 1"):
        keras_geolora.export(model, tmp_path, verbose=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("far", [float("nan"), float("inf")])
def test_answers_that_are_no_numbers_are_refused(far):
    entry = {"max_difference": far, "allowed_difference": 1.0}
    with pytest.raises(keras_geolora.ExportError, match="not finite"):
        export_module.check_parity({"signatures": {"served": entry}})


def test_arguments_are_checked_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="model='bert'"):
        public_export("bert", tmp_path)
    with pytest.raises(ValueError, match="not built"):
        public_export(keras.Sequential([keras.layers.Dense(1)]), tmp_path)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="preprocess=True"):
        public_export(model, tmp_path, preprocess=True)
    with pytest.raises(ValueError, match=r"samples=\['text'\]"):
        public_export(model, tmp_path, samples=["text"])
    model.enable_geolora(rank=1, name="mine")
    for wrong in ("mine", ["yours"], []):
        with pytest.raises(ValueError, match=r"the adapters.*\['mine'\]"):
            public_export(model, tmp_path, adapters=wrong)
    with model.geolora_disabled():
        with pytest.raises(ValueError, match="geolora_disabled"):
            public_export(model, tmp_path)
    with pytest.raises(ValueError, match="Received: 'x'"):
        public_export(model, tmp_path, input_signature="x")
    with pytest.raises(ValueError, match="Received: .*other"):
        public_export(model, tmp_path, samples={"other": np.ones((1, 4))})
    assert not list(tmp_path.iterdir())


def reader_of_strings():
    vectorize = keras.layers.TextVectorization(20, output_sequence_length=4)
    vectorize.adapt(["good film", "bad film"])
    model = keras.Sequential(
        [
            keras.Input((1,), dtype="string"),
            vectorize,
            keras.layers.Embedding(20, 8),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(3, name="score"),
        ]
    )
    model.enable_geolora(rank=2, targets="all", seed=0)
    model.get_layer("score").adapter.S.assign(np.diag([2.0, 1.0, 0.0]))
    return model


@pytest.mark.parametrize("samples", [None, ["good film", "bad"]])
def test_a_model_that_takes_strings(tmp_path, samples):
    model = reader_of_strings()
    if not ON_TENSORFLOW:
        match = "string inputs only on TensorFlow.*takes strings, on"
        with pytest.raises(ValueError, match=match):
            keras_geolora.export(model, tmp_path, samples=samples)
        assert not list(tmp_path.iterdir())
        return
    report = keras_geolora.export(
        model, tmp_path, samples=samples, verbose=False
    )
    assert report["same_operations"]
    served = serving.load(tmp_path / "1")
    (name,) = report["signatures"]["serving_default"]["inputs"]
    x = np.array([["a good film"], ["bad"], ["gööd"]])
    found = served({name: np.char.encode(x, "utf-8")})["score"]
    expected = keras.ops.convert_to_numpy(model(x))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(expected[0] - expected[1]).max() > 1e-4


def test_samples_of_strings_have_the_shape_of_the_input():
    signature = Signature.of(reader_of_strings())
    (found,) = signature.named(["ä", "bad film"]).values()
    assert found.shape == (2, 1) and found[0, 0] == "ä".encode()
    for drawn, rows in zip(signature.draw(), (2, 3), strict=True):
        (array,) = drawn.values()
        assert array.shape == (rows, 1) and array.dtype.kind == "S"


def test_a_missing_tensorflow_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(ImportError, match="pip install tensorflow"):
        keras_geolora.export(model, tmp_path)


# The process in which TensorFlow writes runs the same way for all backends.
of_the_writer = pytest.mark.backend_independent("it watches the writer")


@pytest.fixture
def job(tmp_path):
    (tmp_path / "job.json").write_text(
        json.dumps(
            {
                "modules": [],
                "floatx": "float32",
                "image_data_format": "channels_last",
            }
        )
    )
    return tmp_path


@of_the_writer
def test_the_last_words_of_a_failed_process_are_shown(job):
    with pytest.raises(keras_geolora.ExportError, match="'baseline'"):
        export_module.run_writer(job, lambda line: None, timeout=300)


@of_the_writer
def test_a_process_that_takes_too_long_is_ended(job):
    with pytest.raises(keras_geolora.ExportError, match=r"timeout=0\.1"):
        export_module.run_writer(job, lambda line: None, timeout=0.1)


@of_the_writer
def test_classes_of_a_script_are_refused_by_name(job):
    (job / "job.json").write_text(json.dumps({"modules": ["__main__"]}))
    with pytest.raises(keras_geolora.ExportError, match="'__main__'"):
        export_module.run_writer(job, lambda line: None, timeout=300)


def test_importing_the_library_does_not_import_tensorflow():
    code = "import sys, keras_geolora; assert 'tensorflow' not in sys.modules"
    if ON_TENSORFLOW:
        pytest.skip("Keras itself imports TensorFlow there")
    subprocess.run(
        [PYTHON, "-c", code],
        check=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )
