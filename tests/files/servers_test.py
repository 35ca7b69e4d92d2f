"""PEFT folders for vLLM and SGLang, neither of which is installed here.

`as_vllm` and `as_sglang` read a folder by the rules of vLLM 0.33 and SGLang
0.5.23, restated from their sources and documentation.
"""

import json

import families
import keras_hub
import moving
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers
from keras import ops

import keras_geolora
from keras_geolora.__main__ import main
from keras_geolora.files.peft_names import family_of, module_names
from keras_geolora.layers.registry import kernel_view
from keras_geolora.layers.tree import stable_paths

PACKED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
ALONE = ["o_proj", "down_proj"]
DECODERS = "Llama", "Llama3", "Mistral", "Qwen", "Qwen3", "Gemma"


def decoder(family="Llama"):
    name = {"Llama3": "Llama"}.get(family, family)
    backbone, _ = families.build(f"{name}Backbone")
    if family == "Llama3":
        config = backbone.get_config() | {"name": "llama3"}
        backbone = keras_hub.models.Llama3Backbone.from_config(config)
    return backbone


def adapted(family="Llama", **options):
    backbone = decoder(family)
    if "targets" not in options:
        options["rank_pattern"] = {".*(key|gate_dense|gating)": 3}
    backbone.enable_geolora(rank=2, seed=0, scale=0.7, **options)
    moving.move(backbone)
    return backbone


def updates(backbone):
    """The updates of a backbone by the names of a `ForCausalLM` model."""
    paths = {
        path: layer
        for path, layer in stable_paths(backbone).items()
        if getattr(layer, "is_adapted", False)
    }
    named = module_names(family_of(backbone), paths, None)
    return {
        f"model.{named[path]}": ops.convert_to_numpy(
            kernel_view(layer).to_matrix(layer.delta())
        ).T
        for path, layer in paths.items()
    }


def read(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, safetensors.torch.load_file(
        folder / "adapter_model.safetensors"
    )


def as_vllm(folder, modules, max_lora_rank):
    """The updates of packed modules, as vLLM makes them of a folder."""
    assert max_lora_rank in (1, 8, 16, 32, 64, 128, 256, 320, 512)
    config, tensors = read(folder)
    assert not config["modules_to_save"] and config["bias"] == "none"
    assert not config["use_dora"] and not config["use_rslora"]
    assert config["r"] <= max_lora_rank
    # Older releases know one rank and one scaling.
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    scaling = config["lora_alpha"] / config["r"]
    loras = {}
    for key, tensor in tensors.items():
        *parts, half, weight = key.split(".")
        assert parts[:2] == ["base_model", "model"] and weight == "weight"
        assert half in ("lora_A", "lora_B")
        assert parts[-1] in sum(PACKED.values(), ALONE)
        loras.setdefault(".".join(parts[2:]), {})[half] = tensor.float()
    assert set(loras) <= set(modules)
    return packed(
        {
            module: scaling * lora["lora_B"] @ lora["lora_A"]
            for module, lora in loras.items()
        },
        modules,
    )


def as_sglang(folder, modules):
    """The updates of packed modules, as SGLang makes them of a folder."""
    config, tensors = read(folder)
    rank, scaling = config["r"], config["lora_alpha"] / config["r"]
    halves = {"lora_A": {}, "lora_B": {}}
    for key, tensor in tensors.items():
        module, half, _ = key.rsplit(".", 2)
        halves[half][module.removeprefix("base_model.model.")] = tensor.float()
    for half in halves.values():
        for module in [x for x in half if x.endswith("q_proj")]:
            names = [module.replace("q_proj", x) for x in PACKED["qkv_proj"]]
            name = module.replace("q_proj", "qkv_proj")
            half[name] = torch.cat([half.pop(x) for x in names])
        for module in [x for x in half if x.endswith("gate_proj")]:
            names = module, module.replace("gate_proj", "up_proj")
            name = module.replace("gate_proj", "gate_up_proj")
            half[name] = torch.cat([half.pop(x) for x in names])
    updates = {}
    for module, A in halves["lora_A"].items():
        parent, _, suffix = module.rpartition(".")
        names = PACKED.get(suffix, [suffix])
        assert suffix in (*PACKED, *ALONE)
        # Its buffers take the rank of the file for every part.
        assert len(A) == rank * len(names)
        B, at = halves["lora_B"][module], 0
        for i, name in enumerate(names):
            rows = len(modules[f"{parent}.{name}"].weight)
            part = B[at : at + rows] @ A[i * rank : (i + 1) * rank]
            updates[f"{parent}.{name}"] = scaling * part
            at += rows
        assert at == len(B)
    return packed(updates, modules)


def packed(updates, modules):
    """The updates of what the servers keep as one matrix, where there are."""
    found = {}
    for module in updates:
        parent, _, suffix = module.rpartition(".")
        pack = next((p for p, x in PACKED.items() if suffix in x), suffix)
        names = [f"{parent}.{x}" for x in PACKED.get(pack, [suffix])]
        found[f"{parent}.{pack}"] = np.concatenate(
            [
                np.array(updates[x])
                if x in updates
                else np.zeros(modules[x].weight.shape, "float32")
                for x in names
            ]
        )
    return found


def whole_of(family, backbone):
    """The model of transformers that a server builds, with a head."""
    cls = {"Qwen": "Qwen2", "Llama3": "Llama"}.get(family, family)
    config = getattr(transformers, f"{cls}Config")(
        vocab_size=backbone.vocabulary_size,
        hidden_size=backbone.hidden_dim,
        intermediate_size=backbone.intermediate_dim
        // (2 if family == "Gemma" else 1),
        num_hidden_layers=backbone.num_layers,
        num_attention_heads=backbone.num_query_heads,
        num_key_value_heads=backbone.num_key_value_heads,
        head_dim=getattr(backbone, "head_dim", None)
        or backbone.hidden_dim // backbone.num_query_heads,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{cls}ForCausalLM")(config)


@pytest.mark.parametrize("family", DECODERS)
def test_servers_read_the_updates_of_every_decoder(family, tmp_path):
    backbone = adapted(family)
    report = keras_geolora.export_peft(backbone, tmp_path, server="vllm")
    assert report == {
        "rank": 6,
        "max_lora_rank": 8,
        "dtype": "float32",
        "rounding_error": 0.0,
    }
    modules = dict(whole_of(family, backbone).named_modules())
    expected = packed(updates(backbone), modules)
    assert len(expected) == 4 * backbone.num_layers
    for found in as_vllm(tmp_path, modules, 8), as_sglang(tmp_path, modules):
        assert set(found) == set(expected)
        for module, update in expected.items():
            assert np.abs(update).max() > 1e-3
            np.testing.assert_allclose(found[module], update, atol=1e-6)


# PEFT uses a name that transformers will remove.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("targets", [".*query", ".*(value|gate.*)", ".*key"])
def test_packs_are_whole_where_only_a_part_is_adapted(targets, tmp_path):
    backbone = adapted(targets=targets)
    keras_geolora.export_peft(backbone, tmp_path, server="sglang")
    whole = whole_of("Llama", backbone)
    modules = dict(whole.named_modules())
    expected = packed(updates(backbone), modules)
    for found in as_vllm(tmp_path, modules, 8), as_sglang(tmp_path, modules):
        assert set(found) == set(expected)
        for module, update in expected.items():
            np.testing.assert_allclose(found[module], update, atol=1e-6)
    # PEFT, too, reads products of zeros.
    peft.PeftModel.from_pretrained(whole, tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_error_of_rounding_is_told(dtype, tmp_path):
    backbone = adapted()
    report = keras_geolora.export_peft(
        backbone, tmp_path, server="vllm", dtype=dtype
    )
    _, tensors = read(tmp_path)
    assert {x.dtype for x in tensors.values()} == {getattr(torch, dtype)}
    modules = dict(whole_of("Llama", backbone).named_modules())
    config, tensors = read(tmp_path)
    errors = []
    for module, update in updates(backbone).items():
        A, B = (
            tensors[f"base_model.model.{module}.lora_{x}.weight"].double()
            for x in "AB"
        )
        error = np.linalg.norm((B @ A).numpy() - update)
        errors.append(error / np.linalg.norm(update))
    assert report["rounding_error"] == pytest.approx(max(errors), rel=1e-3)
    assert 0 < max(errors) < {"float16": 1e-3, "bfloat16": 1e-2}[dtype]
    as_vllm(tmp_path, modules, report["max_lora_rank"])


def test_without_a_server_ranks_stay_and_numbers_are_rounded(tmp_path):
    backbone = adapted()
    report = keras_geolora.export_peft(backbone, tmp_path, dtype="bfloat16")
    assert set(report) == {"rank", "dtype", "rounding_error"}
    config, _ = read(tmp_path)
    assert config["rank_pattern"]
    back = decoder()
    keras_geolora.import_peft(back, tmp_path)
    for module, update in updates(back).items():
        np.testing.assert_allclose(update, updates(backbone)[module], atol=1e-2)


# What cannot be served.


@pytest.fixture
def folder(tmp_path):
    """A folder into which nothing may be written."""
    yield tmp_path / "adapter"
    assert not (tmp_path / "adapter").exists()


def test_other_layers_than_projections_are_refused(folder):
    backbone, _ = families.build("BertBackbone")
    backbone.enable_geolora(rank=1)
    with pytest.raises(
        ValueError, match="exclude=.*server='vllm'.*'encoder.layer.0.attention"
    ):
        keras_geolora.export_peft(backbone, folder, server="vllm")


def test_embeddings_are_refused(folder):
    backbone = decoder()
    backbone.enable_geolora(rank=1, targets=".*(query|embedding)")
    with pytest.raises(ValueError, match="exclude=.*'embed_tokens'"):
        keras_geolora.export_peft(backbone, folder, server="vllm")


def test_what_trained_beside_is_refused(folder):
    backbone = adapted("Qwen", train_bias=True)
    with pytest.raises(ValueError, match="train_bias.*Received.*bias'"):
        keras_geolora.export_peft(backbone, folder, server="vllm")


def test_ranks_that_vllm_does_not_serve_are_refused():
    from keras_geolora.files.servers import max_lora_rank

    ranks = [max_lora_rank("vllm", r) for r in (1, 2, 8, 65, 257, 321, 512)]
    assert ranks == [1, 8, 8, 128, 320, 512, 512]
    assert max_lora_rank("sglang", 513) == 513
    with pytest.raises(ValueError, match="up to 512.*layer of rank 513"):
        max_lora_rank("vllm", 513)


def test_numbers_that_are_too_large_for_float16_are_refused(folder):
    backbone = adapted()
    layer = next(
        x for p, x in stable_paths(backbone).items() if p.endswith("query")
    )
    layer.adapter.S.assign(layer.adapter.S * 1e6)
    with pytest.raises(ValueError, match="bfloat16 holds.*float16.*'layers.0"):
        keras_geolora.export_peft(backbone, folder, dtype="float16")


def test_words_that_are_no_server_or_dtype(folder):
    backbone = adapted()
    with pytest.raises(ValueError, match="'sglang' or None.*server='tgi'"):
        keras_geolora.export_peft(backbone, folder, server="tgi")
    with pytest.raises(ValueError, match="float16, bfloat16.*dtype='int8'"):
        keras_geolora.export_peft(backbone, folder, dtype="int8")


@pytest.mark.backend_independent("NumPy reads and writes files")
def test_convert_keeps_the_rules_of_a_server(tmp_path, capsys):
    backbone = adapted()
    path, folder = str(tmp_path / "mine.safetensors"), tmp_path / "mine"
    backbone.save_geolora(path)
    options = "--server", "vllm", "--dtype", "bfloat16"
    assert main(["convert", path, "--to", "peft", *options]) == 0
    text = capsys.readouterr().out
    assert "--max-lora-rank 8" in text and "an update by 0." in text
    keras_geolora.export_peft(
        backbone, tmp_path / "same", server="vllm", dtype="bfloat16"
    )
    for name in "adapter_config.json", "adapter_model.safetensors":
        one = (folder / name).read_bytes()
        assert one == (tmp_path / "same" / name).read_bytes()


@pytest.mark.backend_independent("NumPy reads and writes files")
def test_convert_does_not_know_the_shapes_of_other_layers(tmp_path, capsys):
    path = str(tmp_path / "mine.safetensors")
    adapted(targets=".*query").save_geolora(path)
    command = ["convert", path, "--to", "peft", "--server", "vllm"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "SGLang needs 'layers.0.self_attn.k_proj' beside" in error
    assert "export from the model" in error
