"""Which variables of an adapted model train."""

from keras_geolora.layers.factor import factor_of
from keras_geolora.layers.tree import (
    carries_adapters,
    inside,
    is_leaf,
    with_inside,
)


class Freeze:
    """Freezes a model, except for parts that continue to train.

    Frozen variables do not train. Frozen layers also stop updating statistics,
    such as those of batch normalization. Layers that were frozen before become
    trainable, because adapters inside them could not train otherwise.
    """

    def __init__(self, model):
        layers = [model, *inside(model)]
        self.layer_flags = [(layer, layer.trainable) for layer in layers]
        self.variable_flags = [(v, v.trainable) for v in model.variables]
        self.layers = [layer for layer in layers if is_leaf(layer)]
        try:
            self.thaw_all()
            self.variables = [v for v in model.variables if v.trainable]
            self.freeze_all_but([], [])
        except BaseException:  # including interrupts
            self.thaw()
            raise

    def thaw_all(self):
        """Makes everything trainable."""
        for layer, _ in self.layer_flags:
            # One by one: TensorFlow's tracking skips setting an attribute to
            # its current value, and with it the layers inside.
            layer.trainable = True

    def freeze_all_but(self, layers, variables):
        """Freezes all but some layers, with all inside, and variables."""
        for part, trainable in (
            *self._layer_flags(layers),
            *self._variable_flags(variables),
        ):
            if part.trainable != trainable:
                part.trainable = trainable

    def _layer_flags(self, layers):
        """Yields the layers and whether they should train."""
        layers = with_inside(layers)
        for layer in self.layers:
            yield layer, id(layer) in layers or carries_adapters(layer)

    def _variable_flags(self, variables):
        """Yields the variables and whether they should train."""
        variables = {id(v) for v in variables}
        for variable in self.variables:
            yield variable, id(variable) in variables

    def manual_changes(self, layers, variables, but=()):
        """Returns the flags that differ from what `freeze_all_but` set.

        Args:
            layers: List, as given to `freeze_all_but`.
            variables: List, as given to `freeze_all_but`.
            but: Layers to skip, with all sublayers.

        Returns:
            Dict of two lists of pairs, for JSON: indices of layers, and of
            variables, with their `trainable`.
        """
        left_out = with_inside(but) | {id(v) for x in but for v in x.variables}
        flags = {
            "layers": self._layer_flags(layers),
            "variables": self._variable_flags(variables),
        }
        return {
            kind: [
                [place, part.trainable]
                for place, (part, trainable) in enumerate(pairs)
                if part.trainable != trainable and id(part) not in left_out
            ]
            for kind, pairs in flags.items()
        }

    def repeat_changes(self, changes):
        """Sets the flags that `manual_changes` returned for an equal model."""
        for place, trainable in changes["layers"]:
            self.layers[place].trainable = trainable
        for place, trainable in changes["variables"]:
            self.variables[place].trainable = trainable

    def new_layers(self, model):
        """Returns the layers inside a model that are not known here."""
        known = {id(layer) for layer, _ in self.layer_flags}
        return [layer for layer in inside(model) if id(layer) not in known]

    def update(self, model):
        """Updates the layers of a model after some were added or removed.

        Known layers keep their original flags, new ones get their current ones.
        """
        flags = {id(part): flag for part, flag in self.layer_flags}
        flags.update((id(v), flag) for v, flag in self.variable_flags)
        known = {id(v) for v in self.variables}
        known |= {
            id(v)
            for layer in self.new_layers(model)
            for v in layer.variables
            if v.trainable
        }

        def with_flags(parts):
            return [(x, flags.get(id(x), x.trainable)) for x in parts]

        layers = [model, *inside(model)]
        variables = [v for v in model.variables if factor_of(v) is None]
        self.layer_flags = with_flags(layers)
        self.variable_flags = with_flags(variables)
        self.layers = [layer for layer in layers if is_leaf(layer)]
        self.variables = [v for v in variables if id(v) in known]

    def thaw(self):
        """Restores the `trainable` flags from before freezing."""
        for layer, trainable in self.layer_flags:
            layer.trainable = trainable
        for variable, trainable in self.variable_flags:
            variable.trainable = trainable
