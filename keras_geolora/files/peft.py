"""Writes adapters of Hugging Face PEFT, and reads them."""

import pathlib

import keras
import numpy as np

from keras_geolora.files.adapter_file import plain_class_name
from keras_geolora.files.adapter_format import AdapterFileError, some
from keras_geolora.files.exported import Convolution, exported
from keras_geolora.files.family_names import LM_HEAD
from keras_geolora.files.peft_copies import values_of
from keras_geolora.files.peft_modules import (
    hand_out,
    is_head,
    modules_called,
)
from keras_geolora.files.peft_names import (
    family_of,
    module_names,
    split_name,
)
from keras_geolora.files.peft_reading import PeftFile, read_peft
from keras_geolora.files.peft_writing import write_peft
from keras_geolora.files.products import add_products
from keras_geolora.files.rounding import norm
from keras_geolora.files.torch_layout import is_convolution, layouts_in
from keras_geolora.layers.adapted import DEFAULT
from keras_geolora.layers.raw_weights import is_batched, with_raw_weights
from keras_geolora.layers.registry import kernel_view
from keras_geolora.model.checks import (
    check_can_adapt,
    check_model,
    check_name,
)
from keras_geolora.model.parts import backbone_of
from keras_geolora.model.substitution import value_of


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
    `peft.PeftModel.from_pretrained(hf_model, folder)`. Both files of an earlier
    export are replaced at once. The update of a layer, `scale * U S V.T`,
    becomes `lora_A = U.T` and `lora_B = scale * V S`; ranks are in
    `rank_pattern`. Other layers are written as follows:

    - experts as `target_parameters`; all experts of a parameter get the
      largest of their ranks,
    - embeddings as `lora_embedding_A` and `lora_embedding_B`; that of a
      `CausalLM`, whose transpose computes the logits, for `lm_head`, too,
    - convolutions as two convolutions.

    What trained beside the factors is written as well: biases of adapted layers
    (`bias="lora_only"`), and heads, norms and other layers as whole modules
    (`modules_to_save`). A warning lists what has no name in PEFT.

    The module names of transformers 5 are known for the backbones Bert,
    Roberta, XLMRoberta, DebertaV3, DistilBert, Llama, Llama3, Mistral, Qwen,
    Qwen3, Mixtral, QwenMoe, Qwen3Moe, Gemma, GPT2 and ViT, and for the heads of
    their classifiers.

    Args:
        model: `keras.Model` on which `enable_geolora` was called.
        folder: String or path, created if it does not exist.
        name: String, the adapter. Defaults to the active one.
        names: Dict from layer paths to module names, or a callable
            `path -> name`, for other families. What a task has outside of its
            backbone has a path that begins with `head:`. Defaults to `None`.
        prefix: String, the path of the backbone in the Hugging Face model: `""`
            for an `AutoModel`, `"bert"` or `"model"` in one with a head.
            Defaults to that of the model that corresponds to `model`: a task
            such as a `CausalLM` has a head, a backbone has none. With `names`
            it defaults to `""`.
        base_model: String, the Hugging Face name of the base model, for the
            config. Defaults to `None`.
        pad: Bool, whether to pad all layers with zeros to the largest rank, for
            readers that expect one rank. Defaults to `False`.
        server: String, `"vllm"` or `"sglang"`, the server that is to load the
            files. All layers get one rank, projections that the server fuses
            are written together, and modules have their names in the model
            with its head. What the server would ignore is refused. Both
            servers read the same files. Defaults to `None`.
        dtype: String, `"float32"`, `"float16"` or `"bfloat16"`, of the factors.
            Defaults to `"float32"`, which loses nothing.

    Returns:
        Dict: `rank`, the largest one; `dtype`; `rounding_error`, the largest
        relative error of an update after rounding, in the Frobenius norm; with
        `server` also `max_lora_rank`, what to start the server with.

    Raises:
        TypeError: If `model` is not a `keras.Model`.
        ValueError: If there is no such adapter, its bases are not
            orthonormal, a layer has no name or no counterpart in PEFT's LoRA,
            the server would ignore a part, or a number is too large for
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


def import_peft(model, folder, name=DEFAULT, names=None):
    """Loads a LoRA adapter of Hugging Face PEFT into a model, exactly.

    Every product `B A` becomes orthonormal bases and singular values, by QR
    decompositions of the factors and a small singular value decomposition.
    The adapter is activated and can train like any other. Experts, embeddings,
    convolutions, biases and modules that PEFT saved whole are read like those
    that `export_peft` writes.

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
        ValueError: If the adapter is not a LoRA adapter, updates an embedding
            and the head that is its transpose differently, adds tokens, or does
            not fit the model. The model is unchanged then.

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
    config, tensors = read_peft(folder)
    layers = carriers(backbone_of(model))
    layouts = layouts_in(model)
    others = {key.rpartition("/")[0] for key in layouts} - set(layers)
    family = family_of(model)
    named = module_names(family, layers, names, complete=False, others=others)
    experts = {path for path, layer in layers.items() if is_batched(layer)}
    parameters = {split_name(named[p])[0] for p in experts & set(named)}
    file = PeftFile(config, tensors, parameters)
    modules = dict(file.modules)
    heads = [] if LM_HEAD in named.values() else list(filter(is_head, modules))
    heads = {module: modules.pop(module) for module in heads}
    carrying = {path: x for path, x in named.items() if path in layers}
    shapes = {path: kind_and_shape(layers[path]) for path in carrying}
    updates, rest = hand_out(modules, carrying, folder, shapes)
    check_heads(model, layers, updates, heads, folder)
    values, strange = values_of(file.copies, named, layouts, family, folder)
    strange = check_copied_heads(model, layers, values, strange, file, folder)
    unknown = sorted({*modules} - {*rest}) + strange
    if unknown or not updates:
        raise AdapterFileError(
            f"'{folder}' adapts modules that are not known for model "
            f"'{model.name}': {some(unknown)}. The known ones are "
            f"{some(named.values())}. Map layers to modules with "
            "`names={path: module}`. Nothing was loaded."
        )
    in_part = sorted(key for key, B in rest.items() if B.any())
    if in_part:
        raise AdapterFileError(
            f"'{folder}' updates all of {some(in_part)}, but only a part of "
            "it is mapped to the model. Name the layers of the other parts, "
            "too: `names={path: 'module[1/3]'}`. Nothing was loaded."
        )
    check_bases(file.bases, carrying, layouts, folder)
    add_products(
        model,
        name,
        {path: layers[path] for path in updates},
        updates,
        {key: (layouts[key][0], value) for key, value in values.items()},
    )
    return model


def carriers(scope):
    """Returns a dict from path to layer, of layers that PEFT can adapt.

    Args:
        scope: The model, or its backbone.
    """
    return {
        path: layer
        for path, layer in with_raw_weights(scope).items()
        if kernel_view(layer) is not None
        and (
            plain_class_name(layer) != "AdaptedWeight"
            or is_batched(layer)
            or path.endswith("/embeddings")
        )
    }


def kind_and_shape(layer):
    """Returns the arguments of `Factors.pair` for a layer."""
    if is_batched(layer):
        return "experts", kernel_view(layer).count, None
    if kernel_view(layer).name == "embeddings":
        return "embedding", None, None
    window = Convolution.of(layer) if is_convolution(layer) else None
    return "linear", None, window


TWO_UPDATES = (
    "An embedding of Keras whose transpose computes the logits has one update "
    f"for both, so that of the embedding and that of '{LM_HEAD}' must be the "
    "same. In PEFT, merge the adapter, and load the whole model. Nothing was "
    "loaded. "
)


def check_heads(model, layers, updates, heads, folder):
    """Refuses an embedding and a head with different updates."""
    if not is_causal_lm(model) and not heads:
        return
    for path in reversible_embeddings(layers) or [""]:
        ours, theirs = updates.get(path), None
        for factors in heads.values():
            A, B = factors.pair("linear")
            theirs = B, A
        if ours is None and theirs is None:
            continue
        if ours is None or theirs is None or differ(ours, theirs):
            raise AdapterFileError(
                f"{TWO_UPDATES}Received: '{folder}' with other factors"
            )


def check_copied_heads(model, layers, values, strange, file, folder):
    """Refuses an embedding and a head with different copies.

    Returns:
        `strange`, without the head of an embedding that is tied.
    """
    heads = [x for x in strange if is_head(x.rpartition(".")[0])]
    for path, layer in reversible_embeddings(layers).items():
        mine = values.get(f"{path}/embeddings")
        if mine is None or not (layer.tie_weights and is_causal_lm(model)):
            continue
        if len(heads) != 1 or not np.array_equal(mine, file.copies[heads[0]]):
            raise AdapterFileError(
                f"{TWO_UPDATES}Received: '{folder}' with other copies"
            )
        return [x for x in strange if x not in heads]
    return strange


def reversible_embeddings(layers):
    """Returns a dict from path to layer of those that compute logits, too."""
    kind = keras.layers.ReversibleEmbedding
    return {path: x for path, x in layers.items() if isinstance(x, kind)}


def is_causal_lm(model):
    """Returns whether a model is a language model with its head."""
    return plain_class_name(model).endswith("CausalLM")


def differ(one, other):
    """Returns whether two products of factors differ by more than rounding."""
    (left, right), (second, third) = one, other
    if len(left) != len(second) or right.shape[1] != third.shape[1]:
        return True
    whole = norm(left, right)
    difference = norm(np.hstack([left, -second]), np.vstack([right, third]))
    return difference > 1e-2 * whole


def check_bases(bases, named, layouts, folder):
    """Refuses pretrained weights in a file that are not those of the model.

    PEFT writes those of embeddings, which the user may have extended.
    """
    for path, module in named.items():
        for key in modules_called(module, bases):
            variable, layout = layouts.get(f"{path}/embeddings", (None, None))
            mine = None if layout is None else value_of(variable)
            if mine is None or not is_close(mine, bases[key]):
                raise AdapterFileError(
                    f"'{folder}' has the pretrained weights of '{key}', and "
                    "they are not those of the model. Tokens may have been "
                    "added. Merge the adapter in PEFT, and load the whole "
                    "model. Nothing was loaded."
                )


def is_close(mine, theirs):
    """Returns whether weights are the same, up to half precision."""
    if mine.shape != theirs.shape:
        return False
    mine, theirs = (np.asarray(x, "float32") for x in (mine, theirs))
    return np.allclose(mine, theirs, rtol=1e-2, atol=1e-2 * np.abs(mine).max())
