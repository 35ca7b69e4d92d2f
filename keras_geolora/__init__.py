"""GeoLoRA for Keras 3: low-rank adaptation that finds its own ranks."""

import keras

from keras_geolora import callbacks
from keras_geolora.conversion import enable_geolora, merge_geolora
from keras_geolora.layers import (
    GeoLoRADense,
    GeoLoRAEinsumDense,
    LowRankAdapter,
)
from keras_geolora.optimizer import GeoLoRA
from keras_geolora.report import geolora_summary
from keras_geolora.transport import register_slot_rules

__version__ = "0.1.0"

__all__ = [
    "GeoLoRA",
    "GeoLoRADense",
    "GeoLoRAEinsumDense",
    "LowRankAdapter",
    "callbacks",
    "enable_geolora",
    "geolora_summary",
    "merge_geolora",
    "register_slot_rules",
]

# Every `keras.Model`, KerasHub's included, gets these as methods.
keras.Model.enable_geolora = enable_geolora
keras.Model.merge_geolora = merge_geolora
keras.Model.geolora_summary = geolora_summary
