"""Finds the weights of layers that are matrices without a layer of their own.

Of a layer without an adapted class, these are the weights of two axes, and of
three in a layer of experts: one matrix for each expert.
"""

import re

import keras

from keras_geolora.keras_internals import (
    direct_layers,
    own_variables,
    trainable_from_birth,
)
from keras_geolora.layers.kernel_view import KernelView
from keras_geolora.layers.registry import adapted_class
from keras_geolora.layers.tree import inside, stable_paths, walk
from keras_geolora.layers.weight import AdaptedWeight, Source, weights_in

# What the names of layers with experts contain.
EXPERTS = ("expert", "moe")


def with_raw_weights(model):
    """Returns `stable_paths(model)` and the weights that may be adapted.

    Args:
        model: `keras.Model`, adapted or not.

    Returns:
        Dict from path to layer or `AdaptedWeight`, as it is or as it would be.
    """
    return add_raw_weights(stable_paths(model), model)


def add_raw_weights(paths, model):
    """Returns paths of layers, with those of the weights that they own.

    Args:
        paths: Dict from path to layer.
        model: The model that contains the layers.
    """
    path_of = {id(layer): path for path, layer in paths.items()}
    for weight in raw_weights(model):
        owner = path_of[id(weight.source.owner)]
        paths.setdefault(f"{owner}/{weight.name}", weight)
    return paths


def raw_weights(model):
    """Returns the list of weights inside a model that may be adapted."""
    shared = shared_variables(model)
    found = []
    for path, layer in walk(model):
        if adapted_class(layer) is None and not isinstance(layer, keras.Model):
            found += weights_of(layer, path, shared)
    return found


def weights_of(layer, path, shared):
    """Returns the weights of one layer that may be adapted.

    Args:
        layer: Layer without an adapted class.
        path: String, its path.
        shared: Set of the ids of variables that several layers hold.
    """
    adapted = {id(x.variable): x for x in weights_in(layer)}
    found, layers = {}, {x.name for x in direct_layers(layer)}
    for variable in trainable_from_birth(layer):
        name = stable_name_of(variable, layer)
        if name in layers and id(variable) not in adapted:
            name = f"{name}_weight"
        if id(variable) in adapted:
            weight = adapted[id(variable)]
            found[weight.name] = weight
            continue
        view = default_view(variable, f"{path}/{type(layer).__name__}")
        if view is None or id(variable) in shared or name in found:
            continue
        found[name] = AdaptedWeight(Source(layer, variable, view), name)
    return list(found.values())


def default_view(variable, owner):
    """Returns how to see a variable as matrices, or `None`.

    Args:
        variable: `keras.Variable`.
        owner: String that describes its owner, the path and the class.
    """
    shape = tuple(variable.shape)
    if not keras.backend.is_float_dtype(variable.dtype):
        return None
    if len(shape) == 2 and min(shape) > 1:
        return KernelView(variable.name, shape, rows=(0,), columns=(1,))
    words = f"{owner}/{variable.name}".lower()
    is_bank = len(shape) == 3 and any(word in words for word in EXPERTS)
    if is_bank and min(shape[1:]) > 1:
        return KernelView(
            variable.name, shape, batch=(0,), rows=(1,), columns=(2,)
        )
    return None


def is_bank(layer):
    """Returns whether a layer or weight is a batch of matrices."""
    return isinstance(layer, AdaptedWeight) and bool(layer.kernel_view.batch)


def shared_variables(model):
    """Returns the ids of variables that more than one layer holds."""
    seen, shared = set(), set()
    for layer in (model, *inside(model)):
        for variable in own_variables(layer):
            (shared if id(variable) in seen else seen).add(id(variable))
    return shared


def stable_name_of(variable, owner):
    """Returns a name of a variable that is the same for every instance.

    A variable without a name of its own gets that of the attribute.
    """
    if re.fullmatch(r"variable(_\d+)?", variable.name):
        for attribute, value in vars(owner).items():
            if value is variable:
                return attribute
    return variable.name
