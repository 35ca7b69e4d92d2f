"""Which layers of a model are meant: words and patterns."""

import functools
import operator
import re

import keras

from keras_geolora import layers as adapted
from keras_geolora.layers.einsum_dense import matrix_view

LINEAR = (adapted.GeoLoRADense, adapted.GeoLoRAEinsumDense)
# The Keras layers that can carry an adapter, and what they become.
ADAPTED_CLASSES = {
    cls.plain_class: cls
    for cls in (
        *LINEAR,
        adapted.GeoLoRAEmbedding,
        adapted.GeoLoRAReversibleEmbedding,
        adapted.GeoLoRAConv1D,
        adapted.GeoLoRAConv2D,
        adapted.GeoLoRAConv3D,
    )
}
WORDS = ("all-linear", "attention", "all")
# How Keras names the weights that merging changes.
KERNELS = ("kernel", "embeddings", "reverse_embeddings")


def walk(layer, path="", name_of=operator.attrgetter("name")):
    """Yields `(path, layer)` for every layer inside a layer, each once.

    Paths join the layers' names with `/`, from the outside in; a shared
    layer has the path at which it comes first, and of layers with equal names
    the later ones get a number. What is inside an adapter belongs to no one
    else and is left out.
    """
    seen, taken = set(), set()

    def visit(layer, path):
        for child in layer._flatten_layers(include_self=False, recursive=False):
            if id(child) in seen or isinstance(child, adapted.LowRankAdapter):
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


def is_leaf(layer):
    """Says whether a layer has no layers inside."""
    return next(walk(layer), None) is None


def with_inside(layers):
    """Returns the ids of layers and of all layers inside them."""
    return {id(x) for layer in layers for x in (layer, *inside(layer))}


def inside(layer):
    """Returns the layers inside a layer."""
    return [child for _, child in walk(layer)]


def stable_paths(layer):
    """Returns the dict from path to layer of all layers inside a layer.

    The paths of `walk`, but the same for every instance of a model: names
    that Keras chose, such as `dense_7`, are counted anew inside each layer.
    """
    return dict(walk(layer, name_of=stable_name))


def stable_name(layer):
    """Returns the name of a layer, without the number that Keras gave it."""
    without_number = re.sub(r"_\d+$", "", layer.name)
    cls = getattr(layer, "plain_class", type(layer))
    automatic = without_number.replace("_", "") == cls.__name__.lower()
    return without_number if automatic else layer.name


def adapted_layers(model):
    """Returns the dict from path to layer of all layers that are adapted."""
    return {
        path: layer
        for path, layer in walk(model)
        if getattr(layer, "is_adapted", False)
    }


def carriers(model):
    """Returns the dict from path to layer of all layers with any adapter.

    Also those whose adapters are not active.
    """
    return {path: layer for path, layer in walk(model) if is_carrier(layer)}


def is_carrier(layer):
    """Says whether a layer has any adapter, active or not."""
    return bool(getattr(layer, "adapter_names", []))


def adapted_class(layer):
    """Returns the class that a layer gets by an adapter, or `None`.

    A class that only renames a Keras layer, as some of KerasHub do, gets a
    class of its own, so that the layer stays an instance of it.
    """
    if isinstance(layer, adapted.AdaptedLayer):
        return type(layer)
    return adapted_subclass(type(layer))


@functools.cache
def adapted_subclass(cls):
    """Returns the adapted class for a Keras layer class, or `None`."""
    if cls in ADAPTED_CLASSES:
        return ADAPTED_CLASSES[cls]
    plain = next((c for c in cls.__mro__ if c in ADAPTED_CLASSES), None)
    if plain is None or any(
        getattr(cls, name) is not getattr(plain, name)
        for name in ("call", "build", "quantized_call")
    ):
        return None
    return type(
        f"GeoLoRA{cls.__name__}",
        (ADAPTED_CLASSES[plain], cls),
        {"plain_class": cls, "__module__": __name__},
    )


def refusal(layer):
    """Says why a layer cannot carry an adapter; `None` if it can."""
    name = type(layer).__name__
    if adapted_class(layer) is None:
        if "Depthwise" in name:
            return (
                f"{name} has a small filter for every channel and mixes no "
                "channels, so there is no matrix whose rank could be low"
            )
        return f"there is no adapter for {name}"
    if not layer.built:
        return "it is not built: call the model on a batch of data first"
    if isinstance(layer, keras.layers.EinsumDense):
        try:
            matrix_view(layer)
        except ValueError as error:
            return str(error)
    return None


def held_kernels(layers):
    """Returns the dict from the id of a layer to a layer that has its kernel.

    Such a layer holds the variable itself, as `SpectralNormalization` does to
    change it: it would see nothing of an update.
    """
    holders = {}
    for layer in layers:
        for variable in own_variables(layer):
            holders.setdefault(id(variable), []).append(layer)
    return {
        id(layer): next(other for other in holders[id(v)] if other is not layer)
        for layer in layers
        for v in own_variables(layer)
        if v.name in KERNELS and len(holders[id(v)]) > 1
    }


def own_variables(layer):
    """Returns the variables in the attributes of a layer itself."""
    own = [*layer._trainable_variables, *layer._non_trainable_variables]
    return list({id(v): v for v in own}.values())


def kernel_shape(layer):
    """Returns the shape of a layer's kernel as a matrix, or `None`."""
    if layer is None or refusal(layer) is not None:
        return None
    return tuple(adapted_class(layer).kernel_matrix_shape.fget(layer))


def matches(pattern, path, layer):
    """Says whether a layer itself is meant by one pattern."""
    if isinstance(pattern, str):
        if pattern in (layer.name, path):
            return True
        try:
            return re.fullmatch(pattern, path) is not None
        except re.error as error:
            raise ValueError(
                "A string is a layer's name, its path or a regular "
                f"expression for the path. Received: {pattern!r}, which is no "
                f"regular expression: {error}"
            ) from error
    if isinstance(pattern, type) and issubclass(pattern, keras.layers.Layer):
        return isinstance(layer, pattern)
    if callable(pattern):
        return bool(pattern(path, layer))
    raise TypeError(
        "A layer is meant by its name, its path, a regular expression for the "
        "path, a layer class, a callable `(path, layer) -> bool`, or a list "
        f"of these. Received: {pattern!r} (of type {type(pattern).__name__})"
    )


class Layers:
    """The layers inside a model, to choose from.

    Args:
        model: `keras.Model` or layer.
        whole: The model that it is a part of, whose other layers may hold
            kernels. Defaults to `model`.
    """

    def __init__(self, model, whole=None):
        self.name = model.name
        self.paths = dict(walk(model))
        whole = model if whole is None else whole
        self.holders = held_kernels([whole, *inside(whole)])
        self.candidates = {
            path: layer
            for path, layer in self.paths.items()
            if self._refusal(layer) is None
        }

    def named(self, patterns, argument):
        """Returns the dict from path to layer of what patterns mean.

        A pattern that means a layer with layers inside means all of them.

        Args:
            patterns: A pattern as in `matches`, a word of `WORDS`, or a list
                of these.
            argument: String, what the patterns are called in an error.

        Raises:
            ValueError: If a pattern means nothing.
        """
        if not isinstance(patterns, (list, tuple)):
            patterns = [patterns]
        chosen = {}
        for pattern in patterns:
            if isinstance(pattern, str) and pattern in WORDS:
                found = self._of_word(pattern)
            else:
                found = self._of_pattern(pattern, argument)
            if not found:
                raise ValueError(
                    f"`{argument}` means no layer of model '{self.name}'. "
                    f"Received: {argument}={pattern!r}.\n{self._known()}"
                )
            chosen.update(found)
        return {p: layer for p, layer in self.paths.items() if p in chosen}

    def to_adapt(self, targets, exclude=None):
        """Returns the dict from path to layer of what is to be adapted.

        Raises:
            ValueError: If nothing matches, or a pattern means only layers
                that cannot carry an adapter.
        """
        if not isinstance(targets, (list, tuple)):
            targets = [targets]
        chosen = {}
        for target in targets:
            meant = self.named(target, "targets")
            able = {p: x for p, x in meant.items() if p in self.candidates}
            if not able:
                raise ValueError(self._refusals(target, meant))
            chosen.update(able)
        excluded = {} if exclude is None else self.named(exclude, "exclude")
        chosen = {
            path: layer
            for path, layer in self.candidates.items()
            if path in chosen and path not in excluded
        }
        if not chosen:
            raise ValueError(
                f"Nothing of model '{self.name}' is left to adapt. Received: "
                f"targets={targets!r}, exclude={exclude!r}"
            )
        return chosen

    def _of_word(self, word):
        if word == "all":
            return self.candidates
        linear = {
            path: layer
            for path, layer in self.candidates.items()
            if issubclass(adapted_class(layer), LINEAR)
        }
        if word == "all-linear":
            return linear
        attention = with_inside(
            layer
            for layer in self.paths.values()
            if "attention" in type(layer).__name__.lower()
        )
        return {p: x for p, x in linear.items() if id(x) in attention}

    def _of_pattern(self, pattern, argument):
        asked = self.paths
        if not isinstance(pattern, (str, type)):
            # A function expects layers of the kind that it is about.
            adapters = argument != "modules_to_save"
            asked = self.candidates if adapters else self.paths
        meant = with_inside(
            layer
            for path, layer in asked.items()
            if matches(pattern, path, layer)
        )
        return {
            p: layer for p, layer in self.paths.items() if id(layer) in meant
        }

    def _known(self):
        some = [
            f"'{path}' ({type(layer).__name__})"
            for path, layer in list(self.candidates.items())[:8]
        ]
        more = ", ..." if len(self.candidates) > 8 else ""
        return (
            f"Layers that can carry an adapter: {', '.join(some)}{more} "
            f"({len(self.candidates)} in all). Words that mean many: "
            f"{', '.join(map(repr, WORDS))}."
        )

    def _refusal(self, layer):
        if id(layer) not in self.holders:
            return refusal(layer)
        holder = self.holders[id(layer)]
        return (
            f"{type(holder).__name__} '{holder.name}' holds its kernel as "
            "well, and would go on without the update. (A layer that reads "
            "`other.kernel` in its `call`, and does not keep it, is fine.)"
        )

    def _refusals(self, target, meant):
        reasons = [
            f"'{path}': {self._refusal(layer)}"
            for path, layer in meant.items()
            if layer.weights and is_leaf(layer)
        ]
        return (
            f"No layer that `targets` means can carry an adapter. "
            f"Received: targets={target!r}.\n"
            + "\n".join(reasons[:8])
            + f"\n{self._known()}"
        )
