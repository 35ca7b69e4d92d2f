"""Chooses layers of a model by words and patterns."""

import re

import keras

from keras_geolora.layers.raw_weights import (
    add_raw_weights,
    held_by_models,
    is_batched,
)
from keras_geolora.layers.registry import (
    LINEAR,
    adapted_class,
    held_kernels,
    refusal,
)
from keras_geolora.layers.tree import inside, is_leaf, walk, with_inside
from keras_geolora.layers.weight import AdaptedWeight

WORDS = ("all-linear", "attention", "experts", "all")

# The argument that means layers only: a weight is trained in full with its
# layer.
TO_SAVE = "modules_to_save"


def is_weight(layer):
    """Returns whether this is a weight without a layer of its own."""
    return isinstance(layer, AdaptedWeight)


def is_meant(layer, owners, inside):
    """Returns whether a pattern means a weight, because it means its owner.

    Args:
        layer: Layer or `AdaptedWeight`.
        owners: Ids of the layers that a pattern matches.
        inside: Ids of these and of all layers inside. Of these the experts are
            meant, too.
    """
    if not is_weight(layer):
        return False
    owner = id(layer.source.owner)
    return owner in owners or (is_batched(layer) and owner in inside)


def matches(pattern, path, layer):
    """Returns whether one pattern matches a layer, or a weight, itself."""
    if isinstance(pattern, str):
        return pattern == layer.name or matches_path(pattern, path)
    if isinstance(pattern, type) and issubclass(pattern, keras.layers.Layer):
        return isinstance(layer, pattern)
    if callable(pattern):
        return bool(
            pattern(path, layer.variable if is_weight(layer) else layer)
        )
    raise TypeError(
        "A layer pattern must be a layer's name, its path, a regular "
        "expression for the path, a layer class, a callable `(path, layer) -> "
        "bool`, where a weight without a layer of its own comes as a "
        f"variable, or a list of these. Received: {pattern!r} (of type "
        f"{type(pattern).__name__})"
    )


def matches_path(pattern, path):
    """Returns whether a string is a path or a regular expression for it."""
    if pattern == path:
        return True
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise ValueError(
            "A string must be a layer's name, its path or a regular "
            f"expression for the path. Received: {pattern!r}, which is "
            f"not a valid regular expression: {error}"
        ) from error


class WeightAxes:
    """The axes that a user gave for weights, by pattern.

    Args:
        axes: Dict from a regular expression for the whole path of a weight, or
            the path itself, to a string as in `view_by_axes`; or `None`.
    """

    def __init__(self, axes):
        if axes is not None and not (
            isinstance(axes, dict)
            and all(isinstance(x, str) for pair in axes.items() for x in pair)
        ):
            raise TypeError(
                "`weight_axes` must be a dict from a pattern for the paths of "
                "weights to a string with a letter for each axis, for example "
                f"`{{'.*/kernels': 'brc'}}`. Received: weight_axes={axes!r}"
            )
        self.axes = axes or {}
        self.unused = set(self.axes)

    def __call__(self, path):
        """Returns the axes of the weight at a path, or `None`."""
        for pattern, axes in self.axes.items():
            if matches_path(pattern, path):
                self.unused.discard(pattern)
                return axes
        return None

    def check_used(self, name):
        """Refuses a pattern that matched nothing."""
        if self.unused:
            raise ValueError(
                "Every pattern in `weight_axes` must match the path of a "
                "weight that has no adapter yet and belongs to no layer that "
                f"can be adapted. Received: {sorted(self.unused)}, which match "
                f"none in model '{name}'"
            )


class Layers:
    """The layers inside a model, and weights that belong to none of their own.

    Args:
        model: `keras.Model` or layer.
        whole: The model that contains it, whose other layers may share kernels.
            Defaults to `model`.
        weight_axes: Dict from pattern to the axes of weights, or `None`.
    """

    def __init__(self, model, whole=None, weight_axes=None):
        self.name = model.name
        self.held_by_models = held_by_models(model)
        given = WeightAxes(weight_axes)
        self.paths = add_raw_weights(dict(walk(model)), model, given)
        given.check_used(model.name)
        whole = model if whole is None else whole
        self.holders = held_kernels([whole, *inside(whole)])
        self.candidates = {
            path: layer
            for path, layer in self.paths.items()
            if self._refusal(layer) is None
        }

    def named(self, patterns, argument):
        """Returns a dict from path to layer of what patterns match.

        A pattern that matches a layer with layers inside includes all of them.

        Args:
            patterns: A pattern as in `matches`, a word of `WORDS`, or a list
                of these.
            argument: String, the name of the patterns in errors.

        Raises:
            ValueError: If a pattern matches nothing.
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
                    f"`{argument}` matches no layer of model '{self.name}'. "
                    f"Received: {argument}={pattern!r}.\n{self._known()}"
                )
            chosen.update(found)
        return {p: layer for p, layer in self.paths.items() if p in chosen}

    def to_adapt(self, targets, exclude=None):
        """Returns a dict from path to layer of the layers to adapt.

        Raises:
            ValueError: If nothing matches, or a pattern matches only layers
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
                f"No layer of model '{self.name}' is left to adapt. Received: "
                f"targets={targets!r}, exclude={exclude!r}"
            )
        return chosen

    def _of_word(self, word):
        if word == "all":
            return self.candidates
        experts = {p: x for p, x in self.candidates.items() if is_batched(x)}
        if word == "experts":
            return experts
        linear = {
            path: layer
            for path, layer in self.candidates.items()
            if issubclass(adapted_class(layer), LINEAR)
        }
        if word == "all-linear":
            return linear | experts
        attention = with_inside(
            layer
            for layer in self.paths.values()
            if "attention" in type(layer).__name__.lower()
        )
        return {p: x for p, x in linear.items() if id(x) in attention}

    def _of_pattern(self, pattern, argument):
        asked = self.paths
        if not isinstance(pattern, (str, type)) and argument != TO_SAVE:
            # A callable expects the kind of layers that the argument is about.
            asked = self.candidates
        if argument == TO_SAVE:
            asked = {p: x for p, x in asked.items() if not is_weight(x)}
        matched = [x for p, x in asked.items() if matches(pattern, p, x)]
        meant = with_inside(matched)
        owners = {id(layer) for layer in matched}
        return {
            path: layer
            for path, layer in self.paths.items()
            if id(layer) in meant
            or (argument != TO_SAVE and is_meant(layer, owners, meant))
        }

    def _known(self):
        some = [
            f"'{path}' ({type(layer).__name__})"
            for path, layer in list(self.candidates.items())[:8]
        ]
        more = ", ..." if len(self.candidates) > 8 else ""
        held = ""
        if self.held_by_models:
            held = (
                " Weights that a model holds directly cannot be adapted; make "
                f"them in a layer: {', '.join(self.held_by_models[:8])}."
            )
        return (
            f"Layers that can be adapted: {', '.join(some)}{more} "
            f"({len(self.candidates)} in all). Words that select many layers: "
            f"{', '.join(map(repr, WORDS))}.{held}"
        )

    def _refusal(self, layer):
        if id(layer) not in self.holders:
            return refusal(layer)
        holder = self.holders[id(layer)]
        return (
            f"{type(holder).__name__} '{holder.name}' holds its kernel too, "
            "and would keep using it without the update. (A layer that only "
            "reads `other.kernel` in its `call`, without keeping it, is fine.)"
        )

    def _refusals(self, target, meant):
        reasons = [
            f"'{path}': {self._refusal(layer)}"
            for path, layer in meant.items()
            if layer.weights and is_leaf(layer)
        ]
        return (
            "None of the layers that `targets` matches can be adapted. "
            f"Received: targets={target!r}.\n"
            + "\n".join(reasons[:8])
            + f"\n{self._known()}"
        )
