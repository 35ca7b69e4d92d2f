"""Adapters as they are after a training, without one."""

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
