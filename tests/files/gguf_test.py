"""Adapters as GGUF files for llama.cpp."""

import re
import sys

import families
import gguf
import keras
import keras_hub
import numpy as np
import pytest
import servers_test
from keras import ops

import keras_geolora
from keras_geolora.__main__ import main
from keras_geolora.layers.registry import kernel_view
from keras_geolora.layers.tree import stable_paths

# What llama.cpp's `convert_hf_to_gguf.py` makes of a family.
ARCHITECTURES = {
    "Llama": "llama",
    "Llama3": "llama",
    "Mistral": "llama",
    "Qwen": "qwen2",
    "Qwen3": "qwen3",
    "Gemma": "gemma",
}
# By the last part of a path of KerasHub, as in `gguf.TENSOR_NAMES`.
NAMES = {
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "attention_output": "attn_output",
    "feedforward_gate_dense": "ffn_gate",
    "feedforward_intermediate_dense": "ffn_up",
    "feedforward_output_dense": "ffn_down",
    "ffw_gating": "ffn_gate",
    "ffw_gating_2": "ffn_up",
    "ffw_linear": "ffn_down",
}


def in_order_of_halves(rows, heads):
    """Undoes what llama.cpp does to the rows of queries and keys."""
    found = []
    for head in np.split(rows, heads):
        found += [*head[::2], *head[1::2]]
    return np.stack(found)


def read(path):
    """The metadata of a file, and an update for each kernel, as llama.cpp."""
    reader = gguf.GGUFReader(path)
    fields = {key: x.contents() for key, x in reader.fields.items()}
    halves = {}
    for tensor in reader.tensors:
        name, _, half = tensor.name.rpartition(".")
        x = gguf.dequantize(tensor.data, tensor.tensor_type)
        halves.setdefault(name, {})[half] = x.reshape(tensor.shape[::-1])
    updates = {}
    for name, x in halves.items():
        A, B = x["lora_a"], x["lora_b"]
        scale = fields["adapter.lora.alpha"] / B.shape[1]
        updates[name] = scale * B.astype("float32") @ A.astype("float32")
    return fields, updates


def updates_of(backbone, architecture):
    heads = {
        "attn_q": backbone.num_query_heads,
        "attn_k": backbone.num_key_value_heads,
    }
    found = {}
    for path, layer in stable_paths(backbone).items():
        if getattr(layer, "is_adapted", False):
            block, *_, last = path.split("/")
            number = block.rpartition("_")[2]
            delta = kernel_view(layer).to_matrix(layer.delta())
            name = NAMES[last]
            found[f"blk.{number}.{name}.weight"] = (
                ops.convert_to_numpy(delta).T,
                heads.get(name) if architecture == "llama" else None,
            )
    return found


def assert_same(updates, expected, atol):
    assert set(updates) == set(expected)
    for name, (delta, heads) in expected.items():
        found = updates[name]
        found = in_order_of_halves(found, heads) if heads else found
        np.testing.assert_allclose(found, delta, atol=atol)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_file_holds_the_updates(family, tmp_path):
    backbone = servers_test.adapted(family)
    path = tmp_path / "mine.gguf"
    report = keras_geolora.export_gguf(backbone, path)
    architecture = ARCHITECTURES[family]
    assert report == {
        "architecture": architecture,
        "rank": 6,
        "dtype": "float32",
        "rounding_error": 0.0,
    }
    fields, updates = read(path)
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == architecture
    expected = updates_of(backbone, architecture)
    assert len(expected) == 7 * backbone.num_layers
    assert_same(updates, expected, 1e-6)
    # Ranks are those of the layers.
    shapes = {tuple(x.shape) for x in gguf.GGUFReader(path).tensors}
    assert {4, 6} <= {min(shape) for shape in shapes}


@pytest.mark.backend_independent("it is about names")
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_names_are_those_of_llama_cpp(family, tmp_path):
    backbone = servers_test.adapted(family)
    path = tmp_path / "mine.gguf"
    keras_geolora.export_gguf(backbone, path)
    names = gguf.MODEL_ARCH_NAMES.items()
    (arch,) = (a for a, x in names if x == ARCHITECTURES[family])
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[arch]}
    for tensor in gguf.GGUFReader(path).tensors:
        block, number, name, weight, half = tensor.name.split(".")
        assert f"{block}.{{bid}}.{name}" in known and int(number) < 2
        assert weight == "weight" and half in ("lora_a", "lora_b")
    # And those that it gives the names of transformers, which PEFT has.
    table = gguf.get_tensor_name_map(arch, backbone.num_layers)
    modules = servers_test.updates(backbone)
    assert {table.get_name(x) for x in modules} == {
        name.removesuffix(".weight") for name in read(path)[1]
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_files_in_half_precision(dtype, tmp_path):
    backbone = servers_test.adapted()
    path = tmp_path / "mine.gguf"
    report = keras_geolora.export_gguf(backbone, path, dtype=dtype)
    kind = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    types = {x.tensor_type.name for x in gguf.GGUFReader(path).tensors}
    assert types == {kind}
    assert 0 < report["rounding_error"] < {"F16": 1e-3, "BF16": 1e-2}[kind]
    assert_same(read(path)[1], updates_of(backbone, "llama"), 2e-3)


def test_gemma_2_is_another_architecture(tmp_path):
    backbone, _ = families.build("GemmaBackbone")
    config = backbone.get_config() | {"name": "gemma2"}
    config |= {"use_post_ffw_norm": True, "use_post_attention_norm": True}
    second = keras_hub.models.GemmaBackbone.from_config(config)
    second.enable_geolora(rank=1)
    report = keras_geolora.export_gguf(second, tmp_path / "mine.gguf")
    assert report["architecture"] == "gemma2"


def test_a_task_and_a_named_adapter(tmp_path):
    backbone = servers_test.decoder()
    task = keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)
    task.enable_geolora(rank=1, name="one")
    task.enable_geolora(rank=2, name="two", targets=".*value")
    keras_geolora.export_gguf(task, tmp_path / "two.gguf")
    keras_geolora.export_gguf(task, tmp_path / "one.gguf", name="one")
    assert len(read(tmp_path / "two.gguf")[1]) == backbone.num_layers
    assert len(read(tmp_path / "one.gguf")[1]) == 7 * backbone.num_layers


# What has no place in a file.


@pytest.fixture
def path(tmp_path):
    """A file that may not be written."""
    yield tmp_path / "mine.gguf"
    assert not list(tmp_path.iterdir())


def test_other_families_are_refused(path):
    bert, _ = families.build("BertBackbone")
    bert.enable_geolora(rank=1)
    dense = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])
    dense.enable_geolora(rank=1)
    for model, name in (bert, "BertBackbone"), (dense, "Sequential"):
        with pytest.raises(
            ValueError, match=f"Qwen3, Gemma.*export_peft.*class {name}"
        ):
            keras_geolora.export_gguf(model, path)


def test_what_trained_beside_is_refused(path):
    backbone = servers_test.adapted("Qwen", train_bias=True)
    with pytest.raises(ValueError, match="train_bias.*Received.*bias'"):
        keras_geolora.export_gguf(backbone, path)


def test_embeddings_are_refused(path):
    backbone = servers_test.decoder()
    backbone.enable_geolora(rank=1, targets=".*(query|embedding)")
    with pytest.raises(ValueError, match="exclude=.*'token_embedding'"):
        keras_geolora.export_gguf(backbone, path)


def test_without_the_package_the_error_says_what_to_install(path, monkeypatch):
    backbone = servers_test.adapted()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"keras_geolora\[gguf\]"):
        keras_geolora.export_gguf(backbone, path)


# The command line.


def base(folder, architecture, heads):
    """The metadata of a base model."""
    path = folder / "base.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_head_count(heads[0])
    writer.add_head_count_kv(heads[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.mark.backend_independent("NumPy reads and writes files")
def test_convert_writes_what_export_writes(tmp_path, capsys):
    backbone = servers_test.adapted()
    heads = backbone.num_query_heads, backbone.num_key_value_heads
    mine = str(tmp_path / "mine.safetensors")
    backbone.save_geolora(mine)
    keras_geolora.export_gguf(backbone, tmp_path / "same.gguf")
    convert = "convert", mine, "--to", "gguf"
    assert main([*convert, "--base", base(tmp_path, "llama", heads)]) == 0
    assert "architecture 'llama'" in capsys.readouterr().out
    one, same = (tmp_path / f"{x}.gguf" for x in ("mine", "same"))
    assert one.read_bytes() == same.read_bytes()


@pytest.mark.backend_independent("NumPy reads and writes files")
def test_convert_says_what_it_needs(tmp_path, capsys):
    mine = str(tmp_path / "mine.safetensors")
    servers_test.adapted().save_geolora(mine)
    convert = ["convert", mine, "--to", "gguf"]
    here = base(tmp_path, "qwen2", (2, 1))
    none = tmp_path / "none.gguf"
    for options, sentence in [
        ([], "--base model.gguf"),
        (["--base", here], "'llama'. Received: a GGUF file of .*'qwen2'"),
        (["--base", mine], "is not a GGUF file"),
        (["--base", str(none)], "There is no file"),
        (["--base", here, "--pad"], "--pad is for --to peft only"),
    ]:
        assert main(convert + options) == 2
        error = capsys.readouterr().err
        assert re.search(sentence, error), error
    assert not (tmp_path / "mine.gguf").exists()
