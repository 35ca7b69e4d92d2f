"""Reads what PEFT wrote: a config, and tensors by their names."""

import json
import re

import numpy as np
import safetensors.numpy

from keras_geolora.files.adapter_format import CONTRADICTIONS, AdapterFileError
from keras_geolora.files.family_names import EXPERTS
from keras_geolora.files.peft_modules import Factors, nesting

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# With these options of PEFT an adapter is more than updates of kernels and
# copies of modules.
UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
# The `init_lora_weights` of PEFT that leave the pretrained kernels alone.
PLAIN_INITS = "none", "true", "false", "gaussian", "eva", "mica", "orthogonal"


class PeftFile:
    """What is in the folder of an adapter.

    Args:
        config: Dict, the config.
        tensors: Dict from key to array.
        parameters: Names of the parameters of experts in the model.

    Attributes:
        modules: Dict from module to `Factors`. Those of the parameters of a
            module have the name of the parameter.
        copies: Dict from the name of a parameter to array: modules that trained
            in full, and biases.
        bases: Dict from module to array: pretrained weights of embeddings,
            which PEFT writes beside their factors.
    """

    def __init__(self, config, tensors, parameters):
        self.config = config
        self.parameters = parameters
        self.modules, self.copies, self.bases = {}, {}, {}
        pairs = {}
        for key, tensor in tensors.items():
            match = re.fullmatch(
                r"(.+)\.lora_(embedding_)?([AB])(?(2)|\.weight)", key
            )
            if match is None:
                self._sort(key.removeprefix(PREFIX), tensor)
            else:
                kind = "embedding" if match[2] else "linear"
                pair = pairs.setdefault(
                    (match[1].removeprefix(PREFIX), kind), {}
                )
                pair[match[3]] = tensor
        for (stem, kind), pair in pairs.items():
            self._add(stem, kind, pair)

    def _sort(self, key, tensor):
        """Keeps a tensor that is not a factor."""
        module, _, parameter = key.rpartition(".")
        module, is_base = re.subn(r"\.base_layer$", "", module)
        if is_base and parameter == "weight":
            self.bases[module] = tensor
        else:
            self.copies[f"{module}.{parameter}"] = tensor

    def _add(self, stem, kind, pair):
        """Keeps the two factors of a module."""
        if set(pair) != {"A", "B"}:
            raise AdapterFileError(
                f"'{WEIGHTS}' has only one of the two factors of '{stem}'."
            )
        A, B = (pair[half].astype("float64") for half in "AB")
        if not (A.ndim == B.ndim >= 2 and A.size and B.size):
            raise AdapterFileError(
                f"The shapes of the factors of '{stem}' do not fit together."
            )
        if not (np.isfinite(A).all() and np.isfinite(B).all()):
            raise AdapterFileError(f"'{stem}' has values that are not finite.")
        module, target = self._place(stem)
        if target not in (module, f"{module}.weight"):
            module, kind = target, "experts"
        alpha = in_pattern(self.config.get("alpha_pattern"), target)
        alpha = float(self.config["lora_alpha"] if alpha is None else alpha)
        root = 0.5 if self.config.get("use_rslora") else 1
        self.modules[module] = Factors(A, B, kind, alpha, root, stem)

    def _place(self, stem):
        """Returns the name of a module, and what of it PEFT targets.

        That is the module itself, or one of its parameters.

        Args:
            stem: String, how the names of the factors begin.
        """
        module = stem.replace(".base_layer", "")
        targets = self.config.get("target_parameters") or ()
        known = [*self.parameters, f"{module}.weight"]
        names = dict.fromkeys(
            (*EXPERTS, *(x.rpartition(".")[2] for x in known))
        )
        found = [
            name
            for name in names
            if ends_with(f"{module}.{name}", targets)
            and ends_with(f"{module}.{name}", known)
        ]
        for name, suffix in nesting(found).items():
            if stem == f"{module}{suffix}":
                return module, f"{module}.{name}"
        return stem, stem


def ends_with(name, endings):
    """Returns whether a name ends with one of several, after a dot."""
    return any(f".{name}".endswith(f".{ending}") for ending in endings)


def read_peft(folder):
    """Returns config and tensors of one export, even if another is under way.

    An export replaces both files at once, perhaps between our two reads.
    """
    config = None
    while config != (latest := read_peft_config(folder / CONFIG)):
        config = latest
        tensors = read_peft_weights(folder / WEIGHTS)
    return config, tensors


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
    if not usable:
        raise AdapterFileError(
            f"'{path}' has a `lora_alpha` that is not finite."
        )
    if kind != "LORA" or unsupported:
        raise AdapterFileError(
            "Only plain LoRA can be imported: updates of kernels, and copies "
            f"of trained modules. Received: '{path}' with peft_type='{kind}'"
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


def read_peft_weights(path):
    """Returns a dict from key to array."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{path}'.")
    try:
        return safetensors.numpy.load_file(path)
    except Exception as error:
        raise AdapterFileError(
            f"'{path}' is damaged, or uses a dtype that NumPy does not "
            f"support: {error}."
        ) from error


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
