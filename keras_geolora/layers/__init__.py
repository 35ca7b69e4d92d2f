"""Layers with low-rank adapters."""

from keras_geolora.layers.adapted import AdaptedLayer
from keras_geolora.layers.adapter import LowRankAdapter
from keras_geolora.layers.dense import GeoLoRADense
from keras_geolora.layers.einsum_dense import GeoLoRAEinsumDense

__all__ = [
    "AdaptedLayer",
    "GeoLoRADense",
    "GeoLoRAEinsumDense",
    "LowRankAdapter",
]
