"""Writes an adapter as PEFT does: a config, and tensors by their names."""

import dataclasses
import json
import math
import pathlib
import warnings

import numpy as np
import safetensors.numpy

from keras_geolora.files.adapter_file import padded
from keras_geolora.files.adapter_format import some
from keras_geolora.files.base_weights import HEAD
from keras_geolora.files.family_names import LM_HEAD, TRANSPOSED
from keras_geolora.files.peft_copies import TIED, check_names, copies_of
from keras_geolora.files.peft_modules import (
    MERGE,
    head_of,
    kinds_of,
    nesting,
    pairs_of_modules,
    rank_of,
    tensors_of,
)
from keras_geolora.files.peft_names import (
    module_names,
    prefix_in,
    split_name,
    task_type_of,
)
from keras_geolora.files.peft_reading import CONFIG, PREFIX, WEIGHTS
from keras_geolora.files.rounding import check_dtype, rounded
from keras_geolora.files.servers import (
    check_served,
    check_server,
    max_lora_rank,
    with_whole_packs,
)
from keras_geolora.whole_files import write_together


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
    if prefix is None:
        has_head = adapter.is_task or server is not None
        prefix = prefix_in(adapter.family, has_head and names is None)
    dotted = f"{prefix}." if prefix else ""
    if adapter.is_task and names is None and not prefix:
        adapter = without_head(adapter)
    task_type = task_type_of(adapter.model_class)
    others = {*adapter.beside, *adapter.biases} - set(adapter.updates)
    named = module_names(adapter.family, adapter.updates, names, others=others)
    modules = Modules(adapter, named, dotted)
    copies = copies_of(adapter, named, dotted)
    check_names(copies.saved, adapter.family, named)
    if server:
        modules.serve(server, names)
    if server or pad:
        modules.pad()
    largest = modules.largest()
    report = {"rank": largest, "dtype": dtype}
    if server:
        report["max_lora_rank"] = max_lora_rank(server, largest)
    tensors, report["rounding_error"] = modules.tensors(dtype)
    for module, bias in copies.biases.items():
        tensors[f"{PREFIX}{module}.base_layer.bias"] = bias
    for module, values in copies.saved.items():
        for parameter, value in values.items():
            tensors[f"{PREFIX}{module}.{parameter}"] = value
    config = {
        **modules.config(),
        "bias": "lora_only" if copies.biases else "none",
        "modules_to_save": list(copies.saved) or None,
        "task_type": "CAUSAL_LM" if server else task_type,
        "base_model_name_or_path": base_model,
        "fan_in_fan_out": adapter.family in TRANSPOSED,
    }
    if copies.nameless:
        warnings.warn(
            "These variables trained, but have no name in PEFT's model and are "
            f"not in '{folder}': {some(copies.nameless)}. Pass `names`, or "
            "save them with `model.save_geolora(...)`.",
            stacklevel=3,
        )
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: np.ascontiguousarray(x) for key, x in tensors.items()}
    weights = safetensors.numpy.save(tensors, {"format": "pt"})
    described = json.dumps(config, indent=2).encode()
    write_together(folder, {WEIGHTS: [weights], CONFIG: [described]})
    return report


def without_head(adapter):
    """Returns the `Exported` of a task for a model without its head."""
    heads = [path for path in adapter.beside if path.startswith(HEAD)]
    values = {p: x for p, x in adapter.beside.items() if p not in heads}
    left = [key for key in adapter.left if key.rpartition("/")[0] in heads]
    return dataclasses.replace(
        adapter,
        model_class="",
        beside=values,
        unplaced=[*adapter.unplaced, *left],
    )


class Modules:
    """The modules of a whole model that carry factors.

    Attributes:
        pairs: Dict from module, without the prefix, to arrays `A, B`.
    """

    def __init__(self, adapter, named, dotted):
        self.adapter = adapter
        self.dotted = dotted
        kinds = kinds_of(adapter, named)
        modules = {path: split_name(named[path])[0] for path in kinds}
        self.kinds = {modules[path]: kind for path, kind in kinds.items()}
        self.windows = {
            modules[path]: x for path, x in adapter.convolutions.items()
        }
        self.pairs = pairs_of_modules(adapter.updates, named)
        if adapter.model_class.endswith("CausalLM"):
            for module in set(TIED) & set(self.pairs):
                self.pairs[LM_HEAD] = head_of(self.pairs[module])
                self.kinds[LM_HEAD] = "linear"

    def serve(self, server, names):
        """Changes the modules to what a server can load."""
        parameters = [m for m, x in self.kinds.items() if is_parameter(x)]
        if parameters:
            raise ValueError(
                "Servers read the factors of modules. In models with experts "
                f"PEFT stores those of parameters. {MERGE}. Received: "
                f"server={server!r} and the parameters {some(parameters)}"
            )
        check_served(server, self.pairs, self.adapter.left)
        shaped = module_names(
            self.adapter.family, self.adapter.shapes, names, complete=False
        )
        shapes = {m: self.adapter.shapes[path] for path, m in shaped.items()}
        self.pairs = with_whole_packs(self.pairs, shapes)

    def largest(self):
        """Returns the largest rank."""
        return max(map(self.rank, self.pairs))

    def rank(self, module):
        """Returns the rank of a module, as PEFT counts."""
        pair, kind = self.pairs[module], self.kinds.get(module)
        return rank_of(pair, kind, self.windows.get(module))

    def full_name(self, module):
        """Returns the name of a module, or of a parameter, with its prefix."""
        dotted = "" if module == LM_HEAD else self.dotted
        ending = ".weight" if self.kinds.get(module) == "parameter" else ""
        return f"{dotted}{module}{ending}"

    def pad(self):
        """Adds zeros, so that all modules have one rank."""
        groups = {m: window.groups for m, window in self.windows.items()}
        step = math.lcm(*groups.values())
        largest = -(-self.largest() // step) * step
        for module, (A, B) in self.pairs.items():
            rank = largest // groups.get(module, 1)
            A = padded(A, (*A.shape[:-2], rank, A.shape[-1]))
            self.pairs[module] = A, padded(B, (*B.shape[:-1], rank))

    def tensors(self, dtype):
        """Returns the tensors of all modules, and the largest rounding error.

        Args:
            dtype: String, that of the factors.
        """
        tensors, worst = {}, 0.0
        stems = self._stems()
        for module, (A, B) in self.pairs.items():
            A, B, error = rounded(A, B, dtype, module)
            worst = max(worst, error)
            key, kind = f"{PREFIX}{stems[module]}", self.kinds.get(module)
            window = self.windows.get(module)
            tensors |= tensors_of(key, (A, B), kind, window)
        return tensors, worst

    def _stems(self):
        """Returns a dict from module to how the names of its tensors begin."""
        stems = {}
        for module in self.pairs:
            stems[module] = self.full_name(module)
            if is_parameter(self.kinds.get(module)):
                holder, _, name = self.full_name(module).rpartition(".")
                inside = [
                    self.full_name(other).rpartition(".")[2]
                    for other in self.pairs
                    if is_parameter(self.kinds.get(other))
                    and self.full_name(other).rpartition(".")[0] == holder
                ]
                stems[module] = f"{holder}{nesting(inside)[name]}"
        return stems

    def config(self):
        """Returns the config of a LoRA whose factors `B` contain the scale."""
        ranks = {self.full_name(m): self.rank(m) for m in self.pairs}
        parameters = [
            self.full_name(m)
            for m in self.pairs
            if is_parameter(self.kinds.get(m))
        ]
        largest = max(ranks.values())
        smaller = {name: r for name, r in ranks.items() if r != largest}
        config = {
            "peft_type": "LORA",
            "inference_mode": True,
            "target_modules": [x for x in ranks if x not in parameters],
            "r": largest,
            "rank_pattern": smaller,
            # PEFT multiplies by `alpha / r`, which is 1.
            "lora_alpha": largest,
            "alpha_pattern": smaller,
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
        }
        if parameters:
            config["target_parameters"] = parameters
        return config


def is_parameter(kind):
    """Returns whether PEFT targets a parameter instead of a module."""
    return kind in ("parameter", "experts")
