"""A llama of llama.cpp's GGUF format, as a checkpoint of Hugging Face.

`write_checkpoint` makes the folder that transformers, PEFT and KerasHub read:
weights, tokenizer and configuration. Quantized weights become float32.
"""

import json
import pathlib
import re

import gguf
import numpy as np
from safetensors.numpy import save_file

# The parts of llama.cpp's names, and what transformers calls them.
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SPECIAL = 3  # the type of tokens that text does not contain


def write_checkpoint(gguf_path, folder):
    """Writes a GGUF file as a checkpoint of Hugging Face.

    Args:
        gguf_path: Path of a model of the architecture "llama", whose tokenizer
            merges pairs of bytes. Quantized weights are made float32.
        folder: Path of a folder that exists.

    Raises:
        ValueError: If it is another architecture or another tokenizer.
    """
    folder = pathlib.Path(folder)
    reader = gguf.GGUFReader(gguf_path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    check(values)
    config = llama_config(values)
    weights = {
        transformers_name(tensor.name): gguf.dequantize(
            tensor.data, tensor.tensor_type
        )
        for tensor in reader.tensors
    }
    config["tie_word_embeddings"] = "lm_head.weight" not in weights
    save_file(
        {name: in_order(name, w, config) for name, w in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer.json", tokenizer(values))
    write_json(folder / "tokenizer_config.json", tokenizer_config(values))


def check(values):
    for name, only in (
        ("general.architecture", "llama"),
        ("tokenizer.ggml.model", "gpt2"),
    ):
        if values[name] != only:
            raise ValueError(
                f"Only GGUF files with `{name}` '{only}' can be converted. "
                f"Received: {values[name]!r}."
            )


def llama_config(values):
    """Returns what transformers calls the sizes of the model."""

    def of(name):
        return values[f"llama.{name}"]

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(values["tokenizer.ggml.tokens"]),
        "num_hidden_layers": of("block_count"),
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_attention_heads": of("attention.head_count"),
        "num_key_value_heads": of("attention.head_count_kv"),
        "max_position_embeddings": of("context_length"),
        "rope_theta": of("rope.freq_base"),
        # A float32 in the file: 1e-5 is 9.999999747378752e-06 there.
        "rms_norm_eps": float(f"{of('attention.layer_norm_rms_epsilon'):.6g}"),
        "hidden_act": "silu",
        "bos_token_id": values["tokenizer.ggml.bos_token_id"],
        "eos_token_id": values["tokenizer.ggml.eos_token_id"],
        "pad_token_id": values["tokenizer.ggml.padding_token_id"],
    }


def transformers_name(name):
    """Returns `model.layers.3.mlp.up_proj.weight` for `blk.3.ffn_up.weight`."""
    block, part = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name).groups()
    prefix = f"model.layers.{block}." if block else ""
    return f"{prefix}{NAMES[part]}.weight"


def in_order(name, weight, config):
    """Gives the rows of queries and keys back the order they had.

    The rotation of a head acts on pairs of rows. In llama.cpp a pair is two
    neighbours, in transformers the halves of the head lie one after the other.
    """
    if name.endswith("q_proj.weight"):
        return halves_apart(weight, config["num_attention_heads"])
    if name.endswith("k_proj.weight"):
        return halves_apart(weight, config["num_key_value_heads"])
    return np.ascontiguousarray(weight)


def halves_apart(weight, heads):
    """Moves rows of each head: `a0 b0 a1 b1` becomes `a0 a1 b0 b1`."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def tokenizer(values):
    """Returns the file of the library `tokenizers`."""
    tokens = values["tokenizer.ggml.tokens"]
    kinds = values["tokenizer.ggml.token_type"]
    flags = {"lstrip": False, "rstrip": False, "normalized": False}
    special = [
        {"id": i, "content": token, "single_word": False, "special": True}
        | flags
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == SPECIAL
    ]
    by_bytes = {"type": "ByteLevel", "trim_offsets": True}
    by_bytes |= {"add_prefix_space": False, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [digits, by_bytes],
        },
        "post_processor": None,
        "decoder": by_bytes,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": values["tokenizer.ggml.merges"],
        },
    }


def tokenizer_config(values):
    """Returns which tokens start, end and fill up a text, and the template."""

    def token(kind):
        place = values[f"tokenizer.ggml.{kind}_token_id"]
        return values["tokenizer.ggml.tokens"][place]

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "pad_token": token("padding"),
        "unk_token": token("unknown"),
        "chat_template": values.get("tokenizer.chat_template"),
    }


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1), "utf-8")
