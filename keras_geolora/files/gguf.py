"""Adapters as GGUF files, for llama.cpp."""

import pathlib
import re
import tempfile

import numpy as np

from keras_geolora.files.adapter_format import AdapterFileError, some
from keras_geolora.files.exported import exported
from keras_geolora.files.peft_modules import (
    check_products,
    pairs_of_modules,
)
from keras_geolora.files.peft_names import module_names
from keras_geolora.files.rounding import check_dtype, rounded
from keras_geolora.model.checks import check_model
from keras_geolora.model.parts import backbone_of
from keras_geolora.whole_files import write_whole

# What llama.cpp calls the families whose layers it names as below: what its
# `convert_hf_to_gguf.py` makes of them. KerasHub has one class for Gemma and
# Gemma 2.
ARCHITECTURES = {
    "LlamaBackbone": ("llama",),
    "MistralBackbone": ("llama",),
    "QwenBackbone": ("qwen2",),
    "Qwen3Backbone": ("qwen3",),
    "GemmaBackbone": ("gemma", "gemma2"),
}
TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Where rotary embeddings turn neighbours, not halves, so that the rows of
# queries and keys have another order than in transformers and KerasHub.
ROTATE_NEIGHBOURS = {"llama"}


def export_gguf(model, path, name=None, dtype="float32"):
    """Writes an adapter as a GGUF file, for `llama-server --lora path`.

    The base is a GGUF file of the same model, quantized or not. An update
    `scale * U S V.T` becomes the tensors `lora_a = U.T` and
    `lora_b = scale * V S`, named after that of the kernel, such as
    `blk.0.attn_q.weight.lora_a`. Ranks may differ.

    The families are KerasHub's Llama, Llama3, Mistral, Qwen, Qwen3, Gemma and
    Gemma 2. The package `gguf` writes the file:
    `pip install "keras_geolora[gguf]"`.

    Args:
        model: `keras.Model` on which `enable_geolora` was called, a backbone
            or a task such as a `CausalLM`.
        path: String or path, usually ending in `.gguf`.
        name: String, the adapter. Defaults to the active one.
        dtype: String, `"float32"`, `"float16"` or `"bfloat16"`, of the factors.
            Defaults to `"float32"`, which loses nothing.

    Returns:
        Dict: `architecture`, what llama.cpp calls the family; `rank`, the
        largest one; `dtype`; `rounding_error`, the largest relative error of
        an update after rounding, in the Frobenius norm.

    Raises:
        TypeError: If `model` is not a `keras.Model`.
        ValueError: If there is no such adapter, its bases are not orthonormal,
            the family is another one, or the adapter has parts that llama.cpp
            would ignore, such as trained biases.
        ModuleNotFoundError: If `gguf` is not installed.
        OSError: If the file cannot be written; an older one is unchanged.

    Example:

    ```python
    import tempfile

    import keras_hub
    import keras_geolora

    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=32,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=16,
    )
    backbone.enable_geolora(rank=2)
    with tempfile.TemporaryDirectory() as folder:
        report = keras_geolora.export_gguf(backbone, f"{folder}/mine.gguf")
    assert report["architecture"] == "llama"
    ```
    """
    check_model(model)
    adapter = exported(model, path, name)
    check_exportable(adapter)
    backbone = backbone_of(model)
    heads = backbone.num_query_heads, backbone.num_key_value_heads
    is_second = getattr(backbone, "use_post_ffw_norm", False)
    architecture = ARCHITECTURES[adapter.family][int(is_second)]
    return write_gguf(path, adapter, architecture, heads, dtype)


def write_gguf(path, adapter, architecture, heads, dtype):
    """Writes the file of `export_gguf`; returns the same report.

    Args:
        path: String or path.
        adapter: `Exported`.
        architecture: String, llama.cpp's name.
        heads: Tuple of ints, the numbers of heads of queries and of keys.
        dtype: As in `export_gguf`.
    """
    check_exportable(adapter)
    check_dtype(dtype)
    if architecture not in ARCHITECTURES[adapter.family]:
        raise ValueError(
            "The base must be the model that was adapted, of the architecture "
            f"{' or '.join(map(repr, ARCHITECTURES[adapter.family]))}. "
            f"Received: a GGUF file of architecture {architecture!r}"
        )
    gguf = gguf_package()
    named = module_names(adapter.family, adapter.updates, None)
    pairs = pairs_of_modules(adapter.updates, named)
    # llama.cpp multiplies by `alpha / rank` of each tensor.
    alpha = max(len(A) for A, _ in pairs.values())
    report = {
        "architecture": architecture,
        "rank": alpha,
        "dtype": dtype,
        "rounding_error": 0.0,
    }
    tensors = {}
    for module, (A, B) in pairs.items():
        if architecture in ROTATE_NEIGHBOURS:
            B = in_order_of_neighbours(B, module, heads)
        B = B * np.float32(len(A) / alpha)
        A, B, error = rounded(A, B, dtype, module)
        report["rounding_error"] = max(report["rounding_error"], error)
        tensors[f"{tensor_name(module)}.lora_a"] = A
        tensors[f"{tensor_name(module)}.lora_b"] = B
    with tempfile.TemporaryDirectory() as folder:
        temporary = pathlib.Path(folder, "adapter.gguf")
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        for key, x in tensors.items():
            add_tensor(gguf, writer, key, np.ascontiguousarray(x))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_whole(path, temporary.read_bytes())
    return report


def check_exportable(adapter):
    """Raises if llama.cpp has no place for an adapter, or for a part of it."""
    if adapter.family not in ARCHITECTURES:
        known = ", ".join(x.removesuffix("Backbone") for x in ARCHITECTURES)
        raise ValueError(
            f"GGUF adapters are written for {known} and their descendants "
            "only: only there the names and the order of llama.cpp's tensors "
            "are known. For another family, use `export_peft` and llama.cpp's "
            "`convert_lora_to_gguf.py`. Received: a model of class "
            f"{adapter.model_class}, with layers {some(adapter.updates)}"
        )
    check_products(adapter.classes)
    if adapter.left:
        raise ValueError(
            "llama.cpp adds products of factors to its own copy of the base "
            "model, and ignores whatever else has trained. Adapt without "
            "`train_bias` and `modules_to_save`. Received: trained "
            f"{some(adapter.left)}"
        )


def tensor_name(module):
    """Returns llama.cpp's name for the kernel of a module of transformers."""
    number, layer = re.fullmatch(r"layers\.(\d+)\.(.+)", module).groups()
    return f"blk.{number}.{TENSORS[layer]}.weight"


def in_order_of_neighbours(B, module, heads):
    """Returns `B` of a query or key with rows as llama.cpp orders them.

    Of each head, transformers rotates row `i` with row `i + dim / 2`, and
    llama.cpp row `2 i` with row `2 i + 1`.

    Args:
        B: Array of shape `(heads * dim, rank)`.
        module: String, the name of the module; others are returned as they are.
        heads: Tuple of ints, the numbers of heads of queries and of keys.
    """
    count = dict(zip(("q_proj", "k_proj"), heads, strict=True)).get(
        module.rpartition(".")[2]
    )
    if count is None:
        return B
    rows = B.reshape(count, 2, len(B) // count // 2, -1)
    return rows.swapaxes(1, 2).reshape(B.shape)


def add_tensor(gguf, writer, key, x):
    """Adds a tensor in the dtype of an array, which NumPy may not know."""
    if x.dtype == "bfloat16":
        bits = x.view("uint16")
        writer.add_tensor(key, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(key, x)


def base_of(path):
    """Returns what a GGUF file of a base model says of its architecture.

    Args:
        path: String or path.

    Returns:
        String, llama.cpp's name of the architecture, and a tuple of ints, the
        numbers of heads of queries and of keys.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"There is no file '{path}'.")
    try:
        fields = gguf_package().GGUFReader(path).fields
        architecture = fields["general.architecture"].contents()
        key = f"{architecture}.attention.head_count"
        queries = fields[key].contents()
        keys = fields.get(f"{key}_kv", fields[key]).contents()
    except (ValueError, KeyError, IndexError) as error:
        raise AdapterFileError(
            f"'{path}' is not a GGUF file of a language model: {error}."
        ) from error
    return architecture, (queries, keys)


def gguf_package():
    """Returns the package `gguf`."""
    try:
        import gguf
    except ImportError as error:
        raise ModuleNotFoundError(
            "GGUF files are written by the package gguf. Run: "
            '`pip install "keras_geolora[gguf]"`'
        ) from error
    return gguf
