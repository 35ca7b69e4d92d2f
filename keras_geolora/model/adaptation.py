"""The adapters of a model, and what trains beside them."""

import contextlib
import dataclasses
import functools

import keras
import numpy as np
from keras import ops

from keras_geolora.layers.factor import factor_of
from keras_geolora.layers.tree import (
    has_adapters,
    inside,
    stable_paths,
)
from keras_geolora.layers.weight import AdaptedWeight
from keras_geolora.model.freezing import Freeze
from keras_geolora.model.substitution import exchanged_values, value_of


class NamedAdapter:
    """An adapter of a model: those of its layers, and co-trained variables.

    Attributes:
        layers: Dict from stable path to adapted layer.
        saved_layers: List of the layers in `modules_to_save`.
        train_bias: Bool, whether the biases of the layers train.
        co_trained: List of the variables that train beside the factors, and
            statistics of such layers: biases, `modules_to_save`, the head.
        values: Dict from the ids of these variables to their values while the
            adapter is inactive, otherwise `None`.
        manual_flags: Dict from path to the `trainable` of a layer's adapter
            where the user set it, kept up to date while it is inactive.
        clipped: Dict from path to the requested ranks that exceed the smaller
            side of the kernel.
    """

    def __init__(self, layers, saved_layers, train_bias, co_trained):
        self.layers = layers
        self.saved_layers = saved_layers
        self.train_bias = train_bias
        self.co_trained = co_trained
        self.values = None
        self.manual_flags = {}
        self.clipped = {}

    def move(self, paths):
        """Updates the paths after the layers of the model changed.

        Args:
            paths: Dict from the ids of the current layers to paths.
        """
        places = self.layers.items()
        self.manual_flags, self.clipped = (
            {
                paths[id(layer)]: known[path]
                for path, layer in places
                if path in known and id(layer) in paths
            }
            for known in (self.manual_flags, self.clipped)
        )
        self.layers = {
            paths[id(layer)]: layer for _, layer in places if id(layer) in paths
        }
        self.saved_layers = [x for x in self.saved_layers if id(x) in paths]

    def weight_axes(self):
        """Returns a dict from path to the axes that the user gave."""
        weights = {
            path: layer.source
            for path, layer in self.layers.items()
            if isinstance(layer, AdaptedWeight)
        }
        return {p: x.axes for p, x in weights.items() if x.axes is not None}

    def find_manual_flags(self, name):
        """Returns the current `manual_flags` of the active adapter."""
        flags = {
            path: layer.adapters_by_name()[name].trainable
            for path, layer in self.layers.items()
        }
        return {
            path: trainable
            for path, trainable in flags.items()
            if trainable != self.layers[path].trainable
        }


class Adaptation:
    """The adapters of a model, and its state before adapting.

    Args:
        model: `keras.Model`, not yet adapted.
        scope: The model, or the part of it that is frozen and adapted.
    """

    def __init__(self, model, scope):
        self.model_name = model.name
        if not model.trainable and model is not scope:
            raise ValueError(
                "A model with `trainable=False` cannot train an adapter. Set "
                "`model.trainable = True` first; `enable_geolora` freezes the "
                f"backbone. Received: model '{model.name}' with "
                "trainable=False"
            )
        self.model = model
        self.scope = scope
        self.head = self._find_head()
        self._trains_in_head = [v for v in self.head if v.trainable]
        self.adapters = {}
        self.active = None
        self._pretrained = {}
        self.suspended = 0
        self.said_what_is_left = False
        # The exception that stops the loading of weights.
        self.refusal = ValueError
        # Whether the compiled `generate` takes `P` and `Q` to be zero.
        self.generates_at_rest = False
        self._paused = None
        # Last, so that an interrupt before it changes nothing.
        self.frozen = Freeze(scope)

    def _find_head(self):
        """Returns the variables of the model outside of the scope."""
        in_scope = {id(v) for v in self.scope.weights}
        return [v for v in self.model.weights if id(v) not in in_scope]

    def take_in_changes(self):
        """Takes in layers that were added since, and drops removed ones.

        New layers train with the active adapter and belong to it, like its
        `modules_to_save`.

        Raises:
            ValueError: If a new layer has adapters already, or the active
                adapter has no layer left.
        """
        head, came = self._find_head(), self.frozen.new_layers(self.scope)
        layers = {id(layer) for layer in inside(self.scope)}
        known = {id(x) for x, _ in self.frozen.layer_flags} - {id(self.scope)}
        if not came and layers == known and are_same(head, self.head):
            return
        self._check_changes(came)
        was_paused = self._paused is not None
        self.resume()  # its paused flags refer to positions
        self.frozen.update(self.scope)
        paths = self._path_of()
        for adapter in self.adapters.values():
            adapter.move(paths)
        inner = {id(x) for layer in came for x in inside(layer)}
        self.adapters[self.active].saved_layers += [
            x for x in came if x.trainable and id(x) not in inner
        ]
        new_in_head = [v for v in head if not contains(self.head, v)]
        self.head = head
        self._trains_in_head += [v for v in new_in_head if v.trainable]
        vars(self).pop("_trains", None)
        self._find_co_trained_again()
        if was_paused:
            self.pause()

    def _find_co_trained_again(self):
        """Finds the co-trained variables again, after layers changed."""
        # Kept alive while new ones come: variables are known by their id.
        before = self._all_co_trained()
        for adapter in self.adapters.values():
            adapter.co_trained = self._co_trained_by(
                adapter.layers.values(),
                adapter.saved_layers,
                adapter.train_bias,
            )
            if adapter.values is not None:
                adapter.values = {
                    id(v): adapter.values[id(v)]
                    if id(v) in adapter.values
                    else value_of(v)
                    for v in adapter.co_trained
                }
        self._pretrained = {
            id(v): self.pretrained(v) if contains(before, v) else value_of(v)
            for v in self._all_co_trained()
        }

    def _check_changes(self, came):
        """Refuses changed layers that cannot be taken in."""
        if any(map(has_adapters, came)):
            names = [layer.name for layer in came if has_adapters(layer)]
            raise ValueError(
                "Layers that are added to an adapted model must not have "
                "adapters of their own. Adapt the model after changing its "
                "layers: `model.merge_geolora()` or `model.remove_geolora()`, "
                "then `model.enable_geolora()`. Received: model "
                f"'{self.model_name}' with new layers {names}"
            )
        left = {id(layer) for layer in stable_paths(self.scope).values()}
        layers = self.adapters[self.active].layers.values()
        if not any(id(layer) in left for layer in layers):
            raise ValueError(
                "All adapted layers have been removed from the model, so its "
                "adapter would have no effect. Adapt the model again: "
                "`model.remove_geolora()`, then `model.enable_geolora()`. "
                f"Received: model '{self.model_name}' without any layer of "
                f"adapter '{self.active}'"
            )

    def add(self, name, layers, saved_layers, train_bias):
        """Records an adapter that its layers have, and activates it."""
        if self.active is not None:
            self._deactivate()
        co_trained = self._co_trained_by(layers, saved_layers, train_bias)
        for variable in co_trained:
            self._pretrained.setdefault(id(variable), value_of(variable))
        for layer in layers:
            layer.adapter_state.adaptation = self
        path_of = self._path_of()
        self.adapters[name] = NamedAdapter(
            {path_of[id(layer)]: layer for layer in layers},
            saved_layers,
            train_bias,
            co_trained,
        )
        self._activate(name)

    def give_up(self, name, active):
        """Drops an adapter that was not completed and activates another."""
        self.adapters.pop(name, None)
        self._activate(active)

    def _co_trained_by(self, layers, saved_layers, train_bias):
        """Returns the variables that train beside the factors of an adapter."""
        co_trained = list(self.head)
        for layer in saved_layers:
            # The layer's own weights, without those of adapters.
            co_trained.extend(v for v in layer.weights if factor_of(v) is None)
        if train_bias:
            for layer in layers:
                if getattr(layer, "bias", None) is not None:
                    co_trained.append(layer.bias)
        return list({id(v): v for v in co_trained}.values())

    def activate(self, name):
        """Activates one adapter."""
        if name != self.active:
            with self.keeping_manual_changes():
                self._deactivate()
                self._activate(name)

    def delete(self, name):
        """Deletes an adapter that is not active."""
        with self.keeping_manual_changes():
            for layer in self.adapters.pop(name).layers.values():
                layer.delete_adapter(name)
            self.freeze()

    def reset_co_trained(self):
        """Resets the co-trained variables to their values before training."""
        for variable in self.adapters[self.active].co_trained:
            variable.assign(self.pretrained(variable))

    def pretrained(self, variable):
        """Returns the value a co-trained variable had before training."""
        return self._pretrained[id(variable)]

    def plan(self):
        """Returns what `adapt_by_plan` needs to adapt the model again."""
        path_of = self._path_of()
        return {
            "active": self.active,
            "frozen": [
                path_of.get(id(layer), "")
                for layer, trainable in self.frozen.layer_flags
                if not trainable
            ],
            "by_hand": self.manual_changes(),
            "adapters": [
                {
                    "name": name,
                    "layers": {
                        path: dataclasses.asdict(layer.options_of(name))
                        for path, layer in adapter.layers.items()
                    },
                    "modules_to_save": [
                        path_of[id(x)] for x in adapter.saved_layers
                    ],
                    "train_bias": adapter.train_bias,
                    "clipped": adapter.clipped,
                    "weight_axes": adapter.weight_axes(),
                }
                for name, adapter in self.adapters.items()
            ],
        }

    def manual_changes(self, but=()):
        """Returns the `trainable` flags that the user changed since adapting.

        Args:
            but: Layers to skip, with all sublayers.
        """
        if self._paused is not None:
            return self._paused
        active = self.adapters[self.active]
        return {
            **self.frozen.manual_changes(
                active.saved_layers, active.co_trained, but
            ),
            "adapters": {
                name: adapter.find_manual_flags(name)
                if name == self.active
                else adapter.manual_flags
                for name, adapter in self.adapters.items()
            },
        }

    def repeat_changes(self, changes):
        """Sets the flags that `manual_changes` returned, after `freeze`."""
        self._paused = None
        self.frozen.repeat_changes(changes)
        # Files of early versions have no such entry.
        for name, flags in changes.get("adapters", {}).items():
            if name in self.adapters:
                self.adapters[name].manual_flags = flags
        active = self.adapters[self.active]
        for path, trainable in active.manual_flags.items():
            adapter = active.layers[path].adapters_by_name()[self.active]
            adapter.trainable = trainable
        if changes.get("at_rest", False):
            self.pause()

    def pause(self, part=None):
        """Stops all training until `resume`.

        Args:
            part: The model or its backbone, whose `trainable` becomes `False`.
                Defaults to the backbone.
        """
        changes = {**self.manual_changes(), "at_rest": True}
        self._set_trainable(part, False)
        self._paused = changes

    def resume(self, part=None):
        """Undoes `pause`, if it was called.

        Args:
            part: As in `pause`.
        """
        if self._paused is not None or part is not None:
            changes = {**self.manual_changes(), "at_rest": False}
            self._set_trainable(part, True)
            self.freeze()
            self.repeat_changes(changes)

    def _set_trainable(self, part, value):
        part = self.scope if part is None else part
        keras.layers.Layer.trainable.fset(part, value)

    @contextlib.contextmanager
    def keeping_manual_changes(self, but=()):
        """Restores manual changes after a block."""
        changes = self.manual_changes(but)
        yield
        self.repeat_changes(changes)

    def thawed_variables(self):
        """Returns the variables that the user made trainable since."""
        return [
            self.frozen.variables[place]
            for place, trainable in self.manual_changes()["variables"]
            if trainable
        ]

    def _path_of(self):
        return {id(x): path for path, x in stable_paths(self.scope).items()}

    def signature(self):
        """Returns what two models must share to share weights, as JSON.

        The adapters in order, their layers, and what trains beside them.
        """
        return [
            [
                adapter["name"],
                sorted(adapter["layers"]),
                adapter["modules_to_save"],
                adapter["train_bias"],
            ]
            for adapter in self.plan()["adapters"]
        ]

    def buffers(self):
        """Returns the widths of all buffers, by adapter and path."""
        return {
            name: {
                path: layer.adapters_by_name()[name].max_rank
                for path, layer in adapter.layers.items()
            }
            for name, adapter in self.adapters.items()
        }

    def with_buffers(self, buffers):
        """Returns widths, given as by `buffers`, by the ids of adapters."""
        return {
            id(layer.adapters_by_name()[name]): buffers[name][path]
            for name, adapter in self.adapters.items()
            for path, layer in adapter.layers.items()
        }

    def stored_values(self):
        """Returns the values that Keras does not save with the weights, by key.

        These are the values of co-trained variables before training, and those
        for inactive adapters.
        """
        arrays = {
            f"pretrained_{i}": self.pretrained(variable)
            for i, variable in enumerate(self._all_co_trained())
        }
        for a, name in enumerate(self.adapters):
            if name != self.active:
                values = self.values(name).values()
                arrays.update((f"{a}_{i}", x) for i, x in enumerate(values))
        return arrays

    def restore_values(self, arrays):
        """Restores the arrays that `stored_values` returned."""
        for i, variable in enumerate(self._all_co_trained()):
            self._pretrained[id(variable)] = np.array(arrays[f"pretrained_{i}"])
        for a, (name, adapter) in enumerate(self.adapters.items()):
            if name != self.active:
                adapter.values = {
                    id(v): np.array(arrays[f"{a}_{i}"])
                    for i, v in enumerate(adapter.co_trained)
                }

    def _all_co_trained(self):
        adapters = self.adapters.values()
        co_trained = {id(v): v for a in adapters for v in a.co_trained}
        return list(co_trained.values())

    def is_companion(self, variable):
        """Returns whether a variable belongs to any adapter."""
        return id(variable) in self._pretrained

    def is_statistic(self, variable):
        """Returns whether a variable is a statistic, without a gradient."""
        return id(variable) not in self._trains

    @functools.cached_property
    def _trains(self):
        """Ids of the variables that trained before adapting."""
        return {id(v) for v in self.frozen.variables + self._trains_in_head}

    def values(self, name):
        """Returns the values of what an adapter co-trains, by id."""
        adapter = self.adapters[name]
        if adapter.values is not None:
            values = adapter.values.items()
            return {key: ops.convert_to_numpy(x) for key, x in values}
        return {id(v): value_of(v) for v in adapter.co_trained}

    def co_trained_values(self):
        """Returns pairs of co-trained variables and their values."""
        values = self.values(self.active)
        return [
            (v, values.get(id(v), self.pretrained(v)))
            for v in self._all_co_trained()
        ]

    def freeze(self):
        """Freezes what does not train with the active adapter."""
        adapter = self.adapters[self.active]
        self.frozen.freeze_all_but(adapter.saved_layers, adapter.co_trained)
        self.activate_layers()

    @contextlib.contextmanager
    def suspension(self):
        """Disables the adapters and what trained with them for a block."""
        self.suspended += 1
        try:
            with contextlib.ExitStack() as stack:
                if self.suspended == 1:
                    stack.enter_context(self._pretrained_co_trained())
                yield
        finally:
            self.suspended -= 1

    @contextlib.contextmanager
    def _pretrained_co_trained(self):
        """Gives co-trained variables their pretrained values for a block."""
        adapter = self.adapters[self.active]
        values = [(v, self.pretrained(v)) for v in adapter.co_trained]
        with exchanged_values(values) as trained:
            adapter.values = trained
            try:
                yield
            finally:
                adapter.values = None

    def _deactivate(self):
        adapter = self.adapters[self.active]
        adapter.values = self.values(self.active)
        self.reset_co_trained()

    def activate_layers(self):
        """Makes the layers use the active adapter."""
        for adapter in self.adapters.values():
            for layer in adapter.layers.values():
                layer.activate_adapter(self.active)

    def _activate(self, name):
        self.active = name
        self._restore_co_trained()
        self.freeze()

    def _restore_co_trained(self):
        adapter = self.adapters[self.active]
        if adapter.values is not None:
            for variable in adapter.co_trained:
                variable.assign(adapter.values[id(variable)])
        adapter.values = None


def contains(variables, variable):
    """Returns whether a list contains this very variable."""
    return any(v is variable for v in variables)


def are_same(variables, others):
    """Returns whether two lists hold the same variables."""
    return list(map(id, variables)) == list(map(id, others))
