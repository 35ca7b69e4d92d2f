"""Makes the buffers of adapters as narrow as their ranks allow."""

import operator

from keras_geolora.layers.adapter import check_columns
from keras_geolora.layers.tree import layers_with_adapters
from keras_geolora.model.buffers import resize_buffers, settle
from keras_geolora.model.checks import check_adapted_and_enabled


def compact_geolora(model, multiple=8, *, min_saving=0.0, optimizer=None):
    """Cuts the buffers of all adapters to the ranks that training found.

    The factors of an adapter have `max_rank` columns, of which `rank` are in
    use and the others are zero. This removes the others, which saves memory and
    time. Outputs do not change but for rounding: products of other shapes may
    add in another order. Training continues where it was: the slots of the
    optimizer are cut with the factors, and `model.optimizer` and the optimizers
    inside stay the same objects. (Around Adafactor later steps differ: its
    means over columns include unused ones.) Compiled functions compile again.
    From then on ranks grow only up to the new `max_rank`.

    Also a method of every `keras.Model`: `model.compact_geolora()`. To compact
    during `fit`, use `keras_geolora.callbacks.EpochCompaction`.

    Args:
        model: `keras.Model` with adapted layers.
        multiple: Int. The new width is the rank, rounded up to a multiple of
            this, but at most the old width. This leaves some room to grow and
            suits accelerators. 1 removes all unused columns, for inference.
            Defaults to 8.
        min_saving: Float in [0, 1). Nothing happens if the buffers would shrink
            by less than this share. Defaults to 0.
        optimizer: The `GeoLoRA` of a custom training loop. Defaults to that of
            `model.compile`. It is rebuilt in place: read
            `model.trainable_variables` again.

    Returns:
        The model itself.

    Raises:
        TypeError: If `model` is not a `keras.Model`, or `multiple` not an
            integer.
        ValueError: If no layer is adapted, or an option is out of range.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_geolora

    model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(16)])
    model.enable_geolora(rank=4, max_rank=16)
    model.compile(keras_geolora.GeoLoRA("adam"), loss="mse")
    assert model.layers[0].adapter.U.shape == (32, 16)
    model.compact_geolora(multiple=4)
    assert model.layers[0].adapter.U.shape == (32, 4)
    model.fit(np.ones((8, 32)), np.ones((8, 16)), verbose=0)
    ```
    """
    check_adapted_and_enabled(model, "compacted")
    check_columns("multiple", multiple)
    if multiple < 1:
        raise ValueError(
            "`multiple` must be at least 1, which keeps only the columns in "
            f"use. Received: multiple={multiple}"
        )
    if not 0 <= min_saving < 1:
        raise ValueError(
            "`min_saving` is a share of the buffers, so it must lie in "
            f"[0, 1). Received: min_saving={min_saving!r}"
        )
    settle(model, optimizer)
    adapters = [
        adapter
        for layer in layers_with_adapters(model).values()
        for adapter in layer.adapters_by_name().values()
    ]
    widths = {
        id(a): compact_width(a, operator.index(multiple)) for a in adapters
    }
    before = sum(buffer_size(a, a.max_rank) for a in adapters)
    after = sum(buffer_size(a, widths[id(a)]) for a in adapters)
    if before - after >= min_saving * before:
        resize_buffers(model, widths, optimizer)
    return model


def compact_width(adapter, multiple):
    """Returns the rank, rounded up to a multiple that the buffers hold."""
    columns = max(adapter.trimmed()[1].shape[-1], 1)
    return min(-(-columns // multiple) * multiple, adapter.max_rank)


def buffer_size(adapter, width):
    """Returns the number of entries of the factors for a buffer width."""
    size = width * (adapter.input_dim + adapter.output_dim + width)
    return (adapter.count or 1) * size
