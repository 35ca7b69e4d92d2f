"""Language models as SavedModels: tokens in, tokens out."""

import sys

import keras
import keras_hub
import numpy as np
import pytest
import serving
import small_models
import tensorflow as tf
from moving import move

import keras_geolora
from keras_geolora.layers.tree import adapted_layers
from keras_geolora.serving.generating import gaps

pytestmark = pytest.mark.usefixtures("forked")
written_by_tensorflow = pytest.mark.backend_independent(
    "TensorFlow compares what it has written"
)


@pytest.fixture(scope="module")
def lm():
    """A tiny language model with an adapter."""
    model = small_models.writer(12)
    model.enable_geolora(rank=2)
    move(model)
    return model


def export(model, path, **options):
    return keras_geolora.export(
        model, path, generate=True, baseline=False, verbose=False, **options
    )


def test_tokens_are_generated_as_by_the_model(lm, tmp_path):
    lm.compile(sampler="greedy")
    report = export(lm, tmp_path, stop_token_ids=None)
    entry = report["signatures"]["generate"]
    assert entry["different_tokens"] == 0
    assert entry["sampler"] == "GreedySampler"
    assert report["form"] == "merged"
    inputs = {
        "token_ids": np.array([[3, 4, 5, 0, 0, 0, 0], [9, 0, 0, 0, 0, 0, 0]]),
        "padding_mask": np.array([[1, 1, 1, 0, 0, 0, 0], [1] + 6 * [0]]),
    }
    inputs = {name: x.astype("int32") for name, x in inputs.items()}
    found = serving.load(tmp_path / "1", "generate")(inputs)["token_ids"]
    preprocessor, lm.preprocessor = lm.preprocessor, None
    expected = lm.generate(inputs, stop_token_ids=None)["token_ids"]
    lm.preprocessor = preprocessor
    np.testing.assert_array_equal(found, expected)
    assert (found[:, 3:] != 0).any()
    logits = serving.load(tmp_path / "1")(inputs)
    assert next(iter(logits.values())).shape == (2, 7, 97)


def test_text_goes_in_and_text_comes_out(lm, tmp_path):
    lm.compile(sampler="greedy")
    export(lm, tmp_path, preprocess=True)
    ask = serving.load(tmp_path / "1", "generate")
    prompts = ["such words", "su"]
    found = [text.decode() for text in ask({"text": prompts})["text"]]
    assert found == lm.generate(prompts)
    assert all(map(str.startswith, found, prompts)) and found != prompts


def test_sampled_text_is_another_one_each_time(lm, tmp_path):
    lm.compile(sampler=keras_hub.samplers.TopPSampler(p=0.9, seed=3))
    report = export(lm, tmp_path, preprocess=True)
    entry = report["signatures"]["generate"]
    assert entry["sampler"] == "TopPSampler"
    assert "different_tokens" not in entry  # nothing to compare with
    ask = serving.load(tmp_path / "1", "generate")
    found = {ask({"text": ["su"]})["text"][0] for _ in range(4)}
    assert len(found) == 4
    assert all(text.startswith(b"su") for text in found)


def test_what_cannot_generate_is_refused(lm, tmp_path):
    dense = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="Only a `CausalLM`"):
        export(dense, tmp_path)
    with pytest.raises(ValueError, match="generate=False"):
        keras_geolora.export(dense, tmp_path, stop_token_ids=None)
    lm.compile(sampler="greedy")
    with pytest.raises(ValueError, match=r"adapters \['default'\]"):
        export(lm, tmp_path, adapters="all")
    lm.compile(sampler="beam")
    with pytest.raises(ValueError, match="Received: a sampler BeamSampler"):
        export(lm, tmp_path, route=True)
    lm.compile(sampler="greedy")
    preprocessor, lm.preprocessor = lm.preprocessor, None
    with pytest.raises(ValueError, match="stop_token_ids='auto'"):
        export(lm, tmp_path)
    lm.preprocessor = preprocessor
    sampler, lm.sampler = lm.sampler, None
    with pytest.raises(ValueError, match="without a sampler"):
        export(lm, tmp_path)
    lm.sampler = sampler
    assert not list(tmp_path.iterdir())


def test_a_quantized_model_generates_with_its_adapter_beside(tmp_path):
    lm = small_models.llama()
    lm.quantize("int8")
    lm.enable_geolora(rank=2)
    move(lm)
    lm.compile(sampler="greedy")
    report = export(lm, tmp_path, stop_token_ids=None)
    assert report["form"] == "beside the kernels"
    assert report["signatures"]["generate"]["different_tokens"] == 0
    # Nobody asks a server for gradients, and it takes long to save them.
    graph = (tmp_path / "1" / "saved_model.pb").read_bytes()
    assert b"internal_grad_fn" not in graph


def test_every_row_is_continued_by_its_adapter(tmp_path):
    lm = small_models.writer(8)
    for name, strength in {"a": 8, "b": -4}.items():
        lm.enable_geolora(rank=2, name=name, train_bias=True)
        move(lm)
        for layer in adapted_layers(lm).values():
            S = layer.adapter.S
            S.assign(strength * np.array(keras.ops.convert_to_numpy(S)))
    lm.compile(sampler="greedy")
    report = export(lm, tmp_path, route=True, stop_token_ids=None)
    entry = report["signatures"]["generate"]
    assert entry["different_tokens"] == 0
    assert entry["inputs"]["adapter"] == {"shape": [None], "dtype": "string"}
    inputs = {
        "token_ids": np.array([[3, 4, 5, 0, 0, 0, 0, 0]] * 4, "int32"),
        "padding_mask": np.array([[1] * 3 + [0] * 5] * 4, "int32"),
    }
    lm.preprocessor = None  # tokens go in
    ask = serving.load(tmp_path / "1", "generate")
    mix = ["b", "", "a", "b"]
    found = ask({**inputs, "adapter": mix})["token_ids"]

    def alone():
        return lm.generate(inputs, stop_token_ids=None)["token_ids"][0]

    with lm.geolora_disabled():
        expected = {"": alone()}
    lm.activate_geolora("b")
    expected["b"] = alone()
    for name, row in zip(mix, found, strict=True):
        if name in expected:
            np.testing.assert_array_equal(row, expected[name])
    assert len(set(map(tuple, found))) == 3

    lm.save_geolora(tmp_path / "b", name="b")
    keras_geolora.add_to_export(tmp_path, {"a": tmp_path / "b"}, verbose=False)
    ask = serving.load(tmp_path / "2", "generate")
    found = ask({**inputs, "adapter": ["a"]})["token_ids"]
    np.testing.assert_array_equal(found[0], expected["b"])


def compared(found, gaps, allowed):
    """Compares tokens with `[[1, 2, 3, 4], [5, 6, 0, 0]]`."""
    from keras_geolora.serving.saved_model import Samples

    samples = Samples.__new__(Samples)
    samples.allowed = allowed
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    outputs = {
        "token_ids": tf.constant(found),
        "padding_mask": tf.constant(mask),
    }
    expected = {
        "token_ids": np.array([[1, 2, 3, 4], [5, 6, 0, 0]]),
        "padding_mask": mask,
        "gaps": np.array(gaps),
    }
    return samples.compare_tokens(lambda: outputs, [({}, expected)])


@written_by_tensorflow
def test_tokens_may_differ_from_where_two_were_about_as_likely():
    gaps = [[0, 9, 0.3, 9], [0, 9, 9, 9]]
    same, other = [5, 6, 7, 8], [5, 7, 0, 0]
    found = compared([[1, 2, 8, 8], same], gaps, allowed=0.2)
    assert found == {"different_tokens": 0, "ties": 1}
    found = compared([[1, 2, 8, 8], same], gaps, allowed=0.1)
    assert found == {"different_tokens": 2, "ties": 0}
    found = compared([[1, 2, 8, 8], other], gaps, allowed=0.2)
    assert found == {"different_tokens": 1, "ties": 1}


def test_only_the_most_likely_token_has_a_gap():
    lm = small_models.llama()
    x = {
        "token_ids": np.array([[3, 1, 4]]),
        "padding_mask": np.ones((1, 3), "int32"),
    }
    lm.compile(sampler="beam")
    assert np.isinf(keras.ops.convert_to_numpy(gaps(lm, x))).all()
    lm.compile(sampler="greedy")
    logits = np.sort(keras.ops.convert_to_numpy(lm(x, training=False)))[0]
    found = keras.ops.convert_to_numpy(gaps(lm, x))
    expected = (logits[:, -1] - logits[:, -2])[:2]
    np.testing.assert_allclose(found[0, 1:], expected, atol=1e-6)


def test_other_tokens_are_refused():
    export_module = sys.modules["keras_geolora.serving.export"]
    report = {"signatures": {"generate": {"different_tokens": 3}}}
    with pytest.raises(keras_geolora.ExportError, match="3 different tokens"):
        export_module.check_parity(report)
