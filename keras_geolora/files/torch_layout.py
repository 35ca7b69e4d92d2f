"""How PyTorch modules store the variables of Keras layers."""

import dataclasses
import math

import keras
import numpy as np

from keras_geolora.files.base_weights import HEAD, keyed_variables
from keras_geolora.files.family_names import LM_HEAD
from keras_geolora.layers.registry import kernel_view
from keras_geolora.layers.tree import stable_paths
from keras_geolora.model.parts import backbone_of

# What PyTorch calls the variables of layers.
PARAMETERS = {
    "kernel": "weight",
    "embeddings": "weight",
    "gamma": "weight",
    "scale": "weight",
    "bias": "bias",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
    # A module of its own, wherever the layer is.
    "reverse_embeddings": f"{LM_HEAD}.weight",
}
# Variables with one axis.
VECTORS = "gamma", "scale", "beta", "moving_mean", "moving_variance"


@dataclasses.dataclass(frozen=True)
class TorchLayout:
    """How a variable becomes a parameter of a module, and back.

    Attributes:
        parameter: String, the name of the parameter in its module.
        shape: Tuple of ints, the shape of the variable.
        order: Tuple of the axes of the variable in the order of PyTorch.
        torch_shape: Tuple of ints, the shape of the parameter.
    """

    parameter: str
    shape: tuple
    order: tuple
    torch_shape: tuple

    def to_torch(self, value):
        """Returns the value of the parameter."""
        return np.transpose(value, self.order).reshape(self.torch_shape)

    def to_keras(self, value):
        """Undoes `to_torch`."""
        ordered = value.reshape([self.shape[axis] for axis in self.order])
        return np.transpose(ordered, np.argsort(self.order))


def layout_of(name, shape, layer=None):
    """Returns the `TorchLayout` of a variable, or `None` if it has none.

    Args:
        name: String, the name of the variable.
        shape: Tuple of ints, its shape.
        layer: The layer that has it, or `None` if only a file is there.
    """
    parameter = PARAMETERS.get(name)
    axes = tuple(range(len(shape)))
    if parameter is None or (name in VECTORS and len(shape) != 1):
        return None
    if name == "bias":
        return TorchLayout(parameter, shape, axes, (math.prod(shape),))
    if name == "kernel":
        return layout_of_kernel(shape, layer)
    if name in VECTORS:
        return TorchLayout(parameter, shape, axes, shape)
    if len(shape) != 2:
        return None
    order = axes[::-1] if name == "reverse_embeddings" else axes
    permuted = tuple(shape[axis] for axis in order)
    return TorchLayout(parameter, shape, order, permuted)


def layout_of_kernel(shape, layer):
    """Returns the `TorchLayout` of a kernel, or `None` if it is not known."""
    if layer is None:
        rows, columns = (0,), (1,)
        if len(shape) != 2:
            return None  # of an `EinsumDense` or of a convolution
    elif is_convolution(layer):
        *positions, rows, columns = range(len(shape))
        order = (columns, rows, *positions)
        permuted = tuple(shape[axis] for axis in order)
        return TorchLayout("weight", shape, order, permuted)
    else:
        view = kernel_view(layer)
        if view is None:
            return None
        rows, columns = view.rows, view.columns
    sizes = (math.prod(shape[i] for i in axes) for axes in (columns, rows))
    return TorchLayout("weight", shape, (*columns, *rows), tuple(sizes))


def is_convolution(layer):
    """Returns whether a layer is a convolution, and not a transposed one."""
    kinds = keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D
    others = (
        keras.layers.Conv1DTranspose,
        keras.layers.Conv2DTranspose,
        keras.layers.Conv3DTranspose,
    )
    return isinstance(layer, kinds) and not isinstance(layer, others)


def layouts_in(model):
    """Returns a dict from key to variable and `TorchLayout`, or `None`.

    Args:
        model: `keras.Model`.

    Returns:
        Dict with the keys of `keyed_variables`.
    """
    scope = backbone_of(model)
    layers = {f"{HEAD}{path}": x for path, x in stable_paths(model).items()}
    layers |= {"": scope, **stable_paths(scope)}
    found = {}
    for key, variable in keyed_variables(model).items():
        path, _, name = key.rpartition("/")
        shape = tuple(variable.shape)
        found[key] = variable, layout_of(name, shape, layers.get(path))
    return found


def in_torch(values, layouts):
    """Returns values by path and parameter, and the keys of all others.

    Args:
        values: Dict from key to array.
        layouts: Dict from key to `TorchLayout` or `None`.
    """
    found, others = {}, []
    for key, value in values.items():
        if layouts[key] is None:
            others.append(key)
            continue
        path = key.rpartition("/")[0]
        parameter = layouts[key].parameter
        found.setdefault(path, {})[parameter] = layouts[key].to_torch(value)
    return found, others
