"""Plain LoRA, `x @ A @ B` beside every linear layer, to compare with."""

import functools
import math

import keras
from keras import ops

from keras_geolora.layers.adapted import set_aside
from keras_geolora.layers.einsum_dense import matrix_view
from keras_geolora.model.adaptation import Frozen
from keras_geolora.model.targeting import Layers


def enable_plain_lora(model, rank):
    """Freezes the backbone of a model and adds LoRA to its linear layers.

    Same layers as `enable_geolora`, Keras' initializers, `scale=1`, and a
    kernel seen as the same matrix.

    Returns:
        Dict from path to layer.
    """
    layers = Layers(model.backbone).to_adapt("all-linear")
    Frozen(model.backbone)
    for layer in layers.values():
        layer.trainable = True
        for variable in layer.weights:
            variable.trainable = False
        layer.__class__ = lora_class(type(layer))
        layer.add_factors(rank)
    if hasattr(model, "_torch_params"):
        model._track_variables()
    return layers


class PlainLoRA:
    """Mixin for a Keras layer with two factors."""

    def add_factors(self, rank):
        input_dim, output_dim = self.matrix_shape
        self._tracker.unlock()
        self.A = self.add_weight(
            (input_dim, rank), initializer="he_uniform", name="A"
        )
        self.B = self.add_weight(
            (rank, output_dim), initializer="zeros", name="B"
        )
        self._tracker.lock()

    @property
    def view(self):
        if isinstance(self, keras.layers.EinsumDense):
            return matrix_view(self)
        return None

    @property
    def matrix_shape(self):
        if self.view is None:
            return tuple(self.kernel.shape)
        return tuple(
            map(math.prod, (self.view.contracted_shape, self.view.kept_shape))
        )

    def call(self, inputs, training=None):
        with set_aside(self, "activation") as activation:
            x = super().call(inputs)
        rows = inputs if self.view is None else self.view.inputs_to_rows(inputs)
        update = ops.matmul(ops.matmul(rows, self.A), self.B)
        if self.view is not None:
            update = self.view.rows_to_outputs(update)
        return activation(x + update)


@functools.cache
def lora_class(cls):
    """Returns a Keras layer class with LoRA."""
    return type(f"LoRA{cls.__name__}", (PlainLoRA, cls), {})
