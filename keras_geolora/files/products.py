"""Adapters from products of two matrices."""

import numpy as np
from keras import ops

from keras_geolora.files.adapter_format import AdapterFileError
from keras_geolora.geometry.low_rank_sum import svd_of_sum
from keras_geolora.layers.factor import stacked
from keras_geolora.layers.options import AdapterOptions
from keras_geolora.layers.registry import kernel_shape, kernel_view
from keras_geolora.layers.tree import stable_paths
from keras_geolora.model.adapted_model import add_adapter
from keras_geolora.model.compiled_functions import after_a_change
from keras_geolora.model.parts import backbone_of


def add_products(model, name, layers, products, beside=None):
    """Adds an adapter whose updates are given as products of two matrices.

    Args:
        model: Built `keras.Model`.
        name: String, the name of the adapter.
        layers: Dict from path to layer.
        products: Dict from path to two arrays, of shapes `(input_dim, r)` and
            `(r, output_dim)`, or with an axis of experts in front.
        beside: Dict from key, as in `keyed_variables`, to a variable and its
            value: what trained beside the factors. Defaults to `None`.
    """
    factors = {}
    for path in layers:
        factors[path] = factors_of_product(*products[path])
        # A finite product may be too large for float32.
        if not all(np.isfinite(x).all() for x in factors[path]):
            raise AdapterFileError(
                f"The update of layer '{path}' is too large for float32. "
                "Nothing was loaded."
            )
    options = {}
    for path, (_, S, _) in factors.items():
        rank, largest = S.shape[-1], min(kernel_shape(layers[path]))
        columns = min(2 * rank, largest)
        options[path] = AdapterOptions(rank, max_rank=columns)
    for path, (U, _, V) in factors.items():
        found, view = (U.shape[-2], V.shape[-2]), kernel_view(layers[path])
        if found != view.matrix_shape or len(U.shape) != 2 + bool(view.batch):
            raise AdapterFileError(
                f"The update of layer '{path}' has shape {found}, "
                f"but its kernel has shape {view.matrix_shape}. "
                "Nothing was loaded."
            )
    saved, train_bias = saved_layers(model, layers, beside or {})
    add_adapter(model, name, layers, options, saved, train_bias)
    for path, path_factors in factors.items():
        layers[path].adapters_by_name()[name].assign_factors(*path_factors)
    for variable, value in (beside or {}).values():
        variable.assign(ops.cast(value, variable.dtype))
    after_a_change(model)


def factors_of_product(left, right):
    """Returns `U, S, V` of a product, or of one for each expert.

    Args:
        left: Array of shape `(..., input_dim, r)`.
        right: Array of shape `(..., r, output_dim)`.
    """
    if left.ndim == 3:
        each = map(factors_of_product, left, right)
        return stacked(list(each))
    U, sigma, V = svd_of_sum([(left, np.eye(right.shape[0]), right.T)])
    return tuple(x.astype("float32") for x in (U, np.diag(sigma), V))


def saved_layers(model, layers, beside):
    """Returns the layers that trained in full, and whether biases trained.

    Args:
        model: `keras.Model`.
        layers: Dict from path to layer, of those with factors.
        beside: Dict from key to variable and value.
    """
    adapted = {id(layer.bias) for layer in layers.values() if has_bias(layer)}
    paths = stable_paths(backbone_of(model))
    saved, train_bias = {}, False
    for key, (variable, _) in beside.items():
        path = key.rpartition("/")[0]
        if id(variable) in adapted:
            train_bias = True
        elif path in paths:  # what is in a head always trains
            saved[path] = paths[path]
    return list(saved.values()), train_bias


def has_bias(layer):
    """Returns whether a layer has a bias."""
    return getattr(layer, "bias", None) is not None
