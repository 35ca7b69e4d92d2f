"""Adapters of Hugging Face PEFT and of KerasHub, to and fro."""

import json

import families
import h5py
import keras
import keras_hub
import numpy as np
import peft
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from hugging_face import (
    CONVERTED,
    MODELS,
    hugging_face,
    keras_hidden,
    keras_model,
    move,
    torch_hidden,
)
from keras import ops

import keras_geolora
from keras_geolora import AdapterFileError
from keras_geolora.files import peft_names, peft_reading
from keras_geolora.files.peft_names import (
    FAMILIES,
    family_of,
    module_names,
)
from keras_geolora.layers.tree import adapted_layers, stable_paths

pytestmark = [
    # What transformers and PEFT say of models that are tiny or random.
    pytest.mark.filterwarnings("ignore"),
]
RNG = np.random.default_rng(1)
ROWS = RNG.normal(size=(3, 8)).astype("float32")
SCORE = {"dense": "score"}


@pytest.mark.parametrize("name", CONVERTED)
def test_peft_computes_what_we_compute_and_back(name, tmp_path):
    hf = hugging_face(name, tmp_path)
    model = keras_model(name, tmp_path)
    before = keras_hidden(model, name)
    np.testing.assert_allclose(before, torch_hidden(hf, name), atol=1e-4)
    model.enable_geolora(
        rank=2, rank_pattern={".*(query|dense)": 3}, scale=0.7, seed=0
    )
    move(model)
    expected = keras_hidden(model, name)
    assert not np.allclose(expected, before, atol=1e-2)
    keras_geolora.export_peft(model, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(hf, tmp_path / "adapter").eval()
    np.testing.assert_allclose(torch_hidden(adapted, name), expected, atol=1e-4)

    model.remove_geolora()
    keras_geolora.import_peft(model, tmp_path / "adapter", name="back")
    assert model.geolora_adapters() == ["back"]
    np.testing.assert_allclose(keras_hidden(model, name), expected, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_a_family_has_a_name(family):
    backbone, _ = families.build(family)
    backbone.enable_geolora(rank=1)
    short = family.removesuffix("Backbone")
    cls, options = MODELS[short]
    model = cls(cls.config_class(**options))
    modules = {*dict(model.named_modules()), *dict(model.named_parameters())}
    adapted = {id(layer) for layer in adapted_layers(backbone).values()}
    paths = [p for p, x in stable_paths(backbone).items() if id(x) in adapted]
    names = module_names(family_of(backbone), paths, None)
    assert len(names) > 5
    for name in names.values():
        assert name.split("[")[0] in modules, name


# What Hugging Face wrote.


def peft_adapter(folder, hf, **options):
    """A random LoRA adapter that PEFT itself makes and saves."""
    options = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": "all-linear",
    } | options
    torch.manual_seed(1)
    adapted = peft.get_peft_model(
        hf, peft.LoraConfig(init_lora_weights=False, **options)
    ).eval()
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"query": 2}, "alpha_pattern": {"layer.0": 9}},
        {"target_modules": ["query", "value"]},
    ],
)
def test_adapters_of_peft_are_read(tmp_path, options):
    hf = hugging_face("Bert", tmp_path)
    model = keras_model("Bert", tmp_path)
    adapted = peft_adapter(tmp_path / "adapter", hf, **options)
    keras_geolora.import_peft(model, tmp_path / "adapter")
    np.testing.assert_allclose(
        keras_hidden(model, "Bert"), torch_hidden(adapted, "Bert"), atol=1e-4
    )
    for layer in adapted_layers(model).values():
        U = ops.convert_to_numpy(layer.adapter.U)
        np.testing.assert_allclose(
            (U.T @ U)[: layer.rank, : layer.rank], np.eye(layer.rank), atol=1e-5
        )


@pytest.mark.parametrize(
    "name, parameters, options",
    [
        ("Mixtral", ["gate_up_proj", "down_proj"], {}),
        ("Mixtral", ["experts.down_proj"], {"use_rslora": True}),
        (
            "QwenMoe",
            ["mlp.experts.gate_up_proj", "mlp.gate.weight"],
            {"alpha_pattern": {"mlp.gate.weight": 2}},
        ),
    ],
)
def test_experts_of_peft_are_read(name, parameters, options, tmp_path):
    hf = hugging_face(name, tmp_path)
    model = keras_model(name, tmp_path)
    adapted = peft_adapter(
        tmp_path / "adapter",
        hf,
        target_modules=["q_proj"],
        target_parameters=parameters,
        **options,
    )
    keras_geolora.import_peft(model, tmp_path / "adapter")
    expected = torch_hidden(adapted, name)
    np.testing.assert_allclose(keras_hidden(model, name), expected, atol=1e-4)
    assert not np.allclose(expected, torch_hidden(adapted.unload(), name))


def test_bfloat16_adapters_are_read(tmp_path):
    hf = hugging_face("Bert", tmp_path)
    model = keras_model("Bert", tmp_path)
    adapted = peft_adapter(tmp_path / "adapter", hf)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors = {key: x.bfloat16() for key, x in tensors.items()}
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    keras_geolora.import_peft(model, tmp_path / "adapter")
    np.testing.assert_allclose(
        keras_hidden(model, "Bert"), torch_hidden(adapted, "Bert"), atol=0.1
    )


def test_an_adapter_of_a_model_with_a_head_is_read(tmp_path):
    hf = hugging_face("Bert", tmp_path)
    model = keras_model("Bert", tmp_path)
    whole = transformers.BertForMaskedLM(hf.config)
    whole.bert.load_state_dict(hf.state_dict(), strict=False)
    peft_adapter(tmp_path / "adapter", whole, target_modules=["query", "key"])
    keras_geolora.import_peft(model, tmp_path / "adapter")
    np.testing.assert_allclose(
        keras_hidden(model, "Bert"), torch_hidden(whole.bert, "Bert"), atol=1e-4
    )


@pytest.mark.backend_independent("it is about names in transformers")
@pytest.mark.parametrize("name", MODELS)
def test_the_backbone_of_a_task_is_where_transformers_has_it(name):
    cls, options = MODELS[name]
    kind = "Image" if name == "ViT" else "Sequence"
    head = cls.__name__.replace("Model", f"For{kind}Classification")
    whole = getattr(transformers, head)(cls.config_class(**options))
    family = f"{name.replace('Llama3', 'Llama')}Backbone"
    prefix = peft_names.prefix_in(family, is_task=True)
    assert type(whole.get_submodule(prefix)) is cls
    assert peft_names.prefix_in(family, is_task=False) == ""


def test_a_language_model_goes_to_peft_without_a_prefix(tmp_path):
    hf = hugging_face("Llama", tmp_path)
    task = keras_hub.models.LlamaCausalLM(
        keras_model("Llama", tmp_path), preprocessor=None
    )
    task.enable_geolora(rank=2, seed=0)
    move(task)
    keras_geolora.export_peft(task, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    whole = transformers.LlamaForCausalLM(hf.config)
    whole.model.load_state_dict(hf.state_dict())
    adapted = peft.PeftModel.from_pretrained(whole, tmp_path / "adapter")
    assert isinstance(adapted, peft.PeftModelForCausalLM)
    np.testing.assert_allclose(
        torch_hidden(whole.model.eval(), "Llama"),
        keras_hidden(task.backbone, "Llama"),
        atol=1e-4,
    )


def test_a_prefix_and_one_rank_for_all(tmp_path):
    hf = hugging_face("Bert", tmp_path)
    model = keras_model("Bert", tmp_path)
    model.enable_geolora(
        rank=2, rank_pattern={".*query": 3}, exclude="pooled_dense", seed=0
    )
    move(model)
    folder = tmp_path / "adapter"
    keras_geolora.export_peft(
        model, folder, prefix="bert", base_model="someone/bert", pad=True
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {} and config["r"] == 3
    assert config["base_model_name_or_path"] == "someone/bert"
    whole = transformers.BertForMaskedLM(hf.config)
    whole.bert.load_state_dict(hf.state_dict(), strict=False)
    peft.PeftModel.from_pretrained(whole, folder).eval()
    np.testing.assert_allclose(
        torch_hidden(whole.bert, "Bert"), keras_hidden(model, "Bert"), atol=1e-4
    )


def linear():
    """What `small` is, in PyTorch, with the same weights."""
    dense = small().layers[0]
    net = torch.nn.Sequential()
    net.add_module("score", torch.nn.Linear(8, 4))
    state = {
        "score.weight": torch.tensor(ops.convert_to_numpy(dense.kernel).T),
        "score.bias": torch.tensor(ops.convert_to_numpy(dense.bias)),
    }
    net.load_state_dict(state)
    return net


def initialized(init):
    """An adapter that PEFT initialized in a way, and that was trained."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, target_modules=["score"], init_lora_weights=init
    )
    return peft.get_peft_model(linear(), config)


def outputs_of(net):
    with torch.no_grad():
        return net(torch.tensor(ROWS)).numpy()


def move_factors(adapted):
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter += torch.randn_like(parameter)


@pytest.mark.parametrize(
    "init", [True, False, "gaussian", "eva", "mica", "orthogonal"]
)
def test_initialisations_that_leave_kernels_alone_are_read(tmp_path, init):
    adapted = initialized(init)
    move_factors(adapted)
    adapted.save_pretrained(tmp_path)
    model = keras_geolora.import_peft(small(), tmp_path, names=SCORE)
    theirs = peft.PeftModel.from_pretrained(linear(), tmp_path)
    for expected in map(outputs_of, (adapted, theirs)):
        np.testing.assert_allclose(
            model.predict(ROWS, verbose=0), expected, atol=1e-5
        )


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_initialisations_that_change_kernels_are_refused(tmp_path, init):
    adapted = initialized(init)
    adapted.save_pretrained(tmp_path / "initial")
    move_factors(adapted)
    adapted.save_pretrained(tmp_path / "trained")
    model = small()
    with pytest.raises(
        AdapterFileError, match=f"conversion=.*init_lora_weights='{init}'"
    ):
        keras_geolora.import_peft(model, tmp_path / "trained", names=SCORE)
    assert not adapted_layers(model)
    # What the message says.
    adapted.save_pretrained(
        tmp_path / "plain",
        path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
    )
    keras_geolora.import_peft(model, tmp_path / "plain", names=SCORE)
    np.testing.assert_allclose(
        model.predict(ROWS, verbose=0), outputs_of(adapted), atol=1e-5
    )


# Mistakes.


def small():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])


def test_an_unknown_family_needs_names(tmp_path):
    model = small()
    model.enable_geolora(rank=2, seed=0)
    move(model)
    expected = ops.convert_to_numpy(model.layers[0].delta())
    with pytest.raises(ValueError, match=r"names=\{path: module\}.*'dense'"):
        keras_geolora.export_peft(model, tmp_path)
    with pytest.raises(ValueError, match="no name for 'dense'"):
        keras_geolora.export_peft(model, tmp_path, names={})
    with pytest.raises(ValueError, match="names for 'other'"):
        keras_geolora.export_peft(model, tmp_path, names={"other": "x"})
    assert not list(tmp_path.iterdir())
    keras_geolora.export_peft(model, tmp_path, names=lambda path: f"my.{path}")
    fresh = small()
    with pytest.raises(ValueError, match="names={path: module}"):
        keras_geolora.import_peft(fresh, tmp_path)
    keras_geolora.import_peft(fresh, tmp_path, names={"dense": "my.dense"})
    np.testing.assert_allclose(
        ops.convert_to_numpy(fresh.layers[0].delta()), expected, atol=1e-6
    )


def test_parts_of_a_module_are_counted_from_zero(tmp_path):
    model = small()
    model.enable_geolora(rank=2)
    with pytest.raises(ValueError, match=r"last is 'x\[2/3\]'.*'x\[3/3\]'"):
        keras_geolora.export_peft(model, tmp_path, names={"dense": "x[3/3]"})
    assert not list(tmp_path.iterdir())


def test_two_layers_cannot_be_one_module(tmp_path):
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(8), keras.layers.Dense(8)]
    )
    model.enable_geolora(rank=2)
    with pytest.raises(ValueError, match="module of its own"):
        keras_geolora.export_peft(model, tmp_path, names=lambda path: "q")


@pytest.mark.parametrize(
    "export", [keras_geolora.export_peft, keras_geolora.export_gguf]
)
def test_experts_whose_layout_is_not_known_are_refused(export, tmp_path):
    model, _ = families.build("GptOssBackbone")
    model.enable_geolora(rank=1, targets="experts")
    with pytest.raises(ValueError, match="Received.*experts"):
        export(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_servers_do_not_get_experts(server, tmp_path):
    model, _ = families.build("MixtralBackbone")
    model.enable_geolora(rank=1, targets=["experts", ".*query"])
    with pytest.raises(ValueError, match=f"'{server}' and .*experts.down_proj"):
        keras_geolora.export_peft(model, tmp_path / "adapter", server=server)


def test_two_parameters_of_a_module_need_a_known_order(tmp_path):
    model, _ = families.build("MixtralBackbone", num_layers=1)
    model.enable_geolora(rank=1, targets=".*(gate|output)_dense")
    with pytest.raises(ValueError, match="nests.*Received: 'one_.*one module"):
        keras_geolora.export_peft(
            model,
            tmp_path,
            names=lambda path: f"mlp.one_{path.rpartition('_')[0]}",
        )


@pytest.mark.parametrize(
    "options, word",
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    ],
)
def test_more_than_lora_is_refused(tmp_path, options, word):
    hf = hugging_face("Bert", tmp_path)
    peft_adapter(tmp_path / "adapter", hf, **options)
    model = keras_model("Bert", tmp_path)
    with pytest.raises(AdapterFileError, match=word):
        keras_geolora.import_peft(model, tmp_path / "adapter")
    assert not adapted_layers(model)


@pytest.mark.parametrize(
    "option",
    [
        "use_qalora",
        "use_bdlora",
        "arrow_config",
        "kasa_config",
        "monteclora_config",
        "velora_config",
    ],
)
def test_variants_of_lora_are_refused(tmp_path, option):
    assert option in peft.LoraConfig.__dataclass_fields__
    peft_adapter(tmp_path, linear(), target_modules=["score"])
    path = tmp_path / "adapter_config.json"
    config = {**json.loads(path.read_text()), option: {"nblocks": 2}}
    path.write_text(json.dumps(config))
    model = small()
    with pytest.raises(AdapterFileError, match=option):
        keras_geolora.import_peft(model, tmp_path, names=SCORE)
    assert not adapted_layers(model)


def branches():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8,))
    outputs = [keras.layers.Dense(6, name=name)(inputs) for name in "qkv"]
    return keras.Model(inputs, outputs)


def thirds(paths):
    return {path: f"c_attn[{'qkv'.index(path)}/3]" for path in paths}


@pytest.mark.parametrize("adapted", ["qkv", "qv"])
def test_no_part_of_a_fused_module_is_dropped(tmp_path, adapted):
    model = branches()
    model.enable_geolora(rank=2, targets=list(adapted), seed=0)
    move(model)
    keras_geolora.export_peft(model, tmp_path, names=thirds(adapted))
    some = branches()
    with pytest.raises(AdapterFileError, match="all of 'c_attn'.*other parts"):
        keras_geolora.import_peft(some, tmp_path, names=thirds("q"))
    assert not adapted_layers(some)
    # A part that was not adapted is zero.
    keras_geolora.import_peft(some, tmp_path, names=thirds(adapted))
    assert list(adapted_layers(some)) == list(adapted)
    for path, layer in adapted_layers(some).items():
        np.testing.assert_allclose(
            ops.convert_to_numpy(layer.delta()),
            ops.convert_to_numpy(adapted_layers(model)[path].delta()),
            atol=1e-5,
        )


def damage(folder, what):
    config = folder / "adapter_config.json"
    weights = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    key = next(iter(tensors))
    if what == "config":
        config.write_text("[1]")
    elif what == "cut off":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif what == "half":
        tensors.pop(key)
    elif what == "shape":
        tensors[key] = np.ones((2, 3), "float32")
    elif what == "not finite":
        tensors[key] = tensors[key] * np.nan
    elif what == "foreign":
        tensors["x"] = np.ones(3)
    elif what == "pattern":
        options = json.loads(config.read_text())
        config.write_text(json.dumps({**options, "alpha_pattern": {"(": 1}}))
    elif what in ("alpha too large", "alpha not finite", "alpha as text"):
        alpha = {"alpha too large": "1" + "0" * 400, "alpha as text": '"x"'}
        text = (
            f'{{"peft_type": "LORA", "lora_alpha": {alpha.get(what, "NaN")}}}'
        )
        config.write_text(text)
    elif what == "nested":
        config.write_text("[" * 100_000)
    elif what == "empty":
        for half, shape in ("A", (0, 8)), ("B", (4, 0)):
            tensors[f"base_model.model.x.lora_{half}.weight"] = np.ones(shape)
    elif what == "too large":
        tensors = {key: x * 0 + 3e38 for key, x in tensors.items()}
    elif what == "alpha":
        config.write_text('{"peft_type": "LORA"}')
    elif what == "twice":
        for half in "AB":
            tensors[f"other.x.lora_{half}.weight"] = tensors[
                f"base_model.model.x.lora_{half}.weight"
            ]
    elif what == "module":
        tensors["a.lora_A.weight"] = tensors["a.lora_B.weight"] = np.eye(3)
    if what != "cut off":
        safetensors.numpy.save_file(tensors, weights)


@pytest.mark.parametrize(
    "what",
    [
        "config",
        "cut off",
        "half",
        "shape",
        "not finite",
        "foreign",
        "module",
        "pattern",
        "alpha",
        "alpha too large",
        "alpha not finite",
        "alpha as text",
        "nested",
        "empty",
        "too large",
        "twice",
    ],
)
def test_a_damaged_adapter_leaves_the_model_alone(tmp_path, what):
    model = small()
    model.enable_geolora(rank=2, seed=0)
    keras_geolora.export_peft(model, tmp_path, names={"dense": "x"})
    damage(tmp_path, what)
    fresh = small()
    with pytest.raises(ValueError):
        keras_geolora.import_peft(fresh, tmp_path, names={"dense": "x"})
    assert type(fresh.layers[0]) is keras.layers.Dense
    assert fresh.layers[0].kernel.trainable


@pytest.mark.backend_independent("it writes and reads files")
def test_an_export_while_an_adapter_is_read_is_noticed(tmp_path, monkeypatch):
    model = small()
    model.enable_geolora(rank=2, seed=0)
    move(model)
    expected = ops.convert_to_numpy(model.layers[0].delta())
    keras_geolora.export_peft(model, tmp_path, names=SCORE)
    path = tmp_path / "adapter_config.json"
    ours = path.read_text()
    path.write_text(json.dumps(json.loads(ours) | {"lora_alpha": 20}))
    read = peft_reading.read_peft_weights

    def read_while_somebody_writes(*args):
        path.write_text(ours)
        return read(*args)

    monkeypatch.setattr(
        peft_reading, "read_peft_weights", read_while_somebody_writes
    )
    other = keras_geolora.import_peft(small(), tmp_path, names=SCORE)
    np.testing.assert_allclose(
        ops.convert_to_numpy(other.layers[0].delta()), expected, atol=1e-6
    )


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        keras_geolora.import_peft(small(), tmp_path)


# KerasHub.


@pytest.mark.parametrize("name", ["BertBackbone", "GemmaBackbone"])
def test_lora_of_keras_hub_is_read(tmp_path, name):
    backbone, inputs = families.build(name)
    backbone.enable_lora(2)
    rng = np.random.default_rng(0)
    for variable in backbone.trainable_variables:
        variable.assign(rng.normal(size=variable.shape) / 3)
    expected = keras.tree.flatten(backbone.predict(inputs, verbose=0))
    backbone.save_lora_weights(tmp_path / "mine.lora.h5")
    fresh, _ = families.build(name)
    for variable, value in zip(
        fresh.weights,
        [v for v in backbone.weights if "lora" not in v.name],
        strict=True,
    ):
        variable.assign(value)
    keras_geolora.import_keras_lora(fresh, tmp_path / "mine.lora.h5")
    found = keras.tree.flatten(fresh.predict(inputs, verbose=0))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    other, _ = families.build("ViTBackbone")
    with pytest.raises(AdapterFileError, match="another model"):
        keras_geolora.import_keras_lora(other, tmp_path / "mine.lora.h5")


def test_files_that_are_not_of_keras_hub(tmp_path):
    model, _ = families.build("BertBackbone")
    path = tmp_path / "my.lora.h5"
    path.write_bytes(b"no")
    with pytest.raises(OSError):
        keras_geolora.import_keras_lora(model, path)
    with h5py.File(path, "w") as file:
        group = file.create_group("lora/3/vars")
        # As large as declared it would fill the memory.
        size = 4_000_000
        for half in "ab":
            group.create_dataset(
                f"lora_kernel_{half}", (size, size), "f4", chunks=(1, 64)
            )
    with pytest.raises(AdapterFileError, match="another model"):
        keras_geolora.import_keras_lora(model, path)
    with h5py.File(path, "w") as file:
        file.create_group("lora/3")
    with pytest.raises(AdapterFileError, match="save_lora_weights"):
        keras_geolora.import_keras_lora(model, path)
    assert not adapted_layers(model)
