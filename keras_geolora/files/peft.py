"""Adapters in other formats: Hugging Face PEFT and KerasHub's LoRA."""

import json
import pathlib
import re
import warnings

import numpy as np
import safetensors.numpy

from keras_geolora.files.adapter_file import padded, plain_class_name
from keras_geolora.files.adapter_format import (
    CONTRADICTIONS,
    AdapterFileError,
    some,
)
from keras_geolora.files.exported import exported
from keras_geolora.files.peft_names import (
    TRANSPOSED,
    family_of,
    module_names,
    prefix_in,
    rows_of_part,
    split_name,
    task_type_of,
)
from keras_geolora.files.products import add_products
from keras_geolora.files.rounding import check_dtype, rounded
from keras_geolora.files.servers import (
    check_served,
    check_server,
    max_lora_rank,
    with_whole_packs,
)
from keras_geolora.layers.adapted import DEFAULT
from keras_geolora.layers.registry import (
    kernel_shape,
)
from keras_geolora.layers.tree import stable_paths
from keras_geolora.model.checks import (
    check_can_adapt,
    check_model,
    check_name,
)
from keras_geolora.model.parts import backbone_of
from keras_geolora.whole_files import write_together

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Options of PEFT with which an adapter is not a plain update of kernels.
UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
# The `init_lora_weights` of PEFT that leave the pretrained kernels alone.
PLAIN_INITS = "none", "true", "false", "gaussian", "eva", "mica", "orthogonal"


def export_peft(
    model,
    folder,
    name=None,
    names=None,
    prefix=None,
    base_model=None,
    pad=False,
    server=None,
    dtype="float32",
):
    """Writes an adapter as a LoRA adapter of Hugging Face PEFT.

    The folder gets `adapter_config.json` and `adapter_model.safetensors`, for
    `peft.PeftModel.from_pretrained(hf_model, folder)`. Files of an earlier
    export are exchanged, both at once. A layer's update
    `scale * U S V.T` becomes `lora_A = U.T` and `lora_B = scale * V S`; the
    ranks are in `rank_pattern`. What trained beside the factors, such as
    biases and heads, has no place in the format; a warning lists it.

    The module names of transformers 5 are known for the backbones Bert,
    Roberta, XLMRoberta, DebertaV3, DistilBert, Llama, Llama3, Mistral, Qwen,
    Qwen3, Gemma, GPT2 and ViT.

    Args:
        model: `keras.Model` on which `enable_geolora` was called.
        folder: String or path, created if it does not exist.
        name: String, the adapter. Defaults to the active one.
        names: Dict from layer paths to module names, or a callable
            `path -> name`, for other families. Defaults to `None`.
        prefix: String, the path of the backbone in the Hugging Face model: `""`
            for an `AutoModel`, `"bert"` or `"model"` in one with a head.
            Defaults to that of the model that corresponds to `model`: a task
            such as a `CausalLM` has a head, a backbone has none. With `names`
            it defaults to `""`.
        base_model: String, the Hugging Face name of the base model, for the
            config. Defaults to `None`.
        pad: Bool, whether to pad all layers with zeros to the largest rank, for
            readers that expect one rank. Defaults to `False`.
        server: String, `"vllm"` or `"sglang"`, whose rules the files shall
            keep: padded ranks, whole packs of projections, the names of a
            model with its head, and nothing that the server would leave out.
            Both read the same files. Defaults to `None`.
        dtype: String, `"float32"`, `"float16"` or `"bfloat16"`, of the factors.
            Defaults to `"float32"`, which loses nothing.

    Returns:
        Dict: `rank`, the largest one; `dtype`; `rounding_error`, the largest
        over all modules of the norm of an update's error relative to the norm
        of the update; with `server` also `max_lora_rank`, what to start the
        server with.

    Raises:
        TypeError: If `model` is not a `keras.Model`.
        ValueError: If there is no such adapter, its bases are not
            orthonormal, a layer has no name or no counterpart in PEFT's LoRA,
            a server would leave a part out, or a number is too large for
            `dtype`.
        OSError: If a file cannot be written.

    Example:

    ```python
    import tempfile

    import keras
    import keras_geolora

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    path = model.layers[0].name
    model.enable_geolora(rank=2)
    with tempfile.TemporaryDirectory() as folder:
        keras_geolora.export_peft(model, folder, names={"dense": "score"})
    ```
    """
    check_model(model)
    return write_peft(
        folder,
        exported(model, folder, name),
        names=names,
        prefix=prefix,
        base_model=base_model,
        pad=pad,
        server=server,
        dtype=dtype,
    )


def write_peft(folder, adapter, names, prefix, base_model, pad, server, dtype):
    """Writes the two files of `export_peft`; returns the same report.

    Args:
        folder: String or path.
        adapter: `Exported`.
        names: As in `export_peft`.
        prefix: As in `export_peft`.
        base_model: As in `export_peft`.
        pad: As in `export_peft`.
        server: As in `export_peft`.
        dtype: As in `export_peft`.
    """
    check_server(server)
    check_dtype(dtype)
    check_classes(adapter.classes)
    family = adapter.family
    named = module_names(family, adapter.updates, names)
    if prefix is None:
        has_head = adapter.is_task or server is not None
        prefix = prefix_in(family, has_head and names is None)
    pairs = pairs_of_modules(adapter.updates, named)
    if server:
        check_served(server, pairs, adapter.left)
        shaped = module_names(family, adapter.shapes, names, complete=False)
        shapes = {m: adapter.shapes[path] for path, m in shaped.items()}
        pairs = with_whole_packs(pairs, shapes)
    largest = max(len(A) for A, _ in pairs.values())
    report = {"rank": largest, "dtype": dtype, "rounding_error": 0.0}
    if server:
        report["max_lora_rank"] = max_lora_rank(server, largest)
    dotted = f"{prefix}." if prefix else ""
    tensors, ranks = {}, {}
    for module, (A, B) in pairs.items():
        if pad or server:
            A = padded(A, (largest, A.shape[1]))
            B = padded(B, (len(B), largest))
        A, B, error = rounded(A, B, dtype, module)
        report["rounding_error"] = max(report["rounding_error"], error)
        key = f"{PREFIX}{dotted}{module}"
        tensors[f"{key}.lora_A.weight"] = np.ascontiguousarray(A)
        tensors[f"{key}.lora_B.weight"] = np.ascontiguousarray(B)
        ranks[f"{dotted}{module}"] = len(A)
    task_type = task_type_of(adapter.model_class)
    config = {
        **config_of(ranks),
        "task_type": "CAUSAL_LM" if server else task_type,
        "base_model_name_or_path": base_model,
        "fan_in_fan_out": family in TRANSPOSED,
    }
    if adapter.left:
        warnings.warn(
            "PEFT's LoRA format stores only factors. Other trained variables "
            f"are not in '{folder}': {some(adapter.left)}. Save them with "
            "`model.save_geolora(...)`.",
            stacklevel=3,
        )
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = safetensors.numpy.save(tensors, {"format": "pt"})
    described = json.dumps(config, indent=2).encode()
    write_together(folder, {WEIGHTS: [weights], CONFIG: [described]})
    return report


def check_classes(classes):
    """Raises if a layer is none that multiplies rows with its kernel.

    Args:
        classes: Dict from path to the name of the layer's class.
    """
    for path, name in classes.items():
        if not is_product(name):
            raise ValueError(
                "PEFT's LoRA for linear layers has no counterpart for an "
                f"adapter on a layer of class {name}. Leave the layer out "
                "with `enable_geolora(exclude=...)`, or merge and export the "
                f"whole model. Received: adapted layer '{path}'"
            )


def config_of(ranks):
    """Returns what a config says of a LoRA whose `lora_B` contain the scale.

    Args:
        ranks: Dict from module to rank.
    """
    largest = max(ranks.values())
    smaller = {module: r for module, r in ranks.items() if r != largest}
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "target_modules": list(ranks),
        "r": largest,
        "rank_pattern": smaller,
        # PEFT multiplies by `alpha / r`, which is 1.
        "lora_alpha": largest,
        "alpha_pattern": smaller,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def pairs_of_modules(updates, named):
    """Returns a dict from module to `A, B`.

    Args:
        updates: Dict from path to `(U, S, V, scale)`.
        named: Dict from path to the name of a module, or of a part of one.
    """
    parts = {}
    for path, (U, S, V, scale) in updates.items():
        module, part, count = split_name(named[path])
        block = U.T, V @ (S.T * scale), part, count
        others = parts.setdefault(module, [])
        if any(part == p or count != c for _, _, p, c in others):
            raise ValueError(
                "Every layer needs a module of its own, or a part of one. "
                f"Received: the name '{named[path]}' for layer '{path}' and "
                "for another layer"
            )
        others.append(block)
    return {module: fused(blocks) for module, blocks in parts.items()}


def import_peft(model, folder, name=DEFAULT, names=None):
    """Loads a LoRA adapter of Hugging Face PEFT into a model, exactly.

    Every product `B A` becomes orthonormal bases and singular values, by QR
    decompositions of the factors and a small singular value decomposition.
    The adapter is activated and can train like any other.

    Args:
        model: Built `keras.Model`, the same base model.
        folder: String or path of the folder with `adapter_config.json` and
            `adapter_model.safetensors`.
        name: String, the name of the adapter. Defaults to `"default"`.
        names: As in `export_peft`.

    Returns:
        The model itself.

    Raises:
        TypeError: If `model` is not a `keras.Model`.
        OSError: If a file is missing.
        ValueError: If the adapter is not a LoRA adapter, has parts that are not
            an update of the pretrained kernels, or does not fit the model. The
            model is unchanged then.

    Example:

    ```python
    import tempfile

    import keras
    import numpy as np
    import keras_geolora

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.enable_geolora(rank=2)
    names = {"dense": "score"}
    with tempfile.TemporaryDirectory() as folder:
        keras_geolora.export_peft(model, folder, names=names)
        model.remove_geolora()
        keras_geolora.import_peft(model, folder, names=names)
    assert model.layers[0].is_adapted
    ```
    """
    check_model(model)
    check_name(name)
    check_can_adapt(model, name)
    folder = pathlib.Path(folder)
    pairs = read_peft(folder)
    layers = {
        path: layer
        for path, layer in stable_paths(backbone_of(model)).items()
        if kernel_shape(layer) is not None
        and is_product(plain_class_name(layer))
    }
    named = module_names(family_of(model), layers, names, complete=False)
    updates, left = hand_out(pairs, named, folder)
    unknown = sorted(key for key in pairs if left[key].all())
    if unknown or not updates:
        raise AdapterFileError(
            f"'{folder}' adapts modules that are not known for model "
            f"'{model.name}': {some(unknown)}. The known ones are "
            f"{some(named.values())}. Map layers to modules with "
            "`names={path: module}`. Nothing was loaded."
        )
    in_part = sorted(key for key, (_, B) in pairs.items() if B[left[key]].any())
    if in_part:
        raise AdapterFileError(
            f"'{folder}' updates all of {some(in_part)}, but only a part of "
            "it is mapped to the model. Name the layers of the other parts, "
            "too: `names={path: 'module[1/3]'}`. Nothing was loaded."
        )
    add_products(model, name, {p: layers[p] for p in updates}, updates)
    return model


def hand_out(pairs, named, folder):
    """Finds the factors of each layer, which may be part of a module.

    Args:
        pairs: Dict from module to `A, B`.
        named: Dict from the path of a layer to the name of its module.
        folder: String or path, for messages.

    Returns:
        Dict from path to the two factors of an update, and dict from module to
        a bool array: the rows of `B` that belong to no layer.
    """
    updates = {}
    left = {key: np.ones(len(B), bool) for key, (_, B) in pairs.items()}
    for path, full_name in named.items():
        module, part, count = split_name(full_name)
        for key, (A, B) in pairs.items():
            if key == module or key.endswith(f".{module}"):
                if path in updates:
                    raise AdapterFileError(
                        f"'{folder}' has more than one module that could be "
                        f"layer '{path}'. Choose one with `names`. Nothing "
                        "was loaded."
                    )
                rows = rows_of_part(B, part, count)
                updates[path] = A.T, B[rows].T
                left[key][rows] = False
    return updates, left


def fused(blocks):
    """Returns `A, B` of a module whose parts are adapted separately."""
    rank = sum(len(A) for A, *_ in blocks)
    _, first, _, count = blocks[0]
    B = np.zeros((count * len(first), rank), "float32")
    at = 0
    for A, block, part, _ in blocks:
        B[rows_of_part(B, part, count), at : at + len(A)] = block
        at += len(A)
    return np.concatenate([A for A, *_ in blocks]), B


def is_product(name):
    """Returns whether layers of a class multiply inputs by a kernel."""
    return not any(word in name for word in ("Conv", "Embedding"))


def read_peft(folder):
    """Returns the factors of one export, even if another one is under way.

    An export exchanges both files at once, but maybe between two of our reads.
    """
    config = None
    while config != (latest := read_peft_config(folder / CONFIG)):
        config = latest
        pairs = read_peft_weights(folder / WEIGHTS, config)
    return pairs


def read_peft_config(path):
    """Reads the config of a PEFT adapter; refuses all but plain LoRA."""
    try:
        config = json.loads(path.read_text())
        kind = config["peft_type"]
        alphas = [
            config["lora_alpha"],
            *(config.get("alpha_pattern") or {}).values(),
        ]
        usable = np.isfinite([float(alpha) for alpha in alphas]).all()
    except CONTRADICTIONS as error:
        raise AdapterFileError(f"'{path}' is not a LoRA config.") from error
    unsupported = [key for key in UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if not usable:
        raise AdapterFileError(
            f"'{path}' has a `lora_alpha` that is not finite."
        )
    if kind != "LORA" or unsupported:
        raise AdapterFileError(
            "Only plain LoRA can be imported, which updates kernels and "
            f"nothing else. Received: '{path}' with peft_type='{kind}'"
            + (f" and {unsupported}" if unsupported else "")
        )
    check_init(path, config.get("init_lora_weights"))
    return config


def check_init(path, init):
    """Refuses adapters of kernels that PEFT changed before training."""
    if str(init).lower() in PLAIN_INITS:
        return
    raise AdapterFileError(
        f"With the initialization '{init}', PEFT changes the pretrained "
        "kernels, and the adapter is an update of the changed ones. For "
        "PiSSA, OLoRA, CorDA and LoRA-GA, PEFT can convert it into an update "
        "of the pretrained kernels: `peft_model.save_pretrained(folder, "
        "path_initial_model_for_weight_conversion=initial)`, where `initial` "
        "is the folder of the adapter before it was trained. Import the "
        f"converted adapter. Received: '{path}' with "
        f"init_lora_weights={init!r}"
    )


def read_peft_weights(path, config):
    """Returns a dict from module to `A, B`, with the scaling in `B`."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{path}'.")
    try:
        tensors = safetensors.numpy.load_file(path)
    except Exception as error:
        raise AdapterFileError(
            f"'{path}' is damaged, or uses a dtype that NumPy does not "
            f"support: {error}."
        ) from error
    pairs = {}
    for key in tensors:
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise AdapterFileError(
                f"'{path}' has '{key}', which is not a factor of a linear "
                "layer. Nothing was loaded."
            )
        pairs.setdefault(match[1].removeprefix(PREFIX), {})[match[2]] = key
    result = {}
    for module, keys in pairs.items():
        if set(keys) != {"A", "B"}:
            raise AdapterFileError(
                f"'{path}' has only one of the two factors of '{module}'."
            )
        A, B = (tensors[keys[half]].astype("float64") for half in "AB")
        fit = A.ndim == B.ndim == 2 and len(A) == B.shape[1]
        if not (fit and A.size and B.size):
            raise AdapterFileError(
                f"The shapes of the factors of '{module}' do not fit together."
            )
        if not (np.isfinite(A).all() and np.isfinite(B).all()):
            raise AdapterFileError(
                f"'{module}' has values that are not finite."
            )
        alpha = in_pattern(config.get("alpha_pattern"), module)
        alpha = float(config["lora_alpha"] if alpha is None else alpha)
        root = 0.5 if config.get("use_rslora") else 1
        result[module] = A, B * (alpha / len(A) ** root)
    return result


def in_pattern(patterns, module):
    """Returns the value of a module in a `rank_pattern` or `alpha_pattern`."""
    for pattern, value in (patterns or {}).items():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise AdapterFileError(
                f"'{pattern}' in the config is not a valid regular "
                f"expression: {error}."
            ) from error
        if found:
            return value
    return None
