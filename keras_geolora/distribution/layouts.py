"""Layouts of adapters and optimizer state under `keras.distribution`.

A `ModelParallel` distribution looks up the layout of every new variable in a
`LayoutMap`, by its path. The map was written for the pretrained model: a key
such as `".*attention.*"` means the kernels of these layers, but would also
match the factors of their adapters by accident. So their layouts are derived
from that of the kernel instead:

| variable        | shape                  | layout                            |
| --------------- | ---------------------- | --------------------------------- |
| `U`, `P`        | (input_dim, max_rank)  | rows as the rows of the kernel    |
| `V`, `Q`        | (output_dim, max_rank) | rows as the columns of the kernel |
| `S`             | (max_rank, max_rank)   | replicated                        |
| `K`, `S`, `L`   | as `U`, `S`, `V`       | as any of these, stacked          |
| of experts      | one more axis in front | that as the axis of the experts   |
| all other state |                        | replicated                        |

Under any other distribution, and without one, this module does nothing.
"""

import contextlib
import itertools

import keras

from keras_geolora.keras_internals import set_layout

# A weight that no key of a map was written for.
UNFORESEEN = "unforeseen/weight"


def model_parallel():
    """Returns the current `ModelParallel` distribution, or `None`."""
    distribution = keras.distribution.distribution()
    if isinstance(distribution, keras.distribution.ModelParallel):
        return distribution
    return None


def layout_of(variable):
    """Returns the `TensorLayout` of a variable, `None` if nothing is sharded.

    Args:
        variable: `keras.Variable`.
    """
    distribution = model_parallel()
    if distribution is None:
        return None
    return distribution.get_variable_layout(variable)


def stacked_layout(layouts, batched):
    """Returns the layout of stacked variables.

    The stack is sharded along an axis if any of the variables is: a shard of
    a replicated variable costs no device more than the whole. So the stacks,
    and with them the names and the number of variables in a file, do not
    depend on layouts. The axis of the stack is sharded if every part has such
    an axis, as experts do, and all are sharded alike.

    Args:
        layouts: List of `TensorLayout`s, or of `None`s.
        batched: List of bools, whether a variable has an axis of matrices in
            front, which becomes a part of the axis of the stack.
    """
    if layouts[0] is None:
        return None
    apart = [
        (layout.axes[0], layout.axes[1:]) if has_axis else (None, layout.axes)
        for layout, has_axis in zip(layouts, batched, strict=True)
    ]
    first, *others = {name for name, _ in apart}
    axes = [None if others else first]
    for names in itertools.zip_longest(*(rest for _, rest in apart)):
        new = (name for name in names if name and name not in axes)
        axes.append(next(new, None))
    return keras.distribution.TensorLayout(axes, layouts[0].device_mesh)


@contextlib.contextmanager
def apart_from_map(layouts=None):
    """Does not apply the user's `LayoutMap` to new variables.

    Args:
        layouts: Dict from paths of variables to layouts. All other variables
            that are created inside are replicated.
    """
    distribution = model_parallel()
    if distribution is None:
        yield
        return
    layout_map = keras.distribution.LayoutMap(distribution.device_mesh)
    layout_map.update(layouts or {})
    with keras.distribution.ModelParallel(
        layout_map=layout_map,
        batch_dim_name=distribution.batch_dim_name,
        auto_shard_dataset=distribution.auto_shard_dataset,
    ).scope():
        yield


def settle(variables):
    """Sets the layouts of variables to those of the current scope.

    Keras does so when it computes their values. For variables created while a
    model is traced, that is later, outside of the scope.

    Args:
        variables: List of `keras.Variable`s.
    """
    if model_parallel() is not None:
        for variable in variables:
            set_layout(variable, layout_of(variable))


def factor_layouts(layer, adapter, kernel, axes):
    """Chooses the layouts of the factors of an adapter.

    Args:
        layer: String, the path of the layer.
        adapter: String, the name of the adapter in it.
        kernel: Variable or tensor, the kernel that the layer computes with.
        axes: Lists of the axes of the kernel that become the rows and the
            columns of its matrix, and, of experts, of those along which there
            are several matrices.

    Returns:
        Dict from the paths of the factors to their `TensorLayout`s;
        empty if nothing is sharded. Keys of the user's map that are meant for
        adapters take precedence, see `stated_layout`.
    """
    distribution = model_parallel()
    if distribution is None:
        return {}
    rows, columns, *each = kernel_sharding(distribution, kernel, axes)
    layouts = {}
    shardings = {"U": rows, "S": None, "V": columns, "P": rows, "Q": columns}
    for role, sharding in shardings.items():
        path = f"{layer}/{adapter}/{role}"
        layout = stated_layout(distribution, layer, path)
        if layout is None:
            layout = keras.distribution.TensorLayout(
                (*each, sharding, None), distribution.device_mesh
            )
        layouts[path] = layout
    return layouts


def kernel_sharding(distribution, kernel, axes):
    """Finds the mesh axes along which a kernel, as a matrix, is sharded.

    Args:
        distribution: `ModelParallel`.
        kernel: Variable. The layout of a tensor, which quantized layers
            compute, is not known.
        axes: Lists of axes of the kernel, as in `factor_layouts`.

    Returns:
        List of the mesh axis, or `None`, of each of these.
    """
    if not isinstance(kernel, keras.Variable):
        return [None for _ in axes]
    names = distribution.get_variable_layout(kernel).axes
    names += (None,) * (len(kernel.shape) - len(names))

    def leading(axes):
        # Shards of a later axis would not be contiguous in the matrix.
        long = [axis for axis in axes if kernel.shape[axis] > 1]
        return names[long[0]] if long else None

    return list(map(leading, axes))


def stated_layout(distribution, layer, path):
    """Returns the layout that a key of the map states for an adapter.

    A key that matches any other weight of the layer, too, was not written for
    adapters.

    Args:
        distribution: `ModelParallel`.
        layer: String, the path of a layer.
        path: String, the path of a variable of its adapter.

    Returns:
        `TensorLayout`, or `None` if there is no such key.

    Raises:
        ValueError: If there is such a key, but another one matches, too.
    """
    by_accident = find_layout(distribution, f"{layer}/{UNFORESEEN}")
    layout = find_layout(distribution, path)
    if not isinstance(layout, ValueError):
        return None if layout is by_accident else layout
    if isinstance(by_accident, ValueError):
        return None
    raise ValueError(
        "Only one key of a layout map may match an adapter. Use the whole "
        "path, which takes precedence over all other keys: "
        f"`layout_map['{path}'] = (None, None)`. Received: {layout}"
    ) from layout


def find_layout(distribution, path):
    """Looks up a path in the map: a layout, `None`, or the error it raises."""
    try:
        return distribution.get_tensor_layout(path)
    except ValueError as error:  # several keys match
        return error
