"""Tells users the layouts of adapters, and how to choose them."""

import keras

from keras_geolora.distribution.layouts import model_parallel
from keras_geolora.layers.adapted import DEFAULT
from keras_geolora.layers.adapted import adapter_layouts as layouts_of
from keras_geolora.layers.registry import kernel_view, refusal


def adapter_layouts(layer, name=DEFAULT):
    """Returns the layouts of a layer's adapter, existing or not.

    Under a `keras.distribution.ModelParallel` distribution the layouts of an
    adapter follow from that of the kernel: the rows of `U` are sharded like the
    rows of the kernel, the rows of `V` like its columns, and `S` is replicated.
    Where several axes of a kernel form the rows, as in an `EinsumDense`, only a
    sharding of the first counts, as shards of a later one would not be
    contiguous rows. Otherwise, and beside a 4-bit quantized kernel, `U` or `V`
    is replicated.

    Keys of the `LayoutMap` that also match other weights of the layer, such as
    `".*attention.*"`, do not apply to its adapter. Keys that match only
    adapters do: the paths that this returns, or `".*/adapter/[USVPQ]"`. Add
    them before `enable_geolora`.

    Args:
        layer: Built layer that can carry an adapter, adapted or not.
        name: String, the name of the adapter. Defaults to `"default"`.

    Returns:
        Dict from the paths of `U`, `S` and `V` to their
        `keras.distribution.TensorLayout`s.

    Raises:
        ValueError: If the layer cannot carry an adapter, there is no
            `ModelParallel` distribution, or several keys match the adapter.

    Example:

    ```python
    import keras
    import keras_geolora

    mesh = keras.distribution.DeviceMesh(
        (1, 1), ["batch", "model"], devices=["cpu:0"]
    )
    layout_map = keras.distribution.LayoutMap(mesh)
    layout_map["net/hidden/kernel"] = (None, "model")
    distribution = keras.distribution.ModelParallel(layout_map=layout_map)
    with distribution.scope():
        hidden = keras.layers.Dense(16, name="hidden")
        model = keras.Sequential([keras.Input((8,)), hidden], name="net")
        layouts = keras_geolora.adapter_layouts(hidden)
        assert layouts["net/hidden/adapter/V"].axes == ("model", None)
        # Or every device has the whole adapter:
        for path in layouts:
            layout_map[path] = (None, None)
        model.enable_geolora(rank=2)
    ```
    """
    reason = refusal(layer)
    if reason is not None:
        raise ValueError(
            "Only layers that can be adapted have adapter layouts. Received: "
            f"layer={layer!r}, but {reason}"
        )
    if model_parallel() is None:
        raise ValueError(
            "Adapters have layouts only under "
            "`keras.distribution.ModelParallel`; under any other "
            "distribution, or without one, they are replicated. Call this "
            "inside `with distribution.scope():`, or after "
            "`keras.distribution.set_distribution(distribution)`. Received: "
            f"distribution={keras.distribution.distribution()!r}"
        )
    return layouts_of(layer, kernel_view(layer), name)
