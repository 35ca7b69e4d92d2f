"""What transformers calls the layers of KerasHub's backbones."""

import re

from keras_geolora.files.adapter_format import some
from keras_geolora.model.parts import backbone_of

ENCODER = {
    "self_attention_layer/query": "attention.self.query",
    "self_attention_layer/key": "attention.self.key",
    "self_attention_layer/value": "attention.self.value",
    "self_attention_layer/attention_output": "attention.output.dense",
    "feedforward_intermediate_dense": "intermediate.dense",
    "feedforward_output_dense": "output.dense",
}


DECODER = {
    "self_attention/query": "self_attn.q_proj",
    "self_attention/key": "self_attn.k_proj",
    "self_attention/value": "self_attn.v_proj",
    "self_attention/attention_output": "self_attn.o_proj",
    "feedforward_gate_dense": "mlp.gate_proj",
    "feedforward_intermediate_dense": "mlp.up_proj",
    "feedforward_output_dense": "mlp.down_proj",
}


LLAMA = ("transformer_layer_", "layers.", DECODER)


# The names in transformers 5 of the layers of KerasHub's backbones: the path of
# a block up to its number, its name up to its number, and the layers of a
# block. `[1/3]` is the second third of the columns of a kernel.
FAMILIES = {
    "BertBackbone": ("transformer_layer_", "encoder.layer.", ENCODER),
    "RobertaBackbone": ("transformer_layer_", "encoder.layer.", ENCODER),
    "XLMRobertaBackbone": ("transformer_layer_", "encoder.layer.", ENCODER),
    "DebertaV3Backbone": (
        "disentangled_attention_encoder_layer_",
        "encoder.layer.",
        {
            **ENCODER,
            "self_attention_layer/query": "attention.self.query_proj",
            "self_attention_layer/key": "attention.self.key_proj",
            "self_attention_layer/value": "attention.self.value_proj",
        },
    ),
    "DistilBertBackbone": (
        "transformer_layer_",
        "transformer.layer.",
        {
            "self_attention_layer/query": "attention.q_lin",
            "self_attention_layer/key": "attention.k_lin",
            "self_attention_layer/value": "attention.v_lin",
            "self_attention_layer/attention_output": "attention.out_lin",
            "feedforward_intermediate_dense": "ffn.lin1",
            "feedforward_output_dense": "ffn.lin2",
        },
    ),
    "LlamaBackbone": LLAMA,
    "MistralBackbone": LLAMA,
    "QwenBackbone": LLAMA,
    "Qwen3Backbone": LLAMA,
    "GemmaBackbone": (
        "decoder_block_",
        "layers.",
        {
            "attention/query": "self_attn.q_proj",
            "attention/key": "self_attn.k_proj",
            "attention/value": "self_attn.v_proj",
            "attention/attention_output": "self_attn.o_proj",
            "ffw_gating": "mlp.gate_proj",
            "ffw_gating_2": "mlp.up_proj",
            "ffw_linear": "mlp.down_proj",
        },
    ),
    "GPT2Backbone": (
        "transformer_layer_",
        "h.",
        {
            "self_attention/query": "attn.c_attn[0/3]",
            "self_attention/key": "attn.c_attn[1/3]",
            "self_attention/value": "attn.c_attn[2/3]",
            "self_attention/attention_output": "attn.c_proj",
            "feedforward_intermediate_dense": "mlp.c_fc",
            "feedforward_output_dense": "mlp.c_proj",
        },
    ),
    "ViTBackbone": (
        "vit_encoder/transformer_block_",
        "layers.",
        {
            "mha/query": "attention.q_proj",
            "mha/key": "attention.k_proj",
            "mha/value": "attention.v_proj",
            "mha/attention_output": "attention.o_proj",
            "mlp/dense": "mlp.fc1",
            "mlp/dense_1": "mlp.fc2",
        },
    ),
}


OTHERS = {"BertBackbone": {"pooled_dense": "pooler.dense"}}


FIRST_BLOCK = {"ViTBackbone": 1}


# Where transformers' models of tasks keep the backbone. Decoders: `model`.
IN_A_TASK = {
    "BertBackbone": "bert",
    "RobertaBackbone": "roberta",
    "XLMRobertaBackbone": "roberta",
    "DebertaV3Backbone": "deberta",
    "DistilBertBackbone": "distilbert",
    "GPT2Backbone": "transformer",
    "ViTBackbone": "vit",
}


# Families whose kernels transformers stores like Keras, not transposed.
TRANSPOSED = {"GPT2Backbone"}


def module_names(family, layers, names, complete=True):
    """Returns a dict from path to the name of the module in transformers.

    Args:
        family: String, the name of the backbone's class in `FAMILIES`, or
            `None`.
        layers: Paths of layers.
        names: As in `export_peft`.
        complete: Bool, whether a layer without a name is an error.
    """
    if names is not None:
        find = names if callable(names) else names.get
        unknown = [] if callable(names) else sorted(set(names) - set(layers))
        if unknown:
            raise ValueError(
                "The keys of `names` must be paths of adapted layers. "
                f"Received: names for {some(unknown)}; the known paths are "
                f"{some(layers)}"
            )
    else:
        if family is None:
            raise ValueError(
                "The names of modules are only known for "
                f"{', '.join(FAMILIES)}. For other models, pass "
                "`names={path: module}` or a callable. Received: another "
                f"model, with layers {some(layers)}"
            )

        def find(path):
            return name_in(family, path)

    found = {path: find(path) for path in layers}
    nameless = [path for path, name in found.items() if name is None]
    if nameless and complete:
        raise ValueError(
            "Every adapted layer needs the name of its module. Pass "
            "`names={path: module}`, or do not adapt the layer. Received: no "
            f"name for {some(nameless)}"
        )
    return {path: name for path, name in found.items() if name is not None}


def name_in(family, path):
    """Returns the name of the module at a path, or `None`."""
    if path in OTHERS.get(family, {}):
        return OTHERS[family][path]
    block, name, inner = FAMILIES[family]
    match = re.fullmatch(rf"{block}(\d+)/(.+)", path)
    if match is None or match[2] not in inner:
        return None
    number = int(match[1]) - FIRST_BLOCK.get(family, 0)
    return f"{name}{number}.{inner[match[2]]}"


def family_of(model):
    """Returns the name in `FAMILIES` of a backbone's class, or `None`."""
    mro = (cls.__name__ for cls in type(backbone_of(model)).__mro__)
    return next((name for name in mro if name in FAMILIES), None)


def prefix_in(family, is_task):
    """Returns where transformers' model keeps the backbone of a family.

    Args:
        family: String, one of `FAMILIES`, or `None`.
        is_task: Bool, whether the model is a task, not a backbone.
    """
    if family is None or not is_task:
        return ""
    return IN_A_TASK.get(family, "model")


def task_type_of(class_name):
    """Returns PEFT's name for the kind of a task, or `None`.

    PEFT needs it to generate. For classifiers it would add heads of its own.
    """
    return "CAUSAL_LM" if class_name.endswith("CausalLM") else None


def split_name(name):
    """Splits `module[part/count]`; no brackets mean the whole module."""
    match = re.fullmatch(r"(.+)\[(\d+)/(\d+)\]", name)
    if not match:
        return name, 0, 1
    part, count = int(match[2]), int(match[3])
    if part >= count:
        raise ValueError(
            "The parts of a module are counted from 0: of three, the last is "
            f"'{match[1]}[2/3]'. Received: '{name}' in `names`"
        )
    return match[1], part, count


def rows_of_part(B, part, count):
    """Returns the slice of the rows of one part of a fused module."""
    rows = len(B) // count
    return slice(part * rows, (part + 1) * rows)
