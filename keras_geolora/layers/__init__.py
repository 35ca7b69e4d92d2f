"""Layers with low-rank adapters."""

from keras_geolora.layers.adapted import AdaptedLayer
from keras_geolora.layers.adapter import LowRankAdapter
from keras_geolora.layers.conv import (
    GeoLoRAConv1D,
    GeoLoRAConv2D,
    GeoLoRAConv3D,
)
from keras_geolora.layers.dense import GeoLoRADense
from keras_geolora.layers.einsum_dense import GeoLoRAEinsumDense
from keras_geolora.layers.embedding import (
    GeoLoRAEmbedding,
    GeoLoRAReversibleEmbedding,
)

__all__ = [
    "AdaptedLayer",
    "GeoLoRAConv1D",
    "GeoLoRAConv2D",
    "GeoLoRAConv3D",
    "GeoLoRADense",
    "GeoLoRAEinsumDense",
    "GeoLoRAEmbedding",
    "GeoLoRAReversibleEmbedding",
    "LowRankAdapter",
]
