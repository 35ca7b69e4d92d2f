"""What vLLM and SGLang require of a PEFT folder, beyond what PEFT does.

Read in the sources of vLLM 0.33 (`lora/peft_helper.py`, `lora/lora_model.py`,
`config/lora.py`) and of SGLang 0.5.23 (`lora/lora.py`, `lora/mem_pool.py`):

- One rank and one scaling for a file. SGLang and older releases of vLLM ignore
  `rank_pattern` and `alpha_pattern`.
- Nothing but factors: no biases, no `modules_to_save`.
- The names of a model with its head, `model.layers.0...`. vLLM ignores others.
- Projections that a server keeps as one matrix, such as `qkv_proj`, are in the
  file by their own names. SGLang wants all of them, or none.
- vLLM rounds the rank up to one of `VLLM_RANKS`.
"""

import numpy as np

from keras_geolora.files.adapter_format import some

SERVERS = "vllm", "sglang"
# What `--max-lora-rank` of vLLM may be.
VLLM_RANKS = 1, 8, 16, 32, 64, 128, 256, 320, 512
# What a server keeps as one matrix.
PACKS = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
PROJECTIONS = (*PACKS[0], "o_proj", *PACKS[1], "down_proj")


def check_server(server):
    """Raises if there is no such server."""
    if server is not None and server not in SERVERS:
        raise ValueError(
            "`server` says whose rules the files are to keep. It must be "
            f"'vllm', 'sglang' or None. Received: server={server!r}"
        )


def check_served(server, modules, left):
    """Raises if a server would ignore a part of an adapter.

    Args:
        server: String, one of `SERVERS`.
        modules: Names of modules.
        left: Names of what trained beside the factors.
    """
    others = [m for m in modules if m.rpartition(".")[2] not in PROJECTIONS]
    if others:
        raise ValueError(
            f"With `server`, only the projections of a decoder are exported: "
            f"{', '.join(PROJECTIONS)}. Leave other layers out with "
            "`enable_geolora(exclude=...)`, or export without `server` if "
            "yours can serve them. Received: "
            f"server={server!r} and the modules {some(others)}"
        )
    if left:
        raise ValueError(
            "A server adds products of factors to its own copy of the base "
            "model, and ignores whatever else has trained. Adapt without "
            "`train_bias` and `modules_to_save`, or merge and serve the whole "
            f"model. Received: server={server!r} and trained {some(left)}"
        )


def max_lora_rank(server, rank):
    """Returns the smallest `--max-lora-rank` with which a server takes a rank.

    Args:
        server: String, one of `SERVERS`.
        rank: Int, the rank of a file.
    """
    if server != "vllm":
        return rank
    if rank > VLLM_RANKS[-1]:
        raise ValueError(
            f"vLLM serves ranks up to {VLLM_RANKS[-1]}. Train with a smaller "
            "`max_rank`, or cut the adapter: `GeoLoRA.cut`. Received: "
            f"a layer of rank {rank}"
        )
    return min(r for r in VLLM_RANKS if r >= rank)


def with_whole_packs(pairs, shapes):
    """Adds zeros for projections that a server packs with adapted ones.

    Args:
        pairs: Dict from module to `A, B`.
        shapes: Dict from module to `(input_dim, output_dim)`, of all layers.

    Returns:
        Dict like `pairs`, in the order of `PROJECTIONS` inside each block.
    """
    whole = dict(pairs)
    for module in pairs:
        parent, _, projection = module.rpartition(".")
        for pack in PACKS:
            for other in pack if projection in pack else ():
                name = f"{parent}.{other}"
                if name not in whole:
                    whole[name] = zeros(name, module, shapes)
    return whole


def zeros(name, module, shapes):
    """Returns factors of rank 1 that are zero, for a module beside another."""
    if name not in shapes:
        raise ValueError(
            f"SGLang needs '{name}' beside '{module}', and its shape is not "
            "known. Adapt that layer, too, or export from the model. "
            f"Received: factors of '{module}' only"
        )
    input_dim, output_dim = shapes[name]
    A, B = np.zeros((1, input_dim)), np.zeros((output_dim, 1))
    return A.astype("float32"), B.astype("float32")
