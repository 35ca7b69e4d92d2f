"""Which Keras layers can carry an adapter, and their adapted classes."""

import functools

import keras

from keras_geolora.keras_internals import own_variables
from keras_geolora.layers.adapted import AdaptedLayer
from keras_geolora.layers.conv import (
    GeoLoRAConv1D,
    GeoLoRAConv2D,
    GeoLoRAConv3D,
)
from keras_geolora.layers.dense import GeoLoRADense
from keras_geolora.layers.einsum_dense import GeoLoRAEinsumDense, einsum_of
from keras_geolora.layers.embedding import (
    GeoLoRAEmbedding,
    GeoLoRAReversibleEmbedding,
)

LINEAR = (GeoLoRADense, GeoLoRAEinsumDense)


# The Keras layers that can carry an adapter, and their adapted classes.
ADAPTED_CLASSES = {
    cls.plain_class: cls
    for cls in (
        *LINEAR,
        GeoLoRAEmbedding,
        GeoLoRAReversibleEmbedding,
        GeoLoRAConv1D,
        GeoLoRAConv2D,
        GeoLoRAConv3D,
    )
}


# How Keras names the weights that merging changes.
KERNELS = ("kernel", "embeddings", "reverse_embeddings")


def adapted_class(layer):
    """Returns the adapted class of a layer, or `None`.

    A class that only renames a Keras layer, as some in KerasHub do, gets its
    own adapted class, so that the layer remains an instance of it.
    """
    if isinstance(layer, AdaptedLayer):
        return type(layer)
    return adapted_subclass(type(layer))


@functools.cache
def adapted_subclass(cls):
    """Returns the adapted class for a Keras layer class, or `None`."""
    if cls in ADAPTED_CLASSES:
        return ADAPTED_CLASSES[cls]
    plain = next((c for c in cls.__mro__ if c in ADAPTED_CLASSES), None)
    if plain is None or any(
        getattr(cls, name) is not getattr(plain, name)
        for name in ("call", "build", "quantized_call")
    ):
        return None
    return type(
        f"GeoLoRA{cls.__name__}",
        (ADAPTED_CLASSES[plain], cls),
        {"plain_class": cls, "__module__": __name__},
    )


def refusal(layer):
    """Returns why a layer cannot carry an adapter, or `None` if it can."""
    name = type(layer).__name__
    if adapted_class(layer) is None:
        if "Depthwise" in name:
            return (
                f"{name} applies a small filter to each channel and mixes no "
                "channels, so there is no matrix that could have a low rank"
            )
        return f"there is no adapter for {name}"
    if not layer.built:
        return "it is not built: call the model on a batch of data first"
    if isinstance(layer, keras.layers.EinsumDense):
        try:
            einsum_of(layer.equation)
        except ValueError as error:
            return str(error)
    return None


def held_kernels(layers):
    """Returns a dict from the id of a layer to another that holds its kernel.

    The other layer holds the variable itself, as `SpectralNormalization` does
    to change it, so it would not see an update.
    """
    holders = {}
    for layer in layers:
        for variable in own_variables(layer):
            holders.setdefault(id(variable), []).append(layer)
    return {
        id(layer): next(other for other in holders[id(v)] if other is not layer)
        for layer in layers
        for v in own_variables(layer)
        if v.name in KERNELS and len(holders[id(v)]) > 1
    }


def kernel_view(layer):
    """Returns the `KernelView` of a layer, or `None` if it has none.

    Args:
        layer: Layer, adapted or not, or `None`.
    """
    if layer is None or refusal(layer) is not None:
        return None
    return adapted_class(layer).view_of(layer)


def kernel_shape(layer):
    """Returns the shape of a layer's kernel as a matrix, or `None`."""
    view = kernel_view(layer)
    return None if view is None else view.matrix_shape
