"""GeoLoRA for Keras 3: low-rank adaptation that finds its own ranks."""

import keras

from keras_geolora import callbacks
from keras_geolora.files.adapter_file import load_geolora, save_geolora
from keras_geolora.files.adapter_format import AdapterFileError
from keras_geolora.files.averaging import average_geolora
from keras_geolora.files.gguf import export_gguf
from keras_geolora.files.keras_lora import import_keras_lora
from keras_geolora.files.merged import export_merged_safetensors
from keras_geolora.files.peft import export_peft, import_peft
from keras_geolora.layers import (
    GeoLoRAConv1D,
    GeoLoRAConv2D,
    GeoLoRAConv3D,
    GeoLoRADense,
    GeoLoRAEinsumDense,
    GeoLoRAEmbedding,
    GeoLoRAReversibleEmbedding,
    LowRankAdapter,
)
from keras_geolora.model.adapter_layouts import adapter_layouts
from keras_geolora.model.compaction import compact_geolora
from keras_geolora.model.enabling import (
    enable_geolora,
    merge_geolora,
    remove_geolora,
    unmerge_geolora,
)
from keras_geolora.model.switching import (
    activate_geolora,
    combine_geolora,
    delete_geolora,
    geolora_adapters,
    geolora_disabled,
)
from keras_geolora.optimizer.geolora import GeoLoRA
from keras_geolora.optimizer.slot_rules import register_slot_rules
from keras_geolora.serving.add_to_export import add_to_export
from keras_geolora.serving.export import ExportError, export
from keras_geolora.serving.routed_model import RoutedModel, route_geolora
from keras_geolora.version import __version__
from keras_geolora.viewing.summary import geolora_summary, plot_ranks

__all__ = [
    "AdapterFileError",
    "ExportError",
    "GeoLoRA",
    "GeoLoRAConv1D",
    "GeoLoRAConv2D",
    "GeoLoRAConv3D",
    "GeoLoRADense",
    "GeoLoRAEinsumDense",
    "GeoLoRAEmbedding",
    "GeoLoRAReversibleEmbedding",
    "LowRankAdapter",
    "RoutedModel",
    "activate_geolora",
    "adapter_layouts",
    "add_to_export",
    "average_geolora",
    "callbacks",
    "combine_geolora",
    "compact_geolora",
    "delete_geolora",
    "enable_geolora",
    "export",
    "export_gguf",
    "export_merged_safetensors",
    "export_peft",
    "geolora_adapters",
    "geolora_disabled",
    "geolora_summary",
    "import_keras_lora",
    "import_peft",
    "load_geolora",
    "merge_geolora",
    "plot_ranks",
    "register_slot_rules",
    "remove_geolora",
    "route_geolora",
    "save_geolora",
    "unmerge_geolora",
    "__version__",
]

# Every `keras.Model`, KerasHub's included, gets these as methods.
for method in (
    enable_geolora,
    merge_geolora,
    unmerge_geolora,
    remove_geolora,
    geolora_disabled,
    geolora_adapters,
    activate_geolora,
    delete_geolora,
    combine_geolora,
    average_geolora,
    compact_geolora,
    geolora_summary,
    save_geolora,
    load_geolora,
    route_geolora,
):
    setattr(keras.Model, method.__name__, method)
del method
