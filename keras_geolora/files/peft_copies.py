"""What trained beside the factors, as PEFT stores it.

Modules in `modules_to_save` are in the file with all their parameters. With
`bias="lora_only"` the biases of adapted modules are, too.
"""

import dataclasses

import numpy as np

from keras_geolora.files.adapter_format import AdapterFileError
from keras_geolora.files.base_weights import HEAD
from keras_geolora.files.family_names import FAMILIES, LM_HEAD
from keras_geolora.files.peft_modules import is_head, modules_called
from keras_geolora.files.peft_names import (
    is_transposed,
    rows_of_part,
    split_name,
)

# What decoders call the embedding whose transpose computes their logits.
TIED = "embed_tokens", "wte"


@dataclasses.dataclass
class Copies:
    """What a file has beside factors.

    Attributes:
        biases: Dict from module to array, of adapted modules.
        saved: Dict from module to a dict from parameter to array.
        nameless: List of strings, the variables that have no name in PEFT.
    """

    biases: dict = dataclasses.field(default_factory=dict)
    saved: dict = dataclasses.field(default_factory=dict)
    nameless: list = dataclasses.field(default_factory=list)


def copies_of(adapter, named, dotted):
    """Returns the `Copies` of an adapter, by the names of a whole model.

    Args:
        adapter: `Exported`.
        named: Dict from path to the name of a module.
        dotted: String, the prefix of the modules of the backbone, with a dot.
    """
    copies = Copies(nameless=list(adapter.unplaced))
    parts = {}
    for path, values in adapter.beside.items():
        for parameter, value in values.items():
            place = placed(adapter, named, path, parameter)
            if place is None:
                copies.nameless.append(f"{path}/{parameter}")
                continue
            full_name, parameter = place
            module, part, count = split_name(full_name)
            if not path.startswith(HEAD) and not is_head(module):
                module = f"{dotted}{module}"
            is_bias = path in adapter.updates
            whole = parts.setdefault((module, parameter, is_bias), [])
            whole.append((path, value, part, count))
    for (module, parameter, is_bias), blocks in parts.items():
        value = joined(adapter, named, module, parameter, blocks)
        if is_bias:
            copies.biases[module] = value
        else:
            copies.saved.setdefault(module, {})[parameter] = value
    for values in copies.saved.values():
        if "running_mean" in values:
            values["num_batches_tracked"] = np.array(0, "int64")
    tie(copies, adapter, dotted)
    return copies


def placed(adapter, named, path, parameter):
    """Returns the module and the parameter that hold a value, or `None`."""
    if parameter == f"{LM_HEAD}.weight":
        is_lm = adapter.model_class.endswith("CausalLM")
        return (LM_HEAD, "weight") if is_lm else None
    if path not in named:
        return None
    if path in adapter.updates and parameter != "bias":
        return None
    return named[path], parameter


def joined(adapter, named, module, parameter, blocks):
    """Returns the value of a parameter that several layers hold in parts.

    Args:
        adapter: `Exported`.
        named: Dict from path to the name of a module.
        module: String, the name of the module in the whole model.
        parameter: String.
        blocks: List of `(path, value, part, count)`.
    """
    path, first, _, count = blocks[0]
    known = {part: value for _, value, part, _ in blocks}
    if parameter == "bias":
        short = split_name(named[path])[0]
        for other, full_name in named.items():
            name, part, _ = split_name(full_name)
            if name == short and other in adapter.biases:
                known.setdefault(part, adapter.biases[other])
    if len(known) < count:
        raise ValueError(
            f"PEFT keeps '{module}' whole, and only {len(known)} of its "
            f"{count} parts are known here. Adapt or train all of them, or "
            "export from the model, not from its file. Received: trained "
            f"'{path}'"
        )
    value = np.concatenate([known[part] for part in range(count)])
    if parameter == "weight" and is_transposed(adapter.family, module):
        value = value.T
    return value


def tie(copies, adapter, dotted):
    """Adds the head of a language model that shares its embedding."""
    for name in TIED:
        values = copies.saved.get(f"{dotted}{name}")
        if values and adapter.model_class.endswith("CausalLM"):
            copies.saved.setdefault(LM_HEAD, {"weight": values["weight"]})


def check_names(saved, family, named):
    """Refuses names of saved modules that PEFT would also match to others."""
    inner = FAMILIES[family][2].values() if family else ()
    others = {split_name(name)[0] for name in (*inner, *named.values())}
    for module in saved:
        same = {x for x in others if x.endswith(module) and x != module}
        if same - {x for x in others if x.endswith(f".{module}")}:
            raise ValueError(
                "PEFT would also replace every other module whose name ends "
                "like that of a saved one. Export for the model with its head: "
                f"adapt the task, or pass `prefix`. Received: saved module "
                f"'{module}', and another one, '{min(same)}'"
            )


# Reading.


def values_of(copies, named, layouts, family, folder):
    """Returns the values of variables that copies in a file stand for.

    Args:
        copies: Dict from the name of a parameter to array.
        named: Dict from path to the name of a module, of all layers.
        layouts: Dict from key to a variable and its `TorchLayout` or `None`.
        family: String, one of `FAMILIES`, or `None`.
        folder: String or path, for messages.

    Returns:
        Dict from key to array, as Keras has it, and list of the names that
        belong to no variable.
    """
    found = {}
    used = {x for x in copies if x.endswith(".num_batches_tracked")}
    for key, (_, layout) in layouts.items():
        path = key.rpartition("/")[0]
        if layout is None or path not in named:
            continue
        full_name = named[path]
        parameter = layout.parameter
        if parameter.startswith(f"{LM_HEAD}."):
            full_name, parameter = LM_HEAD, "weight"
        module, part, count = split_name(full_name)
        for name in modules_called(f"{module}.{parameter}", copies):
            value = copies[name]
            if parameter == "weight" and is_transposed(family, module):
                value = value.T
            value = value[rows_of_part(len(value), part, count)]
            if value.shape != layout.torch_shape:
                raise AdapterFileError(
                    f"'{name}' in '{folder}' has shape {value.shape}, but the "
                    f"model has shape {layout.torch_shape}. Nothing was loaded."
                )
            if not np.isfinite(value.astype("float32")).all():
                raise AdapterFileError(
                    f"'{name}' in '{folder}' has values that are not finite. "
                    "Nothing was loaded."
                )
            if key in found:
                raise AdapterFileError(
                    f"'{folder}' has more than one parameter that could be "
                    f"'{key}'. Choose one with `names`. Nothing was loaded."
                )
            found[key] = layout.to_keras(value)
            used.add(name)
    return found, sorted(set(copies) - used)
