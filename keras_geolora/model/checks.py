"""What is refused before anything changes."""

import keras

from keras_geolora.keras_internals import variables_of
from keras_geolora.layers.tree import layers_with_adapters
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
            f"non-empty string without '/' or '.'. Received: name={name!r}"
        )


def check_can_adapt(model, name):
    """Refuses a model that is not built, or is adapted in another way."""
    if not model.built:
        raise ValueError(
            "Only a built model has kernels to adapt. First call it on a "
            "batch of data, or write `model.build(input_shape)`. Received: "
            f"model '{model.name}', which is not built"
        )
    adaptation = getattr(model, "geolora_adaptation", None)
    strange = [
        layer
        for layer in layers_with_adapters(model).values()
        if adaptation is None or layer.adaptation is not adaptation
    ]
    if strange:
        raise ValueError(
            "A part of the model has already been adapted separately. Call "
            "`enable_geolora` on that part, or merge its adapters with "
            f"`merge_geolora()`. Received: model '{model.name}' with "
            f"{len(strange)} adapted layers"
        )
    if adaptation is None:
        return
    if name in adaptation.adapters:
        raise ValueError(
            "Every adapter of a model needs its own name. Choose another "
            "`name`, merge with `model.merge_geolora()`, or remove with "
            f"`model.remove_geolora()`. Received: name='{name}', model "
            f"'{model.name}' with {sorted(adaptation.adapters)}"
        )
    check_not_suspended([adaptation])


def check_adapted(model, what):
    """Refuses a model without adapters, or with those of another model."""
    layers = layers_with_adapters(model)
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
                "on which `enable_geolora` was called. Call the method on "
                f"that model. Received: model '{model.name}'"
            )


def check_not_suspended(adaptations):
    """Refuses changes while adapters are disabled."""
    for adaptation in adaptations:
        if adaptation.suspended:
            raise ValueError(
                "Adapters are inactive inside `with model.geolora_disabled()` "
                "and cannot be trained, changed or saved there. Do this "
                "outside of the block. Received: model "
                f"'{adaptation.model_name}' with its adapters disabled"
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
            "The trainable variables have changed since the optimizer was "
            "built, because of another adapter or another `trainable`. "
            "Compile the model again with a new `GeoLoRA`. Received: an "
            f"optimizer built for {len(known)} variables, but "
            f"{len(variables)} trainable variables"
        )


def check_optimizer(optimizer):
    """Refuses to train adapters with anything but `GeoLoRA`."""
    if find_geolora(optimizer) is not None:
        return
    raise ValueError(
        "Adapters must be trained with GeoLoRA, which wraps a Keras "
        "optimizer: `model.compile(optimizer=keras_geolora.GeoLoRA("
        "keras.optimizers.AdamW(1e-3)), ...)`. Received: "
        f"optimizer={optimizer!r}"
    )
