"""GeoLoRA for Keras 3: low-rank adaptation that finds its own ranks."""

__version__ = "0.1.0"
