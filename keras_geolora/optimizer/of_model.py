"""The optimizers that a model holds."""

import keras

from keras_geolora.optimizer.geolora import find_geolora


def optimizers_of(model):
    """Returns the optimizers that a model holds, by the names of attributes.

    A model with a `compile` of its own may hold several.
    """
    return {
        name: value
        for name, value in vars(model).items()
        if isinstance(value, keras.optimizers.Optimizer)
    }


def geolora_optimizers(model):
    """Returns the list of the `GeoLoRA` optimizers that a model holds."""
    found = map(find_geolora, optimizers_of(model).values())
    return [optimizer for optimizer in found if optimizer is not None]


def trains_as_keras(model):
    """Returns whether a model takes the steps that Keras takes.

    A model with a `train_step` of its own may train with other optimizers
    than `model.optimizer`, each on a part of the variables.
    """
    plain = getattr(model, "plain_class", type(model))
    return plain.train_step is keras.Model.train_step
