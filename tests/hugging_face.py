"""Tiny models of transformers, and the same in KerasHub."""

import json

import keras_hub
import numpy as np
import safetensors.numpy
import torch
import transformers
from keras import ops

from keras_geolora.layers.factor import stacked
from keras_geolora.layers.tree import adapted_layers

RNG = np.random.default_rng(0)
IDS = RNG.integers(5, 30, (2, 6)).astype("int32")
MASK = np.ones_like(IDS)
IMAGES = RNG.random((2, 8, 8, 3)).astype("float32")

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
GROUPED = {
    **SMALL,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
# The KerasHub class, the class and the configuration in transformers.
MODELS = {
    # KerasHub approximates GELU.
    "Bert": (transformers.BertModel, {**SMALL, "hidden_act": "gelu_new"}),
    "Roberta": (transformers.RobertaModel, {**SMALL, "pad_token_id": 1}),
    "XLMRoberta": (
        transformers.XLMRobertaModel,
        {**SMALL, "pad_token_id": 1},
    ),
    "DebertaV3": (
        transformers.DebertaV2Model,
        {
            **SMALL,
            "relative_attention": True,
            "position_buckets": 4,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    ),
    "DistilBert": (
        transformers.DistilBertModel,
        {
            "vocab_size": 32,
            "dim": 16,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 24,
            "max_position_embeddings": 16,
        },
    ),
    "Llama": (transformers.LlamaModel, GROUPED),
    "Mistral": (transformers.MistralModel, {**GROUPED, "sliding_window": 8}),
    "Qwen": (transformers.Qwen2Model, GROUPED),
    # Of larger weights another epsilon in KerasHub changes nothing.
    "Qwen3": (
        transformers.Qwen3Model,
        {**GROUPED, "head_dim": 4, "initializer_range": 0.5},
    ),
    "Gemma": (transformers.GemmaModel, {**GROUPED, "head_dim": 4}),
    "GPT2": (
        transformers.GPT2Model,
        {
            "vocab_size": 32,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 16,
        },
    ),
    "ViT": (
        transformers.ViTModel,
        {
            **{k: v for k, v in SMALL.items() if "size" in k or "num" in k},
            "image_size": 8,
            "patch_size": 4,
            "layer_norm_eps": 1e-6,
        },
    ),
}
EXPERTS = {
    **GROUPED,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.5,
}
MODELS |= {
    "Mixtral": (
        transformers.MixtralModel,
        {**EXPERTS, "num_local_experts": 3, "sliding_window": 8},
    ),
    "QwenMoe": (
        transformers.Qwen2MoeModel,
        {
            **EXPERTS,
            "num_experts": 3,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 12,
        },
    ),
    "Qwen3Moe": (
        transformers.Qwen3MoeModel,
        {
            **EXPERTS,
            "num_experts": 3,
            "moe_intermediate_size": 12,
            "head_dim": 4,
        },
    ),
}
# KerasHub has no converter for DeBERTa; what it means is tested by names.
CONVERTED = [name for name in MODELS if name != "DebertaV3"]


def hugging_face(name, folder):
    """A random model of transformers, which is saved to a folder."""
    torch.manual_seed(0)
    cls, options = MODELS[name]
    config = cls.config_class(**options)
    # Some of KerasHub's converters round weights to float16.
    model = cls(config).half().float().eval()
    if "Roberta" in name:  # KerasHub leaves it out
        model.embeddings.token_type_embeddings.weight.data.zero_()
    model.save_pretrained(folder)
    path = folder / "config.json"
    known = {"rope_theta": 10000.0, **json.loads(path.read_text())}
    if name == "Qwen3Moe":  # KerasHub knows another name
        known["num_experts"] = known["num_local_experts"]
    path.write_text(json.dumps(known))
    # A checkpoint of a whole model has a prefix, which KerasHub expects.
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    prefix = {"GPT2": "", "ViT": "vit."}.get(name, model.base_model_prefix)
    prefix = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
    tensors = {f"{prefix}{key}": value for key, value in tensors.items()}
    # KerasHub wants a head, and rounds that of Mistral.
    if name == "Mistral" or name in ("Mixtral", "QwenMoe", "Qwen3Moe"):
        tensors["lm_head.weight"] = np.zeros((32, 16), "float32")
    safetensors.numpy.save_file(
        tensors, folder / "model.safetensors", {"format": "pt"}
    )
    return model


def keras_model(name, folder):
    backbone = getattr(keras_hub.models, f"{name}Backbone")
    return backbone.from_preset(str(folder))


def keras_hidden(model, name):
    """The hidden states, without a trace of the model."""
    if name == "ViT":
        return ops.convert_to_numpy(model(IMAGES))
    inputs = {"token_ids": IDS, "padding_mask": MASK, "segment_ids": 0 * IDS}
    output = model({x.name: inputs[x.name] for x in model.inputs})
    if isinstance(output, dict):
        output = output["sequence_output"]
    return ops.convert_to_numpy(output)


def torch_hidden(model, name):
    with torch.no_grad():
        if name == "ViT":
            pixels = torch.tensor(IMAGES).permute(0, 3, 1, 2)
            return model(pixel_values=pixels).last_hidden_state.numpy()
        ids, mask = torch.tensor(IDS).long(), torch.tensor(MASK).long()
        output = model(input_ids=ids, attention_mask=mask)
        return output.last_hidden_state.numpy()


def move(model):
    rng = np.random.default_rng(1)
    for layer in adapted_layers(model).values():
        if layer.kernel_view.batch:
            move_experts(layer, rng)
            continue
        layer.adapter.S.assign(
            np.diag(rng.normal(size=layer.adapter.max_rank)) / 2
        )
        rank = layer.rank
        core = ops.convert_to_numpy(layer.adapter.S).copy()
        core[rank:] = core[:, rank:] = 0
        layer.adapter.S.assign(core)


def move_experts(layer, rng):
    """Gives the experts ranks of 1, 2, 1 ..."""
    view, found = layer.kernel_view, []
    for expert in range(view.count):
        rank = 1 + expert % 2
        U, V = (
            np.linalg.qr(rng.normal(size=(size, rank)))[0]
            for size in view.matrix_shape
        )
        found.append((U, np.diag(2 + rng.random(rank)), V))
    layer.adapter.assign_factors(*stacked(found))
