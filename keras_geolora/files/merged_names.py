"""What checkpoints on Hugging Face call the modules of transformers 5.

Older checkpoints have other names than the model, and a matrix for each expert.
"""

import re

VIT = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
}
# The norms of the first BERT.
OLD_PARAMETERS = {"weight": "gamma", "bias": "beta"}
# What may be a copy of the embedding of tokens.
TOKEN_HEADS = (
    "lm_head.weight",
    "cls.predictions.decoder.weight",
    "lm_head.decoder.weight",
    "vocab_projector.weight",
)
# The matrices of an expert, by parameter: one, or the gate and the other.
EXPERT = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


def names_on_disk(module, parameter):
    """Returns what a parameter of a module may be called.

    Args:
        module: String, the name of the module.
        parameter: String, that of the parameter.

    Returns:
        List of strings, each of which may follow a prefix.
    """
    modules = [module]
    number, inner = split_block(module)
    if inner in VIT:
        modules.append(f"encoder.layer.{number}.{VIT[inner]}")
    if inner == "mlp.gate":
        modules.append(f"layers.{number}.block_sparse_moe.gate")
    names = [f"{name}.{parameter}" for name in modules]
    if module.endswith("LayerNorm") and parameter in OLD_PARAMETERS:
        names.append(f"{module}.{OLD_PARAMETERS[parameter]}")
    return names


def names_of_experts(module, expert):
    """Returns what the matrices of one expert may be called.

    Args:
        module: String, the name of a parameter of all experts.
        expert: Int, the number of the expert.

    Returns:
        List of tuples of strings. The rows of a matrix of the parameter are
        those of the tensors of a tuple, one after the other.
    """
    holder, _, parameter = module.rpartition(".")
    number, _ = split_block(module)
    ours, mixtral = EXPERT[parameter]
    old = f"layers.{number}.block_sparse_moe.experts"
    return [
        tuple(f"{holder}.{expert}.{name}.weight" for name in ours),
        tuple(f"{old}.{expert}.{name}.weight" for name in mixtral),
    ]


def split_block(module):
    """Returns the number of a block, and the name of a module inside."""
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
    return match.groups() if match else (None, None)
