"""What transformers calls the layers of a model."""

import re

from keras_geolora.files.adapter_format import some
from keras_geolora.files.base_weights import HEAD
from keras_geolora.files.family_names import (
    FAMILIES,
    FIRST_BLOCK,
    HEADS,
    IN_A_TASK,
    OTHERS,
    TRANSPOSED,
)
from keras_geolora.model.parts import backbone_of


def module_names(family, layers, names, complete=True, others=()):
    """Returns a dict from path to the name of the module in transformers.

    Args:
        family: String, the name of the backbone's class in `FAMILIES`, or
            `None`.
        layers: Paths of layers.
        names: As in `export_peft`.
        complete: Bool, whether a layer without a name is an error.
        others: Paths of layers that may have no name.
    """
    known = {*layers, *others}
    if names is not None:
        find = names if callable(names) else names.get
        unknown = [] if callable(names) else sorted(set(names) - known)
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

    found = {path: find(path) for path in (*layers, *others)}
    nameless = [path for path in layers if found[path] is None]
    if nameless and complete:
        raise ValueError(
            "Every adapted layer needs the name of its module. Pass "
            "`names={path: module}`, or do not adapt the layer. Received: no "
            f"name for {some(nameless)}"
        )
    return {path: name for path, name in found.items() if name is not None}


def name_in(family, path):
    """Returns the name of the module at a path, or `None`."""
    if path.startswith(HEAD):
        return HEADS.get(family, {}).get(path.removeprefix(HEAD))
    # A table of positions is a weight of its layer.
    place = path.removesuffix("/embeddings")
    if place in OTHERS.get(family, {}):
        return OTHERS[family][place]
    block, name, inner = FAMILIES[family]
    match = re.fullmatch(rf"{block}(\d+)/(.+)", path)
    if match is None or match[2] not in inner:
        return None
    number = int(match[1]) - FIRST_BLOCK.get(family, 0)
    return f"{name}{number}.{inner[match[2]]}"


def is_transposed(family, module):
    """Returns whether transformers stores a kernel like Keras, not transposed.

    Args:
        family: String, one of `FAMILIES`, or `None`.
        module: String, the name of a module with a kernel.
    """
    return family in TRANSPOSED and re.search(r"\.c_\w+$", module) is not None


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


def rows_of_part(size, part, count):
    """Returns the slice of the rows of one part of a fused module."""
    rows = size // count
    return slice(part * rows, (part + 1) * rows)
