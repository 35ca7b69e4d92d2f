"""What PEFT's files have beside factors of linear layers.

Each is loaded by PEFT and computes what the model here computes, and is read
back.
"""

import functools
import json

import keras
import keras_hub
import moving
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from keras import ops

import keras_geolora
from keras_geolora import AdapterFileError
from keras_geolora.__main__ import main
from keras_geolora.layers.factor import factor_of
from keras_geolora.layers.tree import adapted_layers

pytestmark = [
    # What transformers and PEFT say of models that are tiny or random.
    pytest.mark.filterwarnings("ignore"),
]
IDS = np.random.default_rng(0).integers(5, 30, (2, 6)).astype("int32")
SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
GPT2 = {
    "vocab_size": 32,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 16,
}


def saved(whole, folder):
    """Saves a random model of transformers; KerasHub may read the folder."""
    whole.half().float().eval().save_pretrained(folder)
    path = folder / "config.json"
    known = {"rope_theta": 10000.0, **json.loads(path.read_text())}
    path.write_text(json.dumps(known))
    return whole


def bert(folder):
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, hidden_act="gelu_new")
    whole = transformers.BertForSequenceClassification(config)
    saved(whole, folder)
    backbone = keras_hub.models.BertBackbone.from_preset(str(folder))
    model = keras_hub.models.BertTextClassifier(
        backbone, num_classes=2, preprocessor=None
    )
    logits = model.get_layer("logits")
    state = whole.classifier.state_dict()
    logits.kernel.assign(state["weight"].numpy().T)
    logits.bias.assign(state["bias"].numpy())
    return whole, model


def llama(folder, tied=True):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=tied)
    whole = saved(transformers.LlamaForCausalLM(config), folder)
    return whole, keras_hub.models.Llama3CausalLM(
        keras_hub.models.Llama3Backbone.from_preset(str(folder)), None
    )


def gpt2(folder):
    torch.manual_seed(0)
    whole = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    saved(whole.transformer, folder)
    return whole.eval(), keras_hub.models.GPT2CausalLM(
        keras_hub.models.GPT2Backbone.from_preset(str(folder)), None
    )


MODELS = {
    "bert": bert,
    "llama": llama,
    "untied llama": functools.partial(llama, tied=False),
    "gpt2": gpt2,
}


def here(model):
    inputs = {
        "token_ids": IDS,
        "padding_mask": np.ones_like(IDS),
        "segment_ids": 0 * IDS,
    }
    outputs = model({x.name: inputs[x.name] for x in model.inputs})
    return keras.tree.map_structure(ops.convert_to_numpy, outputs)


def there(whole):
    with torch.no_grad():
        return whole(input_ids=torch.tensor(IDS).long()).logits.numpy()


def adapt(model, targets, **options):
    model.enable_geolora(rank=2, targets=targets, seed=0, **options)
    moving.move(model)
    rng = np.random.default_rng(2)
    for variable in model.trainable_variables:
        if factor_of(variable) is None:
            noise = rng.normal(size=variable.shape).astype("float32")
            variable.assign(ops.convert_to_numpy(variable) + 0.2 * noise)


@pytest.mark.parametrize(
    "name, targets, options, keys",
    [
        # The head of a classifier always trains.
        ("bert", ".*query", {}, ["classifier.weight", "classifier.bias"]),
        (
            "bert",
            ".*query",
            {"modules_to_save": [".*layer_norm", "pooled_dense"]},
            ["bert.embeddings.LayerNorm.weight", "bert.pooler.dense.bias"],
        ),
        (
            "bert",
            ".*(query|token_embedding|segment_embedding)",
            {"train_bias": True},
            [
                "bert.encoder.layer.0.attention.self.query.base_layer.bias",
                "bert.embeddings.word_embeddings.lora_embedding_A",
            ],
        ),
        (
            "bert",
            ["query", "position_embedding/embeddings"],
            {},
            ["bert.embeddings.position_embeddings.lora_embedding_B"],
        ),
        (
            "llama",
            ".*(query|token_embedding)",
            {"modules_to_save": ".*layernorm"},
            ["model.norm.weight", "lm_head.lora_A.weight"],
        ),
        (
            "llama",
            ".*query",
            {"modules_to_save": ["token_embedding", ".*gate_dense"]},
            ["lm_head.weight", "model.layers.0.mlp.gate_proj.weight"],
        ),
        (
            "untied llama",
            ".*(query|token_embedding)",
            {},
            ["model.embed_tokens.lora_embedding_A", "lm_head.lora_B.weight"],
        ),
        (
            "untied llama",
            ".*query",
            {"modules_to_save": ["token_embedding"]},
            ["model.embed_tokens.weight", "lm_head.weight"],
        ),
        (
            "gpt2",
            ".*query",
            {"train_bias": True, "modules_to_save": ".*intermediate_dense"},
            [
                "transformer.h.0.attn.c_attn.base_layer.bias",
                "transformer.h.0.mlp.c_fc.weight",
            ],
        ),
        (
            "gpt2",
            ".*token_embedding",
            {"modules_to_save": ".*(query|key|value)"},
            ["transformer.h.0.attn.c_attn.weight", "lm_head.lora_B.weight"],
        ),
    ],
)
def test_peft_computes_what_we_compute_and_back(
    name, targets, options, keys, tmp_path
):
    whole, model = MODELS[name](tmp_path)
    before = here(model)
    np.testing.assert_allclose(before, there(whole), atol=1e-4)
    adapt(model, targets, **options)
    expected = here(model)
    assert not np.allclose(expected, before, atol=1e-2)
    keras_geolora.export_peft(model, tmp_path / "adapter")
    tensors = safetensors.numpy.load_file(
        tmp_path / "adapter/adapter_model.safetensors"
    )
    assert {f"base_model.model.{key}" for key in keys} <= set(tensors)
    adapted = peft.PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
    np.testing.assert_allclose(there(adapted), expected, atol=1e-4)

    _, fresh = MODELS[name](tmp_path)
    keras_geolora.import_peft(fresh, tmp_path / "adapter", name="back")
    np.testing.assert_allclose(here(fresh), expected, atol=1e-4)


# Convolutions and statistics, in a model of the user.

NAMES = {"conv": "0", "conv_2": "1", "norm": "2", "last": "4"}


def channels():
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((5, 5, 4)),
            layers.Conv2D(6, 3, name="conv"),
            layers.Conv2D(4, (1, 2), groups=2, use_bias=False, name="conv_2"),
            layers.BatchNormalization(epsilon=1e-5, name="norm"),
            layers.Flatten(),
            layers.Dense(3, name="last"),
        ]
    )
    model.get_layer("norm").moving_mean.assign([0.1, 0.2, 0.3, 0.4])
    return model


class ChannelsLast(torch.nn.Flatten):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1))


def channels_in_torch():
    layers = torch.nn
    net = layers.Sequential(
        layers.Conv2d(4, 6, 3),
        layers.Conv2d(6, 4, (1, 2), groups=2, bias=False),
        layers.BatchNorm2d(4),
        ChannelsLast(),
        layers.Linear(24, 3),
    ).eval()
    conv, conv_2, norm, _, last = channels().layers
    for module, layer in (net[0], conv), (net[1], conv_2), (net[4], last):
        kernel = ops.convert_to_numpy(layer.kernel)
        order = range(kernel.ndim - 2)
        kernel = kernel.transpose(kernel.ndim - 1, kernel.ndim - 2, *order)
        module.weight.data = torch.tensor(kernel)
        if layer.bias is not None:
            module.bias.data = torch.tensor(ops.convert_to_numpy(layer.bias))
    net[2].running_mean += torch.tensor([0.1, 0.2, 0.3, 0.4])
    return net


IMAGES = np.random.default_rng(0).random((2, 5, 5, 4)).astype("float32")


def outputs_of(net):
    with torch.no_grad():
        return net(torch.tensor(IMAGES).permute(0, 3, 1, 2)).numpy()


@pytest.mark.parametrize("pad", [False, True])
def test_convolutions_and_statistics_go_to_peft_and_back(pad, tmp_path):
    model = channels()
    before = model.predict(IMAGES)
    np.testing.assert_allclose(
        before, outputs_of(channels_in_torch()), atol=1e-5
    )
    options = {"modules_to_save": ["norm", "last"], "train_bias": True}
    adapt(model, "conv.*", rank_pattern={"conv": 3}, **options)
    norm = model.get_layer("norm")
    norm.moving_variance.assign([2.0, 1.0, 0.5, 3.0])
    expected = model.predict(IMAGES)
    assert not np.allclose(expected, before, atol=1e-2)
    keras_geolora.export_peft(model, tmp_path, names=NAMES, pad=pad)
    net = peft.PeftModel.from_pretrained(channels_in_torch(), tmp_path).eval()
    np.testing.assert_allclose(outputs_of(net), expected, atol=1e-5)
    fresh = keras_geolora.import_peft(channels(), tmp_path, names=NAMES)
    np.testing.assert_allclose(fresh.predict(IMAGES), expected, atol=1e-5)
    ranks = {x.name: x.rank for x in adapted_layers(fresh).values()}
    assert ranks == {x.name: x.rank for x in adapted_layers(model).values()}


def test_groups_that_see_each_other_are_refused(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["1"], init_lora_weights=False)
    peft.get_peft_model(channels_in_torch(), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="factors of '1' do not fit"):
        keras_geolora.import_peft(channels(), tmp_path, names=NAMES)


@pytest.mark.parametrize("window", [(3,), (3, 2), (1, 2, 3)])
def test_convolutions_of_peft_are_read(window, tmp_path):
    keras.utils.set_random_seed(0)
    dims = len(window)
    conv = getattr(keras.layers, f"Conv{dims}D")(6, window, name="conv")
    model = keras.Sequential([keras.Input((*[5] * dims, 4)), conv])
    module = getattr(torch.nn, f"Conv{dims}d")(4, 6, window)
    kernel = ops.convert_to_numpy(conv.kernel)
    module.weight.data = torch.tensor(np.moveaxis(kernel, [-1, -2], [0, 1]))
    module.bias.data *= 0
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    net = torch.nn.Sequential(module)
    net = peft.get_peft_model(net, config)
    net.save_pretrained(tmp_path)
    keras_geolora.import_peft(model, tmp_path, names={"conv": "0"})
    x = np.random.default_rng(0).random((2, *[5] * dims, 4)).astype("float32")
    with torch.no_grad():
        expected = net(torch.tensor(np.moveaxis(x, -1, 1))).numpy()
    np.testing.assert_allclose(
        np.moveaxis(model.predict(x), -1, 1), expected, atol=1e-5
    )


# What PEFT wrote.


def by_peft(whole, folder, **options):
    """An adapter that PEFT makes and saves, all of it moved."""
    config = peft.LoraConfig(
        **{"r": 3, "lora_alpha": 5, "init_lora_weights": False} | options
    )
    adapted = peft.get_peft_model(whole, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) / 5
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize(
    "name, options",
    [
        ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
        (
            "bert",
            {"target_modules": ["query"], "modules_to_save": ["pooler"]},
        ),
        ("bert", {"target_modules": ["query", "value"], "bias": "all"}),
        ("bert", {"target_modules": ["query", "dense"], "bias": "lora_only"}),
        ("bert", {"target_modules": ["query", "word_embeddings"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "bias": "lora_only"}),
        ("gpt2", {"target_modules": ["wpe", "c_proj"], "bias": "all"}),
    ],
)
def test_what_peft_trained_is_read(name, options, tmp_path):
    whole, model = MODELS[name](tmp_path)
    adapted = by_peft(whole, tmp_path / "adapter", **options)
    keras_geolora.import_peft(model, tmp_path / "adapter")
    np.testing.assert_allclose(here(model), there(adapted), atol=1e-4)


# What cannot be exchanged.


@pytest.mark.backend_independent("it writes and reads files")
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
)
def test_an_embedding_and_a_head_that_differ_are_refused(options, tmp_path):
    whole, model = llama(tmp_path)
    by_peft(whole, tmp_path / "adapter", **options)
    with pytest.raises(AdapterFileError, match="merge the adapter"):
        keras_geolora.import_peft(model, tmp_path / "adapter")
    assert not adapted_layers(model)


@pytest.mark.backend_independent("it writes and reads files")
@pytest.mark.parametrize("what", ["more", "other"])
def test_other_pretrained_embeddings_are_refused(what, tmp_path):
    whole, model = llama(tmp_path)
    base = whole.model
    adapted = by_peft(base, tmp_path / "same", target_modules=["embed_tokens"])
    backbone = keras_geolora.import_peft(model.backbone, tmp_path / "same")
    assert list(adapted_layers(backbone)) == ["token_embedding"]
    base = adapted.unload()
    if what == "more":
        base.resize_token_embeddings(40)
    else:
        base.embed_tokens.weight.data *= 2
    by_peft(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    backbone.remove_geolora()
    with pytest.raises(AdapterFileError, match="Tokens may have been added"):
        keras_geolora.import_peft(backbone, tmp_path / "adapter")


@pytest.mark.backend_independent("it writes and reads files")
def test_copies_of_another_shape_are_refused(tmp_path):
    whole, model = bert(tmp_path)
    whole.classifier = torch.nn.Linear(16, 5)
    by_peft(
        whole,
        tmp_path / "adapter",
        target_modules=["query"],
        modules_to_save=["classifier"],
    )
    with pytest.raises(AdapterFileError, match=r"classifier.* \(5, 16\)"):
        keras_geolora.import_peft(model, tmp_path / "adapter")


@pytest.mark.backend_independent("it writes and reads files")
def test_copies_that_are_not_finite_are_refused(tmp_path):
    model = channels()
    adapt(model, "conv", modules_to_save="last")
    keras_geolora.export_peft(model, tmp_path, names={"conv": "0", "last": "4"})
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["base_model.model.4.bias"] *= np.nan
    safetensors.numpy.save_file(tensors, path)
    fresh = channels()
    with pytest.raises(AdapterFileError, match="'4.bias'.*not finite"):
        keras_geolora.import_peft(
            fresh, tmp_path, names={"conv": "0", "last": "4"}
        )
    assert not adapted_layers(fresh)


@pytest.mark.backend_independent("it writes and reads files")
def test_a_dilated_convolution_is_refused(tmp_path):
    conv = keras.layers.Conv1D(6, 3, dilation_rate=2, name="conv")
    model = keras.Sequential([keras.Input((9, 4)), conv])
    model.enable_geolora(rank=2, targets="all")
    with pytest.raises(ValueError, match="forgets the dilation.*'conv'"):
        keras_geolora.export_peft(model, tmp_path, names={"conv": "0"})


@pytest.mark.backend_independent("it writes and reads files")
def test_a_weight_without_a_module_is_refused(tmp_path):
    layer = keras.layers.LSTM(4, name="lstm")
    model = keras.Sequential([keras.Input((3, 8)), layer])
    model.enable_geolora(rank=1, targets="lstm/kernel")
    with pytest.raises(ValueError, match="no counterpart.*'lstm/kernel'"):
        keras_geolora.export_peft(model, tmp_path, names=lambda path: "x")


@pytest.mark.backend_independent("it writes and reads files")
def test_the_embedding_of_a_masked_language_model_is_refused(tmp_path):
    backbone = bert(tmp_path)[1].backbone
    model = keras_hub.models.BertMaskedLM(backbone, preprocessor=None)
    model.enable_geolora(rank=1, targets="token_embedding")
    with pytest.raises(ValueError, match="Received.*BertMaskedLM"):
        keras_geolora.export_peft(model, tmp_path / "adapter")


@pytest.mark.backend_independent("it writes and reads files")
def test_a_name_that_peft_would_find_twice_is_refused(tmp_path):
    backbone = llama(tmp_path)[1].backbone
    adapt(backbone, ".*query", modules_to_save="sequence_output_layernorm")
    with pytest.raises(ValueError, match="'norm'.*'input_layernorm'"):
        keras_geolora.export_peft(backbone, tmp_path / "adapter")
    keras_geolora.export_peft(backbone, tmp_path / "adapter", prefix="model")


@pytest.mark.backend_independent("it writes and reads files")
def test_a_part_of_a_module_cannot_be_saved(tmp_path):
    _, model = gpt2(tmp_path)
    adapt(model, ".*key", modules_to_save=".*query")
    with pytest.raises(ValueError, match=r"c_attn' whole, and only 1 of its 3"):
        keras_geolora.export_peft(model, tmp_path / "adapter")


@pytest.mark.backend_independent("it writes and reads files")
def test_what_has_no_name_is_told(tmp_path):
    model = channels()
    adapt(model, "conv", modules_to_save=["norm"])
    with pytest.warns(UserWarning, match="'norm/weight'.*names"):
        keras_geolora.export_peft(model, tmp_path, names={"conv": "0"})


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_model_without_a_head_gets_none(name, tmp_path):
    whole, model = MODELS[name](tmp_path)
    adapt(model, ".*(query|token_embedding)")
    if name == "bert":
        with pytest.warns(UserWarning, match="'head:logits/kernel'"):
            keras_geolora.export_peft(model, tmp_path / "adapter", prefix="")
    else:
        keras_geolora.export_peft(model, tmp_path / "adapter", prefix="")
    tensors = safetensors.numpy.load_file(
        tmp_path / "adapter/adapter_model.safetensors"
    )
    assert not [x for x in tensors if "lm_head" in x or "classifier" in x]
    base = whole.base_model
    peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    expected = here(model.backbone)
    if name == "bert":
        expected = expected["sequence_output"]
    with torch.no_grad():
        found = base(input_ids=torch.tensor(IDS).long()).last_hidden_state
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


# The command line knows what is in a file, not the model.


@pytest.mark.backend_independent("it writes and reads files")
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_convert_writes_what_trained_beside(name, tmp_path):
    _, model = MODELS[name](tmp_path)
    saves = {"bert": ".*layer_norm", "gpt2": "layer_norm"}[name]
    adapt(
        model, [".*(query|key|value)"], train_bias=True, modules_to_save=saves
    )
    keras_geolora.export_peft(model, tmp_path / "one")
    path = str(tmp_path / "mine.safetensors")
    model.save_geolora(path)
    output = ["--output", str(tmp_path / "other")]
    assert main(["convert", path, "--to", "peft", *output]) == 0
    one, other = (
        safetensors.numpy.load_file(
            tmp_path / folder / "adapter_model.safetensors"
        )
        for folder in ("one", "other")
    )
    assert set(one) == set(other)
    for key, x in one.items():
        np.testing.assert_array_equal(x, other[key])


@pytest.mark.backend_independent("it writes and reads files")
def test_convert_needs_the_model_for_convolutions(tmp_path, capsys):
    model = channels()
    model.enable_geolora(rank=1, targets="conv")
    path = str(tmp_path / "mine.safetensors")
    model.save_geolora(path)
    (tmp_path / "names.json").write_text('{"conv": "0"}')
    names = ["--names", str(tmp_path / "names.json")]
    assert main(["convert", path, "--to", "peft", *names]) == 2
    assert "Load it into its model" in capsys.readouterr().err
