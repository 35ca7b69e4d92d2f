"""What `compile` sets on a model, and whether it fits after a change.

Merging, removing, adding or activating adapters changes what a model trains. An
optimizer that was built for other variables would fail in the next step, or in
a saved model, so it is removed: the model is then as before its first
`compile`, and Keras asks to call that again.
"""

import keras

from keras_geolora.keras_internals import (
    BEFORE_COMPILE,
    SINCE_COMPILE,
    variables_of,
)
from keras_geolora.layers.factor import factor_of
from keras_geolora.layers.tree import layers_with_adapters, models_of
from keras_geolora.optimizer.geolora import find_geolora
from keras_geolora.optimizer.of_model import optimizers_of, trains_as_keras

# Attributes that `compile` of an adapted model adds.
OURS = ("geolora_auto_compiled",)


def fits(model):
    """Returns whether the optimizers of a model fit what it trains."""
    adapters = {
        id(adapter): layer.adapter is adapter
        for layer in layers_with_adapters(model).values()
        for adapter in layer.adapters_by_name().values()
    }
    for name, optimizer in optimizers_of(model).items():
        is_geolora = find_geolora(optimizer) is not None
        of_keras = name == "optimizer" and trains_as_keras(model)
        if is_geolora and not adapters:
            return False
        if adapters and of_keras and not is_geolora:
            return False
        if optimizer.built and not knows_all(
            optimizer, model, adapters, exactly=of_keras
        ):
            return False
    return True


def knows_all(optimizer, model, active, exactly):
    """Returns whether an optimizer was built on variables a model may train.

    Args:
        optimizer: Built optimizer.
        model: `keras.Model`.
        active: Dict from the ids of adapters to whether they are active.
        exactly: Bool, whether it must know all trainable variables.
    """

    def may_train(variable):
        factor = factor_of(variable)
        if factor is not None:
            return active.get(id(factor.adapter), False)
        return id(variable) in present

    present = {id(v) for v in model.variables}
    known = variables_of(optimizer)
    if not all(map(may_train, known)):
        return False
    return not exactly or {id(v) for v in model.trainable_variables} <= {
        id(v) for v in known
    }


class CompiledState:
    """What `compile` set on a model, removed from it.

    Args:
        model: `keras.Model`, afterwards as before its first `compile`.
    """

    def __init__(self, model):
        self.model = model
        own = [n for n in optimizers_of(model) if n != "optimizer"]
        names = (*BEFORE_COMPILE, *SINCE_COMPILE, *OURS, *own)
        self.attributes = {n: vars(model)[n] for n in names if n in vars(model)}
        # Deleted, because TensorFlow would not notice overwriting.
        for name in self.attributes:
            delattr(model, name)
        vars(model).update(BEFORE_COMPILE, **dict.fromkeys(own))

    def put_back(self):
        """Restores on the model what was removed."""
        for name, value in self.attributes.items():
            if isinstance(value, keras.optimizers.Optimizer):
                setattr(self.model, name, value)  # TensorFlow tracks these
            else:
                vars(self.model)[name] = value


def drop_unfit(model):
    """Removes what was compiled for other variables.

    Covers the model and the models inside.

    Returns:
        List of `CompiledState`s.
    """
    return [CompiledState(x) for x in models_of(model) if not fits(x)]
