"""Merged models as folders of Hugging Face."""

import json

import keras
import keras_hub
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from hugging_face import (
    CONVERTED,
    IDS,
    MASK,
    MODELS,
    SMALL,
    hugging_face,
    keras_hidden,
    keras_model,
    move,
    torch_hidden,
)

import keras_geolora
from keras_geolora import AdapterFileError
from keras_geolora.__main__ import main
from keras_geolora.layers.tree import adapted_layers

pytestmark = [
    # What transformers says of models that are tiny or random.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture
def base(tmp_path):
    return tmp_path / "base"


def adapted(name, base, **options):
    model = keras_model(name, base)
    options = {"rank_pattern": {".*(query|dense)": 3}, **options}
    model.enable_geolora(rank=2, scale=0.7, seed=0, **options)
    move(model)
    return model


@pytest.mark.parametrize("name", CONVERTED)
def test_transformers_and_keras_hub_load_the_merged_model(name, base, tmp_path):
    base.mkdir()
    hugging_face(name, base)
    model = adapted(name, base)
    before = (base / "model.safetensors").read_bytes()
    expected = keras_hidden(model, name)
    report = keras_geolora.export_merged_safetensors(
        model, tmp_path / "merged", base
    )
    assert report["changed"] > 4 and report["rounding_error"] == 0
    assert (base / "model.safetensors").read_bytes() == before
    whole = MODELS[name][0].from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(torch_hidden(whole, name), expected, atol=1e-4)
    back = keras_model(name, tmp_path / "merged")
    atol = 1e-2 if name == "Mistral" else 1e-4  # KerasHub reads it as float16
    np.testing.assert_allclose(keras_hidden(back, name), expected, atol=atol)


# Checkpoints of several files, in half precision, with heads.


def llama(base, dtype="float32", tied=False, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=tied)
    whole = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    whole.save_pretrained(base, **options)
    path = base / "config.json"
    known = {"rope_theta": 10000.0, **json.loads(path.read_text())}
    path.write_text(json.dumps(known))
    (base / "tokenizer.json").write_text('{"any": "thing"}')
    backbone = keras_hub.models.Llama3Backbone.from_preset(
        str(base), dtype="float32"
    )
    return keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)


def logits_of(folder, dtype="float32"):
    whole = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype)
    )
    with torch.no_grad():
        logits = whole.eval()(torch.tensor(IDS).long()).logits
    return logits.float().numpy()


def logits_here(model):
    inputs = {"token_ids": IDS, "padding_mask": MASK}
    return model.predict(inputs, verbose=0)


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_of_several_files(tied, base, tmp_path):
    model = llama(base, tied=tied, max_shard_size="5KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    model.enable_geolora(
        rank=2,
        targets=".*(query|token_embedding)",
        modules_to_save=".*layernorm",
        seed=0,
    )
    move(model)
    model.backbone.get_layer("sequence_output_layernorm").scale.assign(
        np.linspace(0.5, 2, 16)
    )
    expected = logits_here(model)
    for _ in range(2):  # the second exchanges the first
        report = keras_geolora.export_merged_safetensors(
            model, tmp_path / "merged", base
        )
        assert report["changed"] == 2 + 1 + (not tied) + 5
        found = logits_of(tmp_path / "merged")
        np.testing.assert_allclose(found, expected, atol=1e-4)
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {path.name for path in base.iterdir()}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_dtype_stays_and_rounding_is_told(dtype, base, tmp_path):
    model = llama(base, dtype)
    model.enable_geolora(rank=2, targets=".*query", seed=0)
    move(model)
    report = keras_geolora.export_merged_safetensors(
        model, tmp_path / "merged", base
    )
    before, after = (
        safetensors.torch.load_file(folder / "model.safetensors")
        for folder in (base, tmp_path / "merged")
    )
    assert list(before) == list(after)
    errors, layers = [], model.backbone.layers
    for key, x in after.items():
        assert x.dtype == getattr(torch, dtype)
        if "q_proj" not in key:
            assert torch.equal(x, before[key])
            continue
        name = f"transformer_layer_{key.split('.')[2]}"
        layer = next(layer for layer in layers if layer.name == name)
        query = layer._self_attention_layer._query_dense
        delta = keras.ops.convert_to_numpy(query.delta()).reshape(16, 16).T
        exact = before[key].float().numpy() + delta
        error = np.linalg.norm(x.float().numpy() - exact)
        errors.append(error / np.linalg.norm(delta))
    assert report["rounding_error"] == pytest.approx(max(errors), rel=1e-2)
    assert 0 < max(errors) < 1e-2
    found = logits_of(tmp_path / "merged")
    np.testing.assert_allclose(found, logits_here(model), atol=0.02)


@pytest.mark.backend_independent("NumPy rounds")
@pytest.mark.parametrize(
    "dtype, lost", [("bfloat16", 1 / 6), ("float16", 1 / 48)]
)
def test_small_updates_lose_more(dtype, lost, base, tmp_path):
    model = llama(base, dtype)
    model.enable_geolora(rank=2, targets=".*query", seed=0)
    for layer in adapted_layers(model).values():
        kernel = keras.ops.convert_to_numpy(layer.kernel)
        sigma = np.array([0.8, 0.6, 0, 0]) * np.linalg.norm(kernel) / 100
        layer.adapter.S.assign(np.diag(sigma))
    report = keras_geolora.export_merged_safetensors(
        model, tmp_path / "merged", base
    )
    assert report["rounding_error"] == pytest.approx(lost, rel=0.2)


@pytest.mark.parametrize("classes", [2, 5])
def test_a_new_head_is_added(classes, base, tmp_path):
    base.mkdir()
    hugging_face("Bert", base)
    model = keras_hub.models.BertTextClassifier(
        keras_model("Bert", base), num_classes=classes, preprocessor=None
    )
    model.enable_geolora(rank=2, seed=0, train_bias=True)
    move(model)
    inputs = {"token_ids": IDS, "padding_mask": MASK, "segment_ids": 0 * IDS}
    expected = model.predict(inputs, verbose=0)
    report = keras_geolora.export_merged_safetensors(
        model, tmp_path / "merged", base
    )
    assert report["added"] == ["classifier.bias", "classifier.weight"]
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    whole, info = load(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        found = whole.eval()(torch.tensor(IDS).long()).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen", "GPT2"])
def test_keras_hub_writes_merged_models_of_some_families(name, tmp_path, base):
    base.mkdir()
    hugging_face(name, base)
    if name == "Llama":
        backbone = keras_hub.models.Llama3Backbone.from_preset(str(base))
        backbone.enable_geolora(rank=2, scale=0.7, seed=0)
        move(backbone)
    else:
        backbone = adapted(name, base)
    expected = keras_hidden(backbone, name)
    backbone.merge_geolora()
    backbone.export_to_transformers(str(tmp_path / "merged"))
    backbone.unmerge_geolora()
    whole = MODELS[name][0].from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(torch_hidden(whole, name), expected, atol=1e-4)


# Mistakes.


def refused(model, folder, base, error, match, **options):
    with pytest.raises(error, match=match):
        keras_geolora.export_merged_safetensors(model, folder, base, **options)
    assert not folder.exists()


@pytest.fixture
def model(base):
    model = llama(base)
    model.enable_geolora(rank=2, targets=".*query", seed=0)
    return model


@pytest.mark.backend_independent("it writes and reads files")
def test_a_folder_that_is_no_base(model, tmp_path, base):
    merged = tmp_path / "merged"
    refused(model, merged, tmp_path, FileNotFoundError, "config.json")
    (base / "model.safetensors").unlink()
    refused(model, merged, base, FileNotFoundError, "model.safetensors.index")
    (base / "model.safetensors").write_bytes(b"12345678901")
    refused(model, merged, base, AdapterFileError, "damaged")
    index = base / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"x": "../x.safetensors"}}')
    refused(model, merged, base, AdapterFileError, "not an index")


@pytest.mark.backend_independent("it writes and reads files")
def test_a_base_of_another_model(model, tmp_path, base):
    merged = tmp_path / "merged"
    names = {f"transformer_layer_{i}/self_attention/query": "q" for i in (0, 1)}
    names[next(iter(names))] = "k"
    refused(model, merged, base, ValueError, "no tensor.*'[kq]", names=names)
    path = base / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    key = "model.layers.0.self_attn.q_proj.weight"
    tensors[key] = torch.ones(3, 16)
    safetensors.torch.save_file(tensors, path)
    refused(model, merged, base, AdapterFileError, r"shape \(3, 16\), and.*16")
    tensors[key] = torch.ones(16, 16, dtype=torch.int8)
    safetensors.torch.save_file(tensors, path)
    refused(model, merged, base, AdapterFileError, "not quantized.*type I8")
    tensors[key] = torch.ones(16, 16)
    tensors[f"other.{key}"] = torch.ones(16, 16)
    safetensors.torch.save_file(tensors, path)
    refused(model, merged, base, AdapterFileError, "has 2 tensors of the name")


@pytest.mark.backend_independent("it writes and reads files")
def test_the_base_stays_and_other_weights_are_not_mixed(model, tmp_path, base):
    export = keras_geolora.export_merged_safetensors
    with pytest.raises(ValueError, match="folder of its own"):
        export(model, base, base)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="with 'pytorch_model.bin'"):
        export(model, tmp_path, base)


@pytest.mark.backend_independent("it writes and reads files")
def test_all_that_trained_needs_a_name(tmp_path, base):
    base.mkdir()
    hugging_face("Bert", base)
    model = keras_hub.models.BertMaskedLM(
        keras_model("Bert", base), preprocessor=None
    )
    model.enable_geolora(rank=2, seed=0)
    refused(model, tmp_path / "merged", base, ValueError, "'head:mlm_head")


@pytest.mark.backend_independent("it writes and reads files")
def test_sums_that_are_too_large_for_float16_are_refused(tmp_path, base):
    model = llama(base, "float16")
    model.enable_geolora(rank=2, targets=".*query", seed=0)
    move(model)
    for layer in model.backbone.layers:
        if layer.name == "transformer_layer_1":
            query = layer._self_attention_layer._query_dense
            query.adapter.S.assign(query.adapter.S * 1e7)
    with pytest.raises(ValueError, match="65504.*layers.1.*q_proj"):
        keras_geolora.export_merged_safetensors(
            model, tmp_path / "merged", base
        )
    assert not list((tmp_path / "merged").iterdir())


@pytest.mark.backend_independent("it writes and reads files")
def test_convert_merges_a_file(tmp_path, base, capsys):
    base.mkdir()
    hugging_face("GPT2", base)
    model = adapted("GPT2", base)
    keras_geolora.export_merged_safetensors(model, tmp_path / "one", base)
    path = str(tmp_path / "mine.safetensors")
    model.save_geolora(path)
    command = ["convert", path, "--to", "merged"]
    assert main(command) == 2
    assert "--base" in capsys.readouterr().err
    folder = ["--output", str(tmp_path / "other"), "--base", str(base)]
    assert main([*command, *folder, "--pad"]) == 2
    assert "--pad is for" in capsys.readouterr().err
    assert main([*command, *folder]) == 0
    assert "8 tensors" in capsys.readouterr().out
    for name in "config.json", "model.safetensors":
        one = (tmp_path / "one" / name).read_bytes()
        assert one == (tmp_path / "other" / name).read_bytes()
