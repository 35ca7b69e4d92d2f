"""Adapter files, which `save_geolora` writes and `load_geolora` reads."""

import hashlib
import json
import os
import warnings

import keras
import numpy as np
import safetensors
import safetensors.numpy
from keras import ops

from keras_geolora.geometry.manifold import AVERAGE, check_factors, check_layers
from keras_geolora.layers.factor import Factor
from keras_geolora.layers.options import AdapterOptions
from keras_geolora.layers.registry import kernel_shape
from keras_geolora.layers.tree import stable_paths
from keras_geolora.model.adapted_model import (
    add_adapter,
    after_a_change,
    after_other_factors,
    check_adapted,
    check_can_adapt,
    check_model,
    check_name,
    check_not_suspended,
    scope_of,
)
from keras_geolora.model.substitution import value_of
from keras_geolora.version import __version__
from keras_geolora.whole_files import write_whole

FORMAT = 1
# The entry of a safetensors header that holds the description of a file.
ENTRY = "keras_geolora"
DIGEST = "sha256"
# safetensors has no bfloat16 for NumPy; float32 holds it exactly.
WIDER = {"bfloat16": "float32"}
# The prefix of keys of variables that are in a task, not in its backbone.
HEAD = "head:"
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


def save_geolora(model, path, name=None):
    """Writes one adapter to a safetensors file.

    The file holds the factors, cut to their ranks, and what trained beside
    them: biases, `modules_to_save`, the head of a KerasHub task. It holds no
    state of the optimizer (`model.save` does) and nothing of the pretrained
    weights but a fingerprint. It is written completely or not at all.

    Also a method of every `keras.Model`: `model.save_geolora(path)`.

    Args:
        model: `keras.Model` on which `enable_geolora` was called.
        path: String or path, usually ending in `.safetensors`.
        name: String, the adapter to save. Defaults to the active one.

    Raises:
        TypeError: If `model` is not a `keras.Model`.
        ValueError: If the model has no such adapter, or the adapter has
            non-finite numbers or bases that are not orthonormal.
        OSError: If the file cannot be written; an older one is unchanged.

    Example:

    ```python
    import tempfile

    import keras
    import numpy as np
    import keras_geolora

    def pretrained():
        keras.utils.set_random_seed(0)
        return keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])

    model = pretrained()
    model.enable_geolora(rank=2)
    model.compile(keras_geolora.GeoLoRA("adam"), loss="mse")
    x = np.ones((8, 8), "float32")
    model.fit(x, np.ones((8, 4)), verbose=0)
    with tempfile.TemporaryDirectory() as folder:
        model.save_geolora(f"{folder}/mine.safetensors")
        other = pretrained().load_geolora(f"{folder}/mine.safetensors")
    np.testing.assert_allclose(
        other.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6
    )
    ```
    """
    check_model(model)
    adaptation = adaptation_to_save(model)
    name = chosen_adapter(adaptation, name)
    (plan,) = (a for a in adaptation.plan()["adapters"] if a["name"] == name)
    plan.pop("clipped")  # the file holds the ranks that training found
    paths = stable_paths(adaptation.scope)
    tensors = {}
    for layer_path, options in plan["layers"].items():
        factors = paths[layer_path].adapters_by_name()[name].trimmed()
        rank = options["rank"] = len(factors[1])
        # `load_geolora` may have set a rank below that of the options.
        options["min_rank"] = min(options["min_rank"], rank)
        tensors.update(
            (f"{layer_path}.{role}", x)
            for role, x in zip("USV", factors, strict=True)
        )
    values = adaptation.values(name)
    for key, variable in keyed_variables(model).items():
        if id(variable) in values:
            tensors[key] = as_saved(values[id(variable)])
    spoilt = [key for key, x in tensors.items() if not np.isfinite(x).all()]
    if spoilt:
        raise ValueError(
            "An adapter with numbers that are not finite is of no use to "
            f"anybody. Received: such numbers in {spoilt[:5]}. '{path}' was "
            "not written."
        )
    check_layers(
        (paths[layer_path] for layer_path in plan["layers"]),
        f"'{path}' was not written.",
        name,
    )
    description = {
        "format": FORMAT,
        "keras_geolora": __version__,
        "keras": keras.__version__,
        "model": plain_class_name(model),
        "backbone": plain_class_name(adaptation.scope),
        "classes": {p: plain_class_name(paths[p]) for p in plan["layers"]},
        "adapter": plan,
        "base": fingerprint(model, plan["layers"]),
    }
    warn_of_what_is_left_out(adaptation)
    write_whole(path, serialized(tensors, description))


def warn_of_what_is_left_out(adaptation):
    """Warns of variables that train but are not in the adapter file."""
    thawed = [variable.path for variable in adaptation.thawed_variables()]
    if thawed:
        warnings.warn(
            "An adapter file holds what `enable_geolora` made trainable, not "
            "what was made so by hand afterwards. Name these layers in "
            "`modules_to_save` of `enable_geolora`, or save the whole model "
            f"by `model.save`. Left out: {some(thawed)}",
            stacklevel=3,
        )


def load_geolora(model, path, name=None, strict=True):
    """Loads an adapter of `save_geolora` into a model, and activates it.

    A model without adapters gets the layers, ranks and options of the file. A
    model with adapters gets one more or, if it has one of this name, new values
    for it. Compile the model again before training.

    Also a method of every `keras.Model`: `model.load_geolora(path)`.

    Args:
        model: Built `keras.Model`, the base model that the adapter was trained
            on.
        path: String or path.
        name: String, the name of the adapter in this model. Defaults to its
            name in the file.
        strict: Bool. If the file is for other layers, shapes or base weights,
            `True`, the default, refuses it; `False` loads what fits and warns
            about the rest.

    Returns:
        The model itself.

    Raises:
        TypeError: If `model` is not a `keras.Model`.
        OSError: If there is no such file.
        AdapterFileError: A `ValueError`, if the file is damaged, not an adapter
            file, or does not fit the model. The model is unchanged then.

    Example: see `save_geolora`.
    """
    check_model(model)
    description, tensors = read_adapter(path)
    plan = description["adapter"]
    name = plan["name"] if name is None else name
    check_name(name)
    adaptation = getattr(model, "geolora_adaptation", None)
    known = adaptation is not None and name in adaptation.adapters
    if known:
        check_not_suspended([adaptation])
    else:
        check_can_adapt(model, name)
    fit = Fit(model, name, description, tensors)
    if fit.differences:
        listed = "\n".join(f"- {line}" for line in fit.differences)
        if strict:
            raise AdapterFileError(
                f"'{path}' does not fit model '{model.name}':\n{listed}\n"
                "Nothing was loaded. `load_geolora(path, strict=False)` takes "
                "what fits."
            )
        warnings.warn(
            f"Of '{path}' only what fits model '{model.name}' is loaded:\n"
            f"{listed}",
            stacklevel=2,
        )
    if not fit.layers:
        raise AdapterFileError(
            f"No layer of model '{model.name}' fits '{path}'. Nothing was "
            "loaded."
        )
    if known:
        adaptation.activate(name)
    else:
        add_adapter(
            model,
            name,
            fit.layers,
            {p: AdapterOptions(**plan["layers"][p]) for p in fit.layers},
            fit.saved_layers,
            plan["train_bias"],
        )
    for layer_path, layer in fit.layers.items():
        for role in "USV":
            factor = getattr(layer.adapters_by_name()[name], role)
            factor.assign(padded(tensors[f"{layer_path}.{role}"], factor.shape))
    for variable, value in fit.weights:
        variable.assign(ops.cast(value, variable.dtype))
    after_a_change(model)
    if known:
        after_other_factors(model)
    return model


class Fit:
    """Which parts of an adapter file fit a model.

    Attributes:
        layers: Dict from path to layer, of layers with a fitting adapter.
        saved_layers: List of the layers in `modules_to_save`.
        weights: List of pairs of a variable and its new value.
        differences: List of sentences about what does not fit. With `any_rank`,
            ranks may exceed the buffers of the model.
    """

    def __init__(self, model, name, description, tensors, any_rank=False):
        self.model = model
        self.any_rank = any_rank
        self.plan = description["adapter"]
        self.tensors = tensors
        self.differences = []
        self.paths = stable_paths(scope_of(model))
        self.existing = None
        adaptation = getattr(model, "geolora_adaptation", None)
        if adaptation is not None:
            self.existing = adaptation.adapters.get(name)
        self.layers = self._layers(name)
        self.saved_layers = self._saved_layers()
        self.weights = self._weights()
        self._compare_base(description["base"])

    def _layers(self, name):
        layers, absent = {}, []
        for path, options in self.plan["layers"].items():
            layer = self.paths.get(path)
            shape = kernel_shape(layer)
            if shape is None:
                absent.append(path)
                continue
            U, V = self.tensors[f"{path}.U"], self.tensors[f"{path}.V"]
            room = options["max_rank"]
            if self.existing is not None:
                if name not in getattr(layer, "adapter_names", ()):
                    self._note(f"the model's adapter is not on '{path}'")
                    continue
                adapter = layer.adapters_by_name()[name]
                if not self.any_rank:
                    room = adapter.max_rank
                if adapter.scale != options["scale"]:
                    self._note(
                        f"scale of '{path}': {options['scale']} in the file, "
                        f"{adapter.scale} in the model"
                    )
                    continue
            if (len(U), len(V)) != shape:
                self._note(
                    f"shape of '{path}': {(len(U), len(V))} in the file, "
                    f"{shape} in the model"
                )
            elif not options["rank"] <= room <= min(shape):
                self._note(
                    f"rank of '{path}': {options['rank']} in the file, room "
                    f"for {room} in the model"
                )
            else:
                layers[path] = layer
        if absent:
            self._note(
                "the model has no layer that can be adapted at "
                f"{some(absent)}; it has {some(self._candidates())}"
            )
        if self.existing is not None:
            mine = {id(layer) for layer in self.existing.layers.values()}
            extra = mine - {id(self.paths.get(p)) for p in self.plan["layers"]}
            if extra:
                places = [p for p, x in self.paths.items() if id(x) in extra]
                self._note(f"the file has no adapter for {some(places)}")
        return layers

    def _saved_layers(self):
        saved = self.plan["modules_to_save"]
        absent = [path for path in saved if path not in self.paths]
        if absent:
            self._note(f"the model has no layer {some(absent)} to train")
        return [self.paths[path] for path in saved if path in self.paths]

    def _weights(self):
        expected = self._expected()
        factors = {f"{p}.{r}" for p in self.plan["layers"] for r in "USV"}
        given = set(self.tensors) - factors
        pairs = []
        for key in sorted(given):
            value, variable = self.tensors[key], expected.get(key)
            if variable is None:
                self._note(f"nothing in the model that trains is '{key}'")
            elif tuple(variable.shape) != value.shape:
                self._note(
                    f"shape of '{key}': {value.shape} in the file, "
                    f"{tuple(variable.shape)} in the model"
                )
            elif is_float(variable.dtype) != is_float(str(value.dtype)):
                self._note(
                    f"type of '{key}': {value.dtype} in the file, "
                    f"{variable.dtype} in the model"
                )
            else:
                pairs.append((variable, value))
        # An adapter of a backbone leaves the head of a task unchanged.
        headless = not any(key.startswith(HEAD) for key in given)
        missing = [
            key
            for key in expected
            if key not in given and not (headless and key.startswith(HEAD))
        ]
        if missing:
            self._note(f"the file has no values for {some(missing)}")
        return pairs

    def _expected(self):
        """Returns a dict from key to variable of possible companions."""
        keyed = keyed_variables(self.model)
        if self.existing is not None:
            train = {id(v) for v in self.existing.companions}
        else:
            train = {
                id(v) for layer in self.saved_layers for v in layer.weights
            }
            if self.plan["train_bias"]:
                layers = self.layers.values()
                train |= {id(getattr(layer, "bias", None)) for layer in layers}
        return {
            key: variable
            for key, variable in keyed.items()
            if id(variable) in train
            or (self.existing is None and key.startswith(HEAD))
        }

    def _compare_base(self, base):
        mine = fingerprint(self.model, self.plan["layers"])
        other = [p for p in self.layers if mine[p] != base[p]]
        if other:
            self._note(
                f"the pretrained kernels of {len(other)} of "
                f"{len(self.layers)} layers are not those that the adapter "
                f"was trained on: {some(other)}"
            )
        elif len(self.layers) == len(self.plan["layers"]) and (
            mine[""] != base[""]
        ):
            self._note(
                "pretrained weights outside of the adapted layers are not "
                "those that the adapter was trained on"
            )

    def _candidates(self):
        return [p for p, x in self.paths.items() if kernel_shape(x) is not None]

    def _note(self, sentence):
        self.differences.append(sentence)


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
            f"'{path}' is damaged, or no safetensors file: {error}."
        ) from error
    if not ours:
        raise AdapterFileError(
            f"'{path}' is a safetensors file, but not one of `save_geolora`. "
            "`keras_geolora.import_peft` reads adapters of Hugging Face PEFT."
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
            f"'{path}' contradicts itself: {error!r}."
        ) from error
    try:
        check_factors(
            {
                layer_path: [tensors[f"{layer_path}.{role}"] for role in "USV"]
                for layer_path in description["adapter"]["layers"]
            },
            f"'{path}' was not loaded. {AVERAGE}",
        )
    except ValueError as error:
        raise AdapterFileError(str(error)) from None
    return description, tensors


def check_contents(description, tensors):
    """Raises if a description and its tensors contradict each other."""
    plan = description["adapter"]
    require(isinstance(plan["name"], str), "name")
    require(isinstance(plan["train_bias"], bool), "train_bias")
    require(all(isinstance(p, str) for p in plan["modules_to_save"]), "paths")
    require(isinstance(description["base"][""], str), "base")
    for key in ("keras_geolora", "keras", "model", "backbone"):
        require(isinstance(description[key], str), key)
    require(set(description["classes"]) == set(plan["layers"]), "classes")
    for path, options in plan["layers"].items():
        U, S, V = (tensors[f"{path}.{role}"] for role in "USV")
        rank = options["rank"]
        shapes = (len(U), rank), (rank, rank), (len(V), rank)
        require((U.shape, S.shape, V.shape) == shapes, path)
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


def fingerprint(model, layers):
    """Returns checksums of the pretrained weights that adapters build on.

    Args:
        model: `keras.Model`, adapted or not.
        layers: Paths of layers in the model's `scope_of`.

    Returns:
        Dict from path to string; `""` covers all other weights.
    """
    adaptation = getattr(model, "geolora_adaptation", None)
    sums = {path: hashlib.sha256() for path in ("", *layers)}
    for key, variable in sorted(keyed_variables(scope_of(model)).items()):
        if adaptation is not None and adaptation.is_companion(variable):
            value = adaptation.pretrained(variable)
        else:
            value = value_of(variable)
        total = sums.get(key.rpartition("/")[0], sums[""])
        total.update(f"\n{key} {value.dtype} {value.shape}\n".encode())
        total.update(value.tobytes())
    return {path: total.hexdigest()[:32] for path, total in sums.items()}


def keyed_variables(model):
    """Returns a dict from key to variable of a model, without factors.

    Keys are the same for every instance of a model, and for a KerasHub task
    and its backbone: `path/name`, and `head:path/name` for variables of the
    task only.
    """
    keyed, seen = {}, set()
    scope = scope_of(model)
    for part, prefix in ((scope, ""), (model, HEAD)):
        paths = {"": part, **stable_paths(part)}
        # Inner layers come first, so that each keeps its own variables.
        for path, layer in reversed(paths.items()):
            for variable in layer.weights:
                if id(variable) in seen or isinstance(
                    variable.constraint, Factor
                ):
                    continue
                seen.add(id(variable))
                key = first = f"{prefix}{path}/{variable.name}"
                count = 0
                while key in keyed:
                    count += 1
                    key = f"{first}_{count}"
                keyed[key] = variable
    return keyed


def padded(factor, shape):
    """Returns a factor, padded with zeros to a shape."""
    whole = np.zeros(shape, "float32")
    whole[tuple(slice(n) for n in factor.shape)] = factor
    return whole


def as_saved(value):
    """Converts an array to a dtype of safetensors, without loss."""
    return value.astype(WIDER.get(str(value.dtype), value.dtype))


def adaptation_to_save(model):
    """Returns a model's own `Adaptation`, which a file describes."""
    check_adapted(model, "saved")
    adaptation = getattr(model, "geolora_adaptation", None)
    if adaptation is None:
        raise ValueError(
            "An adapter file is for the model on which `enable_geolora` was "
            "called: save that part of this model, or `model.save()` the "
            f"whole. Received: model '{model.name}'"
        )
    return adaptation


def chosen_adapter(adaptation, name):
    """Returns the name of an existing adapter, by default the active one."""
    name = adaptation.active if name is None else name
    if name not in adaptation.adapters:
        raise ValueError(
            f"There is no adapter of this name. Received: name={name!r}; those "
            f"of model '{adaptation.model_name}' are "
            f"{list(adaptation.adapters)}"
        )
    return name


def plain_class_name(layer):
    """Returns the class name of a layer or model before it was adapted."""
    return getattr(layer, "plain_class", type(layer)).__name__


def is_float(dtype):
    """Returns whether a dtype holds real numbers."""
    return keras.backend.is_float_dtype(dtype)


def some(paths, count=4):
    """Lists the first paths in a string, with the total if there are more."""
    paths = list(paths)
    listed = ", ".join(f"'{path}'" for path in paths[:count])
    return listed if len(paths) <= count else f"{listed}, ... ({len(paths)})"
