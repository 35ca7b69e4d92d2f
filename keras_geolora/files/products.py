"""Adapters from products of two matrices."""

import numpy as np

from keras_geolora.files.adapter_format import AdapterFileError
from keras_geolora.geometry.low_rank_sum import svd_of_sum
from keras_geolora.layers.options import AdapterOptions
from keras_geolora.layers.registry import kernel_shape
from keras_geolora.model.adapted_model import add_adapter


def add_products(model, name, layers, products):
    """Adds an adapter whose updates are given as products of two matrices."""
    factors = {}
    for path in layers:
        left, right = products[path]
        found = svd_of_sum([(left, np.eye(len(right)), right.T)])
        # A finite product may be too large for float32.
        factors[path] = tuple(x.astype("float32") for x in found)
        if not all(np.isfinite(x).all() for x in factors[path]):
            raise AdapterFileError(
                f"The update of layer '{path}' is too large for float32. "
                "Nothing was loaded."
            )
    options = {}
    for path, (_, sigma, _) in factors.items():
        largest = min(kernel_shape(layers[path]))
        columns = min(2 * len(sigma), largest)
        options[path] = AdapterOptions(len(sigma), max_rank=columns)
    for path, (U, _, V) in factors.items():
        if (len(U), len(V)) != kernel_shape(layers[path]):
            raise AdapterFileError(
                f"The update of layer '{path}' has shape {(len(U), len(V))}, "
                f"but its kernel has shape {kernel_shape(layers[path])}. "
                "Nothing was loaded."
            )
    add_adapter(model, name, layers, options, [], train_bias=False)
    for path, (U, sigma, V) in factors.items():
        adapter = layers[path].adapters_by_name()[name]
        adapter.assign_factors(U, np.diag(sigma), V)
