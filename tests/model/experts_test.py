"""Experts of KerasHub's mixtures through the whole life of an adapter."""

import families
import keras
import numpy as np
import pytest
from families_test import COMPILES, examine
from keras import ops
from keras_hub import models

import keras_geolora
from keras_geolora.files.adapter_format import AdapterFileError
from keras_geolora.keras_internals import direct_layers
from keras_geolora.layers.prepared import prepared_products
from keras_geolora.layers.tree import adapted_layers
from keras_geolora.layers.weight import AdaptedWeight

EXPERTS = 4
# How many weights with experts a layer of each family has.
FAMILIES = {
    "MixtralBackbone": 3,
    "GptOssBackbone": 2,
    "QwenMoeBackbone": 2,
    "Qwen3MoeBackbone": 2,
    "Qwen3_5MoeBackbone": 2,
    "Gemma4Backbone": 3,
}
# The others have experts like Mixtral's, and JAX takes a minute for some.
NAMES = ["MixtralBackbone", "Gemma4Backbone"] if COMPILES else FAMILIES


def pretrained(name="MixtralBackbone"):
    keras.utils.set_random_seed(0)
    if name == "Gemma4Backbone":
        inputs = families.text(*families.PLAIN)
        positions = families.each(np.arange(families.LENGTH))
        return gemma4(), inputs | {"position_ids": positions}
    changes = dict(num_experts=EXPERTS)
    if name != "Qwen3_5MoeBackbone":  # which has layers of two types
        changes["num_layers"] = 1
    return families.build(name, **changes)


def gemma4():
    """Text only, and with experts, which are zero before training."""
    backbone = models.Gemma4Backbone(
        image_size=8,
        num_layers=1,
        enable_moe_block=True,
        num_experts=EXPERTS,
        expert_intermediate_dim=8,
        num_experts_per_token=2,
        **{k: v for k, v in families.GROUPED_8.items() if k != "num_layers"},
    )
    rng = np.random.default_rng(0)
    for variable in backbone.variables:
        if variable.path.endswith(("gate_proj", "up_proj", "down_proj")):
            variable.assign(rng.normal(size=variable.shape) / 4)
    return backbone


def outputs(model, inputs):
    found = keras.tree.flatten(model(inputs, training=False))
    return [np.array(ops.convert_to_numpy(x)) for x in found]


def assert_same(found, expected, atol=0.0):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


def batched(model):
    return {p: x for p, x in adapted_layers(model).items() if x.adapter.count}


def delta_of(layer):
    return ops.convert_to_numpy(ops.stop_gradient(layer.delta()))


def move(model):
    """Gives every expert another rank, and cores that are not zero."""
    rng = np.random.default_rng(1)
    for layer in batched(model).values():
        U, S, V = (np.array(x) for x in layer.adapter.trimmed())
        for i in range(EXPERTS):
            rank = 1 + i % S.shape[-1]
            S[i, :rank, :rank] = np.diag(-np.sort(-rng.uniform(1, 2, rank)))
            U[i, :, rank:] = V[i, :, rank:] = 0
        layer.adapter.assign_factors(U, S, V)


@pytest.mark.filterwarnings("ignore")  # those of KerasHub's own code
@pytest.mark.parametrize("name", NAMES)
def test_experts_live_through_everything(name, tmp_path):
    model, inputs = pretrained(name)
    before = outputs(model, inputs)
    model.enable_geolora(2, targets="experts", seed=0)
    assert len(batched(model)) % FAMILIES[name] == 0 < len(batched(model))
    assert len(batched(model)) == len(adapted_layers(model))
    assert_same(outputs(model, inputs), before)
    move(model)
    adapted = outputs(model, inputs)
    assert any(
        np.abs(one - other).max() > 1e-3
        for one, other in zip(adapted, before, strict=True)
    )
    with model.geolora_disabled():
        assert_same(outputs(model, inputs), before)

    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    model.save_geolora(tmp_path / "adapter.safetensors")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_same(outputs(loaded, inputs), adapted)
    other, _ = pretrained(name)
    other.enable_geolora(2, targets="experts", seed=1)
    other.load_weights(tmp_path / "model.weights.h5")
    assert_same(outputs(other, inputs), adapted)
    fresh, _ = pretrained(name)
    fresh.load_geolora(tmp_path / "adapter.safetensors")
    assert_same(outputs(fresh, inputs), adapted)
    for layer in batched(fresh).values():
        assert layer.adapter.ranks.tolist() == [1, 2, 1, 2]

    model.merge_geolora()
    assert not any(
        isinstance(x, AdaptedWeight)
        for layer in model._flatten_layers()
        for x in direct_layers(layer)
    )
    assert_same(outputs(model, inputs), adapted, atol=1e-4)
    model.unmerge_geolora()
    assert_same(outputs(model, inputs), adapted)
    model.remove_geolora()
    assert_same(outputs(model, inputs), before)


@pytest.mark.filterwarnings("ignore")
def test_linear_layers_of_a_mixture_include_its_experts():
    sizes = dict(num_layers=1, num_experts=EXPERTS, intermediate_dim=16)
    row = examine("MixtralBackbone", "all-linear", **sizes)
    assert row["moved"] == row["layers"] == 4 + 1 + 3  # with the router


def test_words_patterns_and_callables_mean_weights():
    names = [f"expert_feedforward_{x}_dense" for x in ("gate", "output")]
    for targets, found in {
        ".*/experts/.*": 3,
        ".*/experts": 3,
        ".*gate_dense": 2,  # with the router
        "transformer_layer_0": 8,
        "all-linear": 8,
        "attention": 4,
        f"transformer_layer_0/[^/]*/experts/{names[0]}": 1,
        names[1]: 1,
    }.items():
        model, _ = pretrained()
        model.enable_geolora(1, targets=targets)
        assert len(adapted_layers(model)) == found, targets
    model, _ = pretrained()
    asked = []
    model.enable_geolora(
        1,
        targets=lambda path, x: (
            asked.append((path, x)) or len(x.shape) == 3
            if isinstance(x, keras.Variable)
            else False
        ),
        exclude=f".*/{names[1]}",
    )
    assert all(path.endswith(f"/experts/{x.name}") for path, x in asked)
    assert {x.name for _, x in asked} > set(names)
    assert len(adapted_layers(model)) == 2


def test_several_adapters_of_experts_are_switched_and_summed():
    model, inputs = pretrained()
    seen = {}
    for name in ("one", "two"):
        model.enable_geolora(2, targets="experts", name=name)
        move(model)
        seen[name] = outputs(model, inputs)
    model.activate_geolora("one")
    assert_same(outputs(model, inputs), seen["one"])
    deltas = list(map(delta_of, batched(model).values()))
    model.combine_geolora("half", {"one": 0.5})
    for layer, delta in zip(batched(model).values(), deltas, strict=True):
        np.testing.assert_allclose(delta_of(layer), delta / 2, atol=1e-6)
    model.delete_geolora("one")
    model.activate_geolora("two")
    assert_same(outputs(model, inputs), seen["two"])


def test_clients_with_experts_are_averaged(tmp_path):
    model, _ = pretrained()
    model.enable_geolora(2, targets="experts", seed=0)
    move(model)
    deltas = list(map(delta_of, batched(model).values()))
    model.save_geolora(tmp_path / "client.safetensors")
    clients = [tmp_path / "client.safetensors", model.get_weights()]
    model.average_geolora([str(clients[0]), clients[1]])
    for layer, delta in zip(batched(model).values(), deltas, strict=True):
        np.testing.assert_allclose(delta_of(layer), delta, atol=1e-5)
        assert layer.adapter.ranks.tolist() == [1, 2, 1, 2]


def test_a_summary_shows_the_ranks_of_experts_in_a_row():
    model, _ = pretrained()
    model.enable_geolora(2, targets="experts")
    move(model)
    lines = []
    rows = model.geolora_summary(print_fn=lines.append)
    assert rows[0]["ranks"] == [1, 2, 1, 2] and rows[0]["rank"] == 2
    assert rows[0]["experts"] == EXPERTS
    assert rows[0]["parameters"] == 6 * (16 + 32 + 1)
    row = next(line for line in lines if "gate_dense" in line)
    assert "4 of 16x32" in row and "1-2, mean 1.5/4" in row


def test_an_adapter_of_other_experts_is_refused(tmp_path):
    model, _ = pretrained()
    model.enable_geolora(2, targets="experts")
    model.save_geolora(tmp_path / "adapter.safetensors")
    other, _ = families.build("MixtralBackbone", num_layers=1, num_experts=3)
    with pytest.raises(AdapterFileError, match=r"\(4, 16, 32\) in the file"):
        other.load_geolora(tmp_path / "adapter.safetensors")


def test_llama_cpp_gets_no_experts(tmp_path):
    model, _ = pretrained()
    model.enable_geolora(2, targets="experts")
    with pytest.raises(ValueError, match=r"export_peft.*class MixtralBackb"):
        keras_geolora.export_gguf(model, tmp_path / "adapter.gguf")


def test_rows_with_adapters_of_their_own_refuse_experts():
    model, _ = pretrained()
    model.enable_geolora(2, targets="experts")
    with pytest.raises(ValueError, match="belongs to no layer of its own"):
        model.route_geolora()


def test_sums_of_experts_are_prepared_for_many_calls(monkeypatch):
    model, inputs = pretrained()
    model.enable_geolora(2, targets="experts")
    move(model)
    expected, count = outputs(model, inputs), []
    form = AdaptedWeight.sum
    monkeypatch.setattr(
        AdaptedWeight, "sum", lambda self: count.append(self) or form(self)
    )
    with prepared_products(batched(model).values()):
        assert len(count) == 3
        for _ in range(2):
            assert_same(outputs(model, inputs), expected)
    assert len(count) == 3


def test_buffers_of_experts_are_cut_to_the_largest_rank():
    model, inputs = pretrained()
    model.enable_geolora(2, max_rank=8, targets="experts")
    move(model)
    before = outputs(model, inputs)
    model.compact_geolora(multiple=1)
    assert all(x.adapter.max_rank == 2 for x in batched(model).values())
    assert_same(outputs(model, inputs), before)
