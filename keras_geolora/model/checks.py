"""What is refused before anything changes."""

import keras

from keras_geolora.keras_internals import variables_of
from keras_geolora.layers.tree import carriers
from keras_geolora.model.parts import adaptations_of
from keras_geolora.optimizer.geolora import find_geolora


def check_model(model):
    """Refuses anything but a model."""
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a `keras.Model`. Received: "
            f"model={model!r} (of type {type(model).__name__})"
        )


def check_name(name):
    """Refuses an invalid name of an adapter."""
    if not isinstance(name, str) or not name or set(name) & set("/."):
        raise ValueError(
            "The `name` of an adapter becomes part of paths, so it must be a "
            "string that is not empty, without '/' and '.'. "
            f"Received: name={name!r}"
        )


def check_can_adapt(model, name):
    """Refuses a model that is not built, or is adapted in another way."""
    if not model.built:
        raise ValueError(
            "Only a built model has kernels to adapt. Call it on a batch of "
            "data, or `model.build(input_shape)`, first. "
            f"Received: model '{model.name}', which is not built"
        )
    adaptation = getattr(model, "geolora_adaptation", None)
    strange = [
        layer
        for layer in carriers(model).values()
        if adaptation is None or layer.adaptation is not adaptation
    ]
    if strange:
        raise ValueError(
            "A part of the model is adapted already, by itself. Adapt it "
            "again there, or merge its adapters with `merge_geolora()`. "
            f"Received: model '{model.name}' with {len(strange)} adapted "
            "layers"
        )
    if adaptation is None:
        return
    if name in adaptation.adapters:
        raise ValueError(
            "A model has one adapter of a name. Choose another `name`, or "
            "merge with `model.merge_geolora()`, or remove with "
            f"`model.remove_geolora()`. Received: name='{name}', model "
            f"'{model.name}' with {sorted(adaptation.adapters)}"
        )
    check_not_suspended([adaptation])


def check_adapted(model, what):
    """Refuses a model without adapters, or with those of another model."""
    layers = carriers(model)
    if not layers:
        raise ValueError(
            f"Only a model with adapted layers can be {what}; adapt it with "
            f"`model.enable_geolora()`. Received: model '{model.name}' "
            "without an adapted layer"
        )
    mine = adaptations_of(model)
    for layer in layers.values():
        owner = layer.adaptation
        if owner is not None and owner not in mine:
            raise ValueError(
                f"The adapters of this model belong to '{owner.model_name}', "
                "on which `enable_geolora` was called. Call the method there. "
                f"Received: model '{model.name}'"
            )


def check_not_suspended(adaptations):
    """Refuses changes while adapters are disabled."""
    for adaptation in adaptations:
        if adaptation.suspended:
            raise ValueError(
                "Inside `with model.geolora_disabled()` adapters rest; change "
                "them outside. "
                f"Received: model '{adaptation.model_name}' with its adapters "
                "disabled"
            )


def check_adapted_and_enabled(model, what):
    """Refuses all but models with adapters that are not disabled."""
    check_model(model)
    check_adapted(model, what)
    check_not_suspended(adaptations_of(model))


def check_optimizer_is_new(optimizer, variables):
    """Refuses an optimizer that was built on other variables."""
    known = variables_of(optimizer)
    if optimizer.built and {id(v) for v in known} != {id(v) for v in variables}:
        raise ValueError(
            "What trains has changed since the optimizer was built, by "
            "another adapter or another `trainable`. Compile the model "
            "again, with a new `GeoLoRA`. "
            f"Received: an optimizer of {len(known)} variables for "
            f"{len(variables)}"
        )


def check_optimizer(optimizer):
    """Refuses to train adapters with anything but `GeoLoRA`."""
    if find_geolora(optimizer) is not None:
        return
    raise ValueError(
        "Adapters are trained by GeoLoRA, around any Keras optimizer: "
        "`model.compile(optimizer=keras_geolora.GeoLoRA("
        "keras.optimizers.AdamW(1e-3)), ...)`. "
        f"Received: optimizer={optimizer!r}"
    )
