"""Finds the weights of layers that are matrices without a layer of their own.

Of a layer without an adapted class, these are

- weights with two axes longer than one,
- those with three in a layer of experts, one matrix for each expert,
- the kernel of an `EinsumDense` with a matrix for each part of its inputs,
- tables of positions,
- kernels of transposed convolutions.

The weights of recurrent cells belong to the layer that runs the cells, so that
sums are formed once, not in every time step.
"""

import re

import keras

from keras_geolora.keras_internals import (
    direct_layers,
    own_variables,
    trainable_from_birth,
)
from keras_geolora.layers.einsum_dense import batched_axes
from keras_geolora.layers.kernel_view import KernelView
from keras_geolora.layers.registry import adapted_class
from keras_geolora.layers.tree import inside, stable_paths
from keras_geolora.layers.weight import AdaptedWeight, Source, weights_in

TRANSPOSED = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)
# What the names contain of weights with a matrix for each expert.
EXPERTS = ("expert", "moe")


def with_raw_weights(model, axes=None):
    """Returns `stable_paths(model)` and the weights that may be adapted.

    Args:
        model: `keras.Model`, adapted or not.
        axes: Dict from path to the axes of a weight, as in `view_by_axes`,
            for those where they were given.

    Returns:
        Dict from path to layer or `AdaptedWeight`, as it is or as it would be.
    """
    return add_raw_weights(stable_paths(model), model, (axes or {}).get)


def add_raw_weights(paths, model, axes_of=lambda path: None):
    """Returns paths of layers, with those of the weights that they own.

    Args:
        paths: Dict from path to layer.
        model: The model that contains the layers.
        axes_of: Function of a path that returns the axes of a weight, as in
            `view_by_axes`, or `None` for the usual ones.
    """
    shared = shared_variables(model)
    found, cells = dict(paths), set()
    for path, layer in paths.items():
        if may_own(layer) and id(layer) not in cells:
            for weight in weights_of(layer, path, shared, axes_of):
                found.setdefault(f"{path}/{weight.name}", weight)
        if isinstance(layer, keras.layers.RNN):
            cells |= {id(cell) for cell in inside(layer)}
    return found


def may_own(layer):
    """Returns whether a layer may own weights that are found here."""
    if isinstance(layer, keras.layers.EinsumDense):
        lora = getattr(layer, "lora_enabled", False)
        return batched_axes(layer.equation) is not None and not lora
    return adapted_class(layer) is None and not isinstance(layer, keras.Model)


def weights_of(layer, path, shared, axes_of):
    """Returns the weights of one layer that may be adapted.

    Args:
        layer: Layer without an adapted class.
        path: String, its path.
        shared: Set of the ids of variables that several layers hold.
        axes_of: As in `add_raw_weights`.
    """
    adapted = {id(x.variable): x for x in weights_in(layer)}
    found, layers = {}, {x.name for x in direct_layers(layer)}
    for name, variable in variables_of(layer):
        if id(variable) in adapted:
            weight = adapted[id(variable)]
            found[weight.name] = weight
            continue
        if name in layers:
            name = f"{name}_weight"
        axes = axes_of(f"{path}/{name}")
        if axes is None:
            view = default_view(variable, layer, path)
        else:
            view = view_by_axes(variable, axes)
        if view is None or id(variable) in shared or name in found:
            continue
        source = Source(layer, variable, view, axes)
        found[name] = AdaptedWeight(source, name)
    return list(found.values())


def variables_of(layer):
    """Yields the name and the variable of what a layer computes with itself."""
    for variable in trainable_from_birth(layer):
        yield stable_name_of(variable, layer), variable
    if isinstance(layer, keras.layers.RNN):
        cells = [cell for cell in inside(layer) if trainable_from_birth(cell)]
        for number, cell in enumerate(cells):
            for variable in trainable_from_birth(cell):
                name = stable_name_of(variable, cell)
                if len(cells) > 1:
                    name = f"cell_{number}_{name}"
                yield name, variable


def default_view(variable, owner, path):
    """Returns how to see a variable as matrices, or `None`.

    Args:
        variable: `keras.Variable`.
        owner: The layer that computes with it.
        path: String, the path of the owner.
    """
    shape = tuple(variable.shape)
    if not keras.backend.is_float_dtype(variable.dtype):
        return None
    batch, rows = (), None
    long = [axis for axis, size in enumerate(shape) if size > 1]
    words = f"{path}/{type(owner).__name__}/{variable.name}".lower()
    if "depthwise" in variable.name or "Depthwise" in type(owner).__name__:
        return None  # a filter for each channel
    if variable.name.endswith("bias"):
        return None  # though it may have a row for each expert, or each gate
    if isinstance(owner, keras.layers.EinsumDense):
        batch, rows, _ = batched_axes(owner.equation)
    elif isinstance(owner, TRANSPOSED):
        rows = (len(shape) - 1,)  # the input channels come last
    elif len(long) == 2:
        rows = tuple(range(long[0] + 1))
    elif len(long) == 3 == len(shape) and any(w in words for w in EXPERTS):
        batch, rows = (0,), (1,)
    elif long and variable.name.startswith("pos"):  # a table of positions
        rows = tuple(range(len(shape) - 1))
    if rows is None:
        return None
    axes = range(len(shape))
    columns = tuple(axis for axis in axes if axis not in (*batch, *rows))
    view = KernelView(variable.name, shape, rows, columns, batch)
    return view if min(view.matrix_shape) > 1 else None


def view_by_axes(variable, axes):
    """Returns how to see a variable as matrices, as a user says.

    Args:
        variable: `keras.Variable`.
        axes: String with a letter for each axis: `"r"` for rows, `"c"` for
            columns, `"b"` for those along which there are several matrices.
    """
    shape = tuple(variable.shape)
    if len(axes) != len(shape) or not {"r", "c"} <= set(axes) <= set("rcb"):
        raise ValueError(
            "The axes of a weight are said by a letter for each: 'r' for those "
            "that become rows of a matrix, 'c' for columns and 'b' for several "
            "matrices, for example 'brc'. Rows and columns are needed. "
            f"Received: {axes!r} for '{variable.path}' of shape {shape}"
        )
    rows, columns, batch = (
        tuple(i for i, letter in enumerate(axes) if letter == wanted)
        for wanted in "rcb"
    )
    return KernelView(variable.name, shape, rows, columns, batch)


def is_batched(layer):
    """Returns whether a weight holds a matrix for each expert."""
    return isinstance(layer, AdaptedWeight) and bool(layer.kernel_view.batch)


def biases_beside(weight):
    """Returns the names of the biases of the layer that owns a weight."""
    names = (name for name, _ in variables_of(weight.source.owner))
    return [name for name in names if name.endswith("bias")]


def held_by_models(model):
    """Returns the paths of the weights that models hold directly."""
    models = (x for x in (model, *inside(model)) if isinstance(x, keras.Model))
    return [v.path for x in models for v in trainable_from_birth(x)]


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
