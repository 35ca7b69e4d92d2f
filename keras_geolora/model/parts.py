"""Which part of a model is adapted, and by what."""

import keras

from keras_geolora.layers.tree import inside


def backbone_of(model):
    """Returns the backbone of a KerasHub task, or else the model itself."""
    # Some backbones contain another, which is only a part of them.
    is_backbone = any(c.__name__ == "Backbone" for c in type(model).__mro__)
    backbone = getattr(model, "backbone", None)
    if is_backbone or not isinstance(backbone, keras.layers.Layer):
        return model
    return backbone


def adapted_parts(model):
    """Returns the adapted ones of a model and the models inside."""
    return [x for x in (model, *inside(model)) if is_adapted_model(x)]


def is_adapted_model(part):
    """Returns whether a model has the class of an adapted one, now."""
    return hasattr(type(part), "plain_class") and hasattr(
        part, "geolora_adaptation"
    )


def adaptations_of(model):
    """Returns the `Adaptation`s of the model and of models inside."""
    adaptations = [part.geolora_adaptation for part in adapted_parts(model)]
    for adaptation in adaptations:
        adaptation.take_in_changes()
    return adaptations


def plain_class_of(model):
    """Returns the class that a model has without adapters."""
    return getattr(model, "plain_class", type(model))
