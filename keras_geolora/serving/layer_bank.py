"""Layers that train along with adapters: each row is given other weights."""

import keras
from keras import ops

from keras_geolora.layers.adapter_bank import ROUTE
from keras_geolora.model.substitution import Substitution


class LayerBank(keras.layers.Layer):
    """The weights of one layer for every adapter, side by side.

    Such a layer is a head, or one of the `modules_to_save`. It is called as if
    for one row, with the weights of this row's adapter; the backend makes one
    operation for all rows of it. Kernels are gathered for every row, so large
    ones are slow.

    Args:
        layer: Built `keras.layers.Layer`.
        variables: Dict from key to its variables that have other values.
        places: Int, the number of places, with that of the base.
    """

    def __init__(self, layer, variables, places, **kwargs):
        super().__init__(trainable=False, **kwargs)
        # Not as an attribute that Keras tracks: the model has it already.
        self.target = Hidden(layer, list(variables.values()))
        self.values = [
            self.add_weight(
                name=f"value_{i}",
                shape=(places, *variable.shape),
                initializer="zeros",
                dtype=variable.dtype,
                autocast=False,
                trainable=False,
            )
            for i, variable in enumerate(variables.values())
        ]
        self.by_key = dict(zip(variables, self.values, strict=True))
        self.built = True

    def call_for_rows(self, *args, **kwargs):
        """Calls the layer, with other weights for every row.

        Outside of a route this is the call of the layer. Every tensor among
        the arguments must have the axis of the batch first.
        """
        layer, variables = self.target.layer, self.target.variables
        route = ROUTE.get()
        if route is None:
            return type(layer).call(layer, *args, **kwargs)
        arguments = args, kwargs
        flat = keras.tree.flatten(arguments)
        places = [i for i, x in enumerate(flat) if is_tensor(x)]
        values = [ops.take(x, route.ids, axis=0) for x in self.values]

        def call_for_one(elements):
            values, tensors = elements
            mine = list(flat)
            for i, tensor in zip(places, tensors, strict=True):
                mine[i] = ops.expand_dims(tensor, 0)
            args, kwargs = keras.tree.pack_sequence_as(arguments, mine)
            # A route ends here: the weights are those of one adapter.
            token = ROUTE.set(None)
            try:
                with Substitution(list(zip(variables, values, strict=True))):
                    outputs = type(layer).call(layer, *args, **kwargs)
            finally:
                ROUTE.reset(token)
            return keras.tree.map_structure(lambda y: y[0], outputs)

        tensors = [flat[i] for i in places]
        return ops.vectorized_map(call_for_one, (values, tensors))


class Hidden:
    """Hides a layer from the backend's tracking."""

    def __init__(self, layer, variables):
        self.layer = layer
        self.variables = variables


def is_tensor(x):
    """Returns whether an argument of a call is a tensor."""
    return hasattr(x, "shape") and hasattr(x, "dtype")
