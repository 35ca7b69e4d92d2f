"""Finds the layers inside a layer, their paths, and those with adapters."""

import operator
import re

import keras

from keras_geolora.keras_internals import direct_layers
from keras_geolora.layers.adapter import LowRankAdapter
from keras_geolora.layers.weight import AdaptedWeight, weights_in

# Layers that this package adds to a model.
OURS = (LowRankAdapter, AdaptedWeight)


def walk(layer, path="", name_of=operator.attrgetter("name")):
    """Yields `(path, layer)` for every layer inside a layer, each once.

    Paths join layer names with `/`, from the outside in. A shared layer has the
    path at which it comes first; of layers with equal names, the later ones get
    a number. Adapters and what is inside them are left out, and so are
    `AdaptedWeight`s, which are not layers of the model.
    """
    seen, taken = set(), set()

    def visit(layer, path):
        for child in direct_layers(layer):
            if id(child) in seen or isinstance(child, OURS):
                continue
            seen.add(id(child))
            first = f"{path}/{name_of(child)}" if path else name_of(child)
            child_path, count = first, 0
            while child_path in taken:
                count += 1
                child_path = f"{first}_{count}"
            taken.add(child_path)
            yield child_path, child
            yield from visit(child, child_path)

    yield from visit(layer, path)


def places(layer, name_of=operator.attrgetter("name")):
    """Yields what `walk` does, and the adapted weights after their owners."""
    for path, child in walk(layer, name_of=name_of):
        yield path, child
        for weight in weights_in(child):
            yield f"{path}/{weight.name}", weight


def is_leaf(layer):
    """Returns whether a layer has no layers inside."""
    return next(walk(layer), None) is None


def with_inside(layers):
    """Returns the ids of layers and of all layers inside them."""
    return {id(x) for layer in layers for x in (layer, *inside(layer))}


def inside(layer):
    """Returns the layers inside a layer."""
    return [child for _, child in walk(layer)]


def models_of(model):
    """Returns a model and the models inside."""
    return [x for x in (model, *inside(model)) if isinstance(x, keras.Model)]


def stable_paths(layer):
    """Returns a dict from path to layer of all layers inside a layer.

    Adapted weights are among them. The paths are those of `walk`, but the same
    for every instance of a model: automatic names, such as `dense_7`, are
    numbered anew inside each layer.
    """
    return dict(places(layer, name_of=stable_name))


def stable_name(layer):
    """Returns the name of a layer, without the number that Keras added."""
    without_number = re.sub(r"_\d+$", "", layer.name)
    cls = getattr(layer, "plain_class", type(layer))
    automatic = without_number.replace("_", "") == cls.__name__.lower()
    return without_number if automatic else layer.name


def adapted_layers(model):
    """Returns a dict from path to layer, of layers with an active adapter.

    Adapted weights count as layers, here and below.
    """
    return {
        path: layer
        for path, layer in places(model)
        if getattr(layer, "is_adapted", False)
    }


def layers_with_adapters(model):
    """Returns a dict from path to layer of all layers with any adapter.

    Including those whose adapters are not active.
    """
    return {path: layer for path, layer in places(model) if has_adapters(layer)}


def has_adapters(layer):
    """Returns whether a layer has any adapter, active or not."""
    return bool(getattr(layer, "adapter_names", []))


def carries_adapters(layer):
    """Returns whether a layer, or a weight that it owns, has any adapter."""
    return has_adapters(layer) or any(map(has_adapters, weights_in(layer)))


def owners_of_weights(model):
    """Returns the layers inside a model that own adapted weights."""
    return [layer for layer in inside(model) if weights_in(layer)]
