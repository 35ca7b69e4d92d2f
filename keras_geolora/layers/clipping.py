"""Clips ranks to those that an update of a kernel can have."""

import dataclasses
import operator

from keras_geolora.layers.registry import kernel_shape


def clipped(options, layer):
    """Clips ranks to the smaller side of a kernel.

    Ranks that contradict each other are left for `LowRankAdapter` to refuse.

    Args:
        options: `AdapterOptions`.
        layer: Layer that can carry an adapter.

    Returns:
        The clipped options, and a dict of the ranks that were larger.
    """
    largest = min(kernel_shape(layer))
    ranks = {
        name: operator.index(getattr(options, name))
        for name in ("min_rank", "rank", "max_rank")
        if is_count(getattr(options, name))
    }
    if len(ranks) < 2 or list(ranks.values()) != sorted(ranks.values()):
        return options, {}
    too_large = {name: n for name, n in ranks.items() if n > largest}
    smaller = dict.fromkeys(too_large, largest)
    return dataclasses.replace(options, **smaller), too_large


def is_count(value):
    """Returns whether a value is an integer."""
    return hasattr(value, "__index__") and not isinstance(value, bool)


def asked_of(layer):
    """Returns the requested ranks, where `enable_geolora` clipped them.

    Args:
        layer: Adapted layer.

    Returns:
        Dict of those of `rank`, `max_rank` and `min_rank` that were larger;
        empty if nothing was clipped.
    """
    if layer.adaptation is None:
        return {}
    adapter = layer.adaptation.adapters[layer.adaptation.active]
    found = (path for path, x in adapter.layers.items() if x is layer)
    return adapter.clipped.get(next(found, None), {})
