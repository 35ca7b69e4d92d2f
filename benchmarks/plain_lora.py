"""Plain LoRA, `x @ A @ B` beside every linear layer, to compare with."""

import functools

import keras
from keras import ops

from keras_geolora.layers.einsum_dense import einsum_of
from keras_geolora.layers.in_place import set_aside
from keras_geolora.layers.registry import adapted_subclass
from keras_geolora.model.freezing import Freeze
from keras_geolora.model.targeting import Layers


def enable_plain_lora(model, rank):
    """Freezes the backbone of a model and adds LoRA to its linear layers.

    Same layers as `enable_geolora`, Keras' initializers, `scale=1`, and a
    kernel seen as the same matrix.

    Returns:
        Dict from path to layer.
    """
    layers = Layers(model.backbone).to_adapt("all-linear")
    Freeze(model.backbone)
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
        input_dim, output_dim = self.view.matrix_shape
        self._tracker.unlock()
        self.A = self.add_weight(
            (input_dim, rank), initializer="he_uniform", name="A"
        )
        self.B = self.add_weight(
            (rank, output_dim), initializer="zeros", name="B"
        )
        self._tracker.lock()

    @property
    def einsum(self):
        if isinstance(self, keras.layers.EinsumDense):
            return einsum_of(self.equation)
        return None

    @property
    def view(self):
        return adapted_subclass(self.plain_class).view_of(self)

    def call(self, inputs, training=None):
        with set_aside(self, "activation") as activation:
            x = super().call(inputs)
        einsum, view, rows = self.einsum, self.view, inputs
        if einsum is not None:
            rows = einsum.inputs_to_rows(inputs, view)
        update = ops.matmul(ops.matmul(rows, self.A), self.B)
        if einsum is not None:
            update = einsum.rows_to_outputs(update, view)
        return activation(x + update)


@functools.cache
def lora_class(cls):
    """Returns a Keras layer class with LoRA."""
    return type(f"LoRA{cls.__name__}", (PlainLoRA, cls), {"plain_class": cls})
