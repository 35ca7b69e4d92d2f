"""Adapter files, which `save_geolora` writes and `load_geolora` reads."""

import warnings

import keras
import numpy as np
from keras import ops

from keras_geolora.files.adapter_format import (
    FORMAT,
    AdapterFileError,
    as_saved,
    read_adapter,
    serialized,
    some,
)
from keras_geolora.files.base_weights import fingerprint, keyed_variables
from keras_geolora.files.fit import Fit
from keras_geolora.files.peft_names import family_of
from keras_geolora.layers.factor import check_layers
from keras_geolora.layers.options import AdapterOptions
from keras_geolora.layers.tree import stable_paths
from keras_geolora.model.adapted_model import add_adapter
from keras_geolora.model.checks import (
    check_adapted,
    check_can_adapt,
    check_model,
    check_name,
    check_not_suspended,
)
from keras_geolora.model.compiled_functions import (
    after_a_change,
    after_other_factors,
)
from keras_geolora.version import __version__
from keras_geolora.whole_files import write_whole


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
        rank = options["rank"] = factors[1].shape[-1]
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
            "Only an adapter whose values are all finite can be saved. "
            f"Received: values that are not finite in {spoilt[:5]}. '{path}' "
            "was not written."
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
        "family": family_of(model),
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
            "An adapter file stores only variables that `enable_geolora` made "
            "trainable. For variables that you made trainable afterwards, "
            "list their layers in `modules_to_save` of `enable_geolora`, or "
            f"save the whole model with `model.save`. Left out: {some(thawed)}",
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
                f"'{path}' does not fit model "
                f"'{model.name}':\n{listed}\nNothing was loaded. "
                "`load_geolora(path, strict=False)` loads what fits."
            )
        warnings.warn(
            f"Only the parts of '{path}' that fit model '{model.name}' are "
            f"loaded:\n{listed}",
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
        factors = (tensors[f"{layer_path}.{role}"] for role in "USV")
        layer.adapters_by_name()[name].assign_factors(*factors)
    for variable, value in fit.weights:
        variable.assign(ops.cast(value, variable.dtype))
    after_a_change(model)
    if known:
        after_other_factors(model)
    return model


def padded(factor, shape):
    """Returns a factor, padded with zeros to a shape."""
    whole = np.zeros(shape, "float32")
    whole[tuple(slice(n) for n in factor.shape)] = factor
    return whole


def adaptation_to_save(model):
    """Returns a model's own `Adaptation`, which a file describes."""
    check_adapted(model, "saved")
    adaptation = getattr(model, "geolora_adaptation", None)
    if adaptation is None:
        raise ValueError(
            "An adapter file belongs to the model on which `enable_geolora` "
            "was called. Save that part of the model, or save the whole model "
            f"with `model.save()`. Received: model '{model.name}'"
        )
    return adaptation


def chosen_adapter(adaptation, name):
    """Returns the name of an existing adapter, by default the active one."""
    name = adaptation.active if name is None else name
    if name not in adaptation.adapters:
        raise ValueError(
            f"There is no adapter with this name. Received: name={name!r}; "
            f"the adapters of model '{adaptation.model_name}' are "
            f"{list(adaptation.adapters)}"
        )
    return name


def plain_class_name(layer):
    """Returns the class name of a layer or model before it was adapted."""
    return getattr(layer, "plain_class", type(layer)).__name__
