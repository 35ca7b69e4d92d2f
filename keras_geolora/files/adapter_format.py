"""The format of an adapter file: written whole, checked, strict."""

import hashlib
import json
import os

import numpy as np
import safetensors

from keras_geolora.geometry.manifold import AVERAGE, check_factors
from keras_geolora.layers.factor import by_matrix, fit_together
from keras_geolora.layers.options import AdapterOptions

FORMAT = 1


# The entry of a safetensors header that holds the description of a file.
ENTRY = "keras_geolora"


DIGEST = "sha256"


# safetensors has no bfloat16 for NumPy; float32 holds it exactly.
WIDER = {"bfloat16": "float32"}


# Exceptions raised by malformed values.
CONTRADICTIONS = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)


class AdapterFileError(ValueError):
    """A file is not a complete adapter file, or does not fit a model."""


def read_adapter(path):
    """Reads an adapter file and checks that it is intact.

    Args:
        path: String or path.

    Returns:
        `(description, tensors)`: the description in the file, and a dict from
        key to array.

    Raises:
        OSError: If there is no such file, or it cannot be read.
        AdapterFileError: If the file is damaged or not an adapter file.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(f"'{path}' is a folder, not an adapter file.")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            # A foreign file may have any size: check before reading it.
            ours = ENTRY in metadata and DIGEST in metadata
            keys = file.keys() if ours else ()
            tensors = {key: file.get_tensor(key) for key in keys}
    except OSError:
        raise
    except Exception as error:
        raise AdapterFileError(
            f"'{path}' is damaged, or not a safetensors file: {error}."
        ) from error
    if not ours:
        raise AdapterFileError(
            f"'{path}' is a safetensors file, but was not written by "
            "`save_geolora`. Use `keras_geolora.import_peft` for adapters of "
            "Hugging Face PEFT."
        )
    if digest(metadata[ENTRY], tensors) != metadata[DIGEST]:
        raise AdapterFileError(
            f"'{path}' is damaged: its contents do not match its checksum."
        )
    try:
        description = json.loads(metadata[ENTRY])
        version = description["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterFileError(f"'{path}' has no description.") from error
    if version != FORMAT:
        raise AdapterFileError(
            f"'{path}' has format {version!r}; this version of keras_geolora "
            f"reads format {FORMAT}. Upgrade: `pip install -U keras_geolora`."
        )
    try:
        check_contents(description, tensors)
    except CONTRADICTIONS as error:
        raise AdapterFileError(
            f"The contents of '{path}' are inconsistent: {error!r}."
        ) from error
    try:
        check_factors(
            factors_in(tensors, description["adapter"]["layers"]),
            f"'{path}' was not loaded. {AVERAGE}",
        )
    except ValueError as error:
        raise AdapterFileError(str(error)) from None
    return description, tensors


def factors_in(tensors, paths):
    """Returns the factors of layers in a file, those of each matrix by name."""
    found = {}
    for path in paths:
        found.update(by_matrix(path, [tensors[f"{path}.{r}"] for r in "USV"]))
    return found


def check_contents(description, tensors):
    """Raises if a description and its tensors contradict each other."""
    plan = description["adapter"]
    require(isinstance(plan["name"], str), "name")
    require(isinstance(plan["train_bias"], bool), "train_bias")
    require(all(isinstance(p, str) for p in plan["modules_to_save"]), "paths")
    require(isinstance(description["base"][""], str), "base")
    for key in ("keras_geolora", "keras", "model", "backbone"):
        require(isinstance(description[key], str), key)
    # Files of version 0.1.0 do not name the family.
    require(isinstance(description.get("family"), (str, type(None))), "family")
    require(set(description["classes"]) == set(plan["layers"]), "classes")
    axes = plan.get("weight_axes", {})  # early files have none
    require(all(isinstance(x, str) for p in axes.items() for x in p), "axes")
    for path, options in plan["layers"].items():
        U, S, V = (tensors[f"{path}.{role}"] for role in "USV")
        rank = options["rank"]
        require(S.shape[-1] == rank and fit_together(U, S, V), path)
        require(all(x.dtype == "float32" for x in (U, S, V)), path)
        require(set(options) == set(AdapterOptions.TYPES), path)
        require(
            all(type(x) in AdapterOptions.TYPES[o] for o, x in options.items()),
            path,
        )
        require(1 <= options["min_rank"] <= rank <= options["max_rank"], path)
        require(
            np.isfinite([float(x) for x in options.values() if x]).all(), path
        )
        require(isinstance(description["base"][path], str), path)
        require(isinstance(description["classes"][path], str), path)
    for key, x in tensors.items():
        require(np.isfinite(x).all(), key)


def require(condition, what):
    """Raises with the name of a value that is wrong."""
    if not condition:
        raise ValueError(what)


def serialized(tensors, description):
    """Returns the bytes of an adapter file."""
    text = json.dumps(description, indent=1)
    tensors = {key: np.ascontiguousarray(x) for key, x in tensors.items()}
    metadata = {ENTRY: text, DIGEST: digest(text, tensors)}
    return safetensors.numpy.save(tensors, metadata)


def digest(text, tensors):
    """Returns a checksum over the description and tensors of a file."""
    total = hashlib.sha256(text.encode())
    for key in sorted(tensors):
        x = tensors[key]
        total.update(f"\n{key} {x.dtype.str} {x.shape}\n".encode())
        total.update(x.tobytes())
    return total.hexdigest()


def as_saved(value):
    """Converts an array to a dtype of safetensors, without loss."""
    return value.astype(WIDER.get(str(value.dtype), value.dtype))


def some(paths, count=4):
    """Lists the first paths in a string, with the total if there are more."""
    paths = list(paths)
    listed = ", ".join(f"'{path}'" for path in paths[:count])
    return listed if len(paths) <= count else f"{listed}, ... ({len(paths)})"
