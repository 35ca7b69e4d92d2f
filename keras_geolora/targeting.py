"""Which layers of a model get an adapter."""

import re

import keras

from keras_geolora.layers import GeoLoRADense, GeoLoRAEinsumDense

# The Keras layers that can carry an adapter, and what they become.
ADAPTED_CLASSES = {
    cls.plain_class: cls for cls in (GeoLoRADense, GeoLoRAEinsumDense)
}


def walk(layer, path=""):
    """Yields `(path, layer)` for every layer inside a layer, each once.

    Paths join the layers' names with `/`, from the outside in; a shared
    layer has the path at which it comes first.
    """
    seen = set()

    def visit(layer, path):
        for child in layer._flatten_layers(include_self=False, recursive=False):
            if id(child) in seen:
                continue
            seen.add(id(child))
            child_path = f"{path}/{child.name}" if path else child.name
            yield child_path, child
            yield from visit(child, child_path)

    yield from visit(layer, path)


def adapted_layers(model):
    """Returns the dict from path to layer of all adapted layers."""
    return {
        path: layer
        for path, layer in walk(model)
        if getattr(layer, "is_adapted", False)
    }


def find_targets(model, targets, exclude):
    """Returns the dict from path to layer of what is to be adapted.

    Args:
        model: A `keras.Model` or layer.
        targets: `"all-linear"`, or a pattern, or a list of patterns.
        exclude: `None`, a pattern or a list of patterns.

    Raises:
        ValueError: If nothing matches.
    """
    candidates = {
        path: layer
        for path, layer in walk(model)
        if type(layer) in ADAPTED_CLASSES
        or type(layer) in ADAPTED_CLASSES.values()
    }
    chosen = {
        path: layer
        for path, layer in candidates.items()
        if targets == "all-linear" or matches(targets, path, layer)
        if exclude is None or not matches(exclude, path, layer)
    }
    if not chosen:
        some = ", ".join(f"'{path}'" for path in list(candidates)[:8])
        more = ", ..." if len(candidates) > 8 else ""
        raise ValueError(
            f"No layer of model '{model.name}' matched. "
            f"Received: targets={targets!r}, exclude={exclude!r}.\n"
            f"Layers that can carry an adapter: {some}{more} "
            f"({len(candidates)} in all)."
        )
    return chosen


def matches(pattern, path, layer):
    """Says whether a layer is meant.

    Args:
        pattern: A layer's name, its path, a regular expression for the whole
            path, a layer class, a callable `(path, layer) -> bool`, or a list
            of these.
        path: String.
        layer: `keras.layers.Layer`.
    """
    if isinstance(pattern, (list, tuple)):
        return any(matches(item, path, layer) for item in pattern)
    if isinstance(pattern, str):
        return layer.name == pattern or re.fullmatch(pattern, path) is not None
    if isinstance(pattern, type) and issubclass(pattern, keras.layers.Layer):
        return isinstance(layer, pattern)
    if callable(pattern):
        return bool(pattern(path, layer))
    raise TypeError(
        "A layer is meant by its name, its path, a regular expression for the "
        "path, a layer class, a callable `(path, layer) -> bool`, or a list "
        f"of these. Received: {pattern!r} (of type {type(pattern).__name__})"
    )
