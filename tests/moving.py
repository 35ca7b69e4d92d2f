"""Adapters as they are after a training, without one; and shared trainings."""

import functools

import keras
import numpy as np
import reference
from keras import ops

from keras_geolora.layers.factor import factor_of
from keras_geolora.layers.tree import adapted_layers


def move(model):
    """Gives every adapter and what trains beside it other values."""
    rng = np.random.default_rng(1)
    for variable in model.trainable_variables:
        if factor_of(variable):
            continue
        value = ops.convert_to_numpy(variable)
        noise = rng.normal(size=value.shape).astype("float32") * 0.1
        variable.assign(np.where(value != 0, value, noise))
    for layer in adapted_layers(model).values():
        adapter = layer.adapter
        sigma = 0.3 / np.arange(1, adapter.max_rank + 1)
        shape = adapter.input_dim, adapter.output_dim
        factors = reference.random_factors(rng, *shape, sigma)
        reference.put_factors(adapter, *factors)


def anew(create):
    """Returns a compiled model as `create` makes it, the same at every call.

    So its training step is traced once for all who ask. They may train it, and
    leave its layers and its optimizer as they are.
    """
    model, variables, values = created_once(create)
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    return model


@functools.cache
def created_once(create):
    model = create()
    model.optimizer.build(model.trainable_variables)
    variables = [*model.variables, *model.optimizer.variables]
    values = [np.array(ops.convert_to_numpy(v)) for v in variables]
    return model, variables, values


def take_a_step(model, x, y):
    """Trains on one batch, eagerly where it would take longer to trace."""
    model.run_eagerly = keras.backend.backend() == "tensorflow"
    model.train_on_batch(x, y)
    return model
