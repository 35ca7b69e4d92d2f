"""Everything this library needs of Keras that has no public name.

Private names are used in this file only, so that a Keras release that moves one
breaks a single place. `PRIVATE` says what each name is needed for; a test
reports those that are missing.
"""

import contextlib
import functools

import keras

# The private names, by owner, and what each is needed for.
PRIVATE = {
    "layer": {
        "_flatten_layers": "the layers inside a layer, in Keras' order",
        "_clear_losses": "drops the losses of a call",
        "_get_own_losses": "the losses of a call that a layer has added",
        "_trainable_variables": "the variables a layer holds itself",
        "_non_trainable_variables": "the variables a layer holds itself",
        "_trainable": "the flag behind `trainable`, which ours extends",
        "_tracker": "a built layer is locked; adapters join it later",
        "_remat_mode": "whether a call is computed again in the backward pass",
        "_get_call_context": "whether the call of another layer is running",
        "_maybe_reset_call_context": "the same, without a trace",
    },
    "layer on torch": {
        "_torch_params": "the parameters as torch sees them",
        "_track_variables": "shows torch the parameters anew",
    },
    "layer on tensorflow": {
        "_tracked": "the lists and dicts that an export looks through",
    },
    "tensor": {"_keras_history": "the layer that an output comes from"},
    "variable": {
        "_value": "on torch, to exchange a value without writing into it",
        "_layout": "the layout of a variable that is created in a trace",
        "_maybe_autocast": "the last step of reading a variable",
    },
    "model": {
        "_unpickle_model": "pickles, through a function that keeps its place",
        "_run_eagerly": "what a model is before its first `compile`",
        "_jit_compile": "what a model is before its first `compile`",
        "_compile_loss": "what a model is before its first `compile`",
        "_compile_metrics": "what a model is before its first `compile`",
        "_loss_tracker": "what a model is before its first `compile`",
    },
    "compiled model": {
        "_compile_config": "a new object for every `compile`",
        "_compiled_trainable_state": "it holds on to layers by reference",
    },
    "optimizer": {
        "_trainable_variables": "the variables it was built on",
        "_variables": "its state, without that of an optimizer inside",
        "_iterations": "the counter that a step of replicas advances",
        "_learning_rate": "the rate as given: a number or a schedule",
        "_use_weight_decay": "whether a variable decays",
        "_get_variable_index": "the place of a variable in lists of slots",
        "_check_variables_are_known": "Keras' own checks, in `apply`",
        "_filter_empty_gradients": "Keras' own checks, in `apply`",
        "_clip_gradients": "a step in parts, where replicas accumulate",
        "_apply_weight_decay": "a step in parts, where replicas accumulate",
        "_backend_update_step": "a step in parts, where replicas accumulate",
        "_backend_reset_gradient_accumulators": (
            "a step in parts, where replicas accumulate"
        ),
    },
    "accumulating optimizer": {
        "_accumulated_gradients": "sums of gradients follow moving bases, too",
    },
}
# Attributes of a compiled model, and their values before `compile`.
BEFORE_COMPILE = {
    "compiled": False,
    "loss": None,
    "steps_per_execution": 1,
    "_run_eagerly": False,
    "_jit_compile": None,
    "_compile_loss": None,
    "_compile_metrics": None,
    "_loss_tracker": None,
}
# Attributes that a model has only once it is compiled.
SINCE_COMPILE = ("optimizer", "_compile_config", "_compiled_trainable_state")

# Queries the call context. A given name leaves Keras' numbering unchanged.
PROBE = keras.layers.Layer(name="probe")


# Layers


def in_layer_call():
    """Returns whether the `__call__` of any layer is running in this thread.

    Keras keeps a context for the outermost call, to pass on `training`. A layer
    that asks for it gets that of the running call, or starts its own if there
    is none.
    """
    context = PROBE._get_call_context()
    PROBE._maybe_reset_call_context()
    return context.entry_layer is not PROBE


def training_now():
    """Returns what the running calls say about `training`.

    `True` where none is known: torch may be computing a call again, for its
    backward pass.
    """
    context = PROBE._get_call_context()
    PROBE._maybe_reset_call_context()
    if context.entry_layer is PROBE:
        return True
    return context.get_value("training")


def direct_layers(layer):
    """Returns the layers that a layer holds directly."""
    return layer._flatten_layers(include_self=False, recursive=False)


def all_layers(layer):
    """Returns a layer and all layers inside, in Keras' order."""
    return list(layer._flatten_layers())


class LooksThroughFew:
    """Mixin of a model that looks through a few of its layers in every call.

    Keras looks through all of them: whether they are built, and whether they
    have losses to drop.
    """

    def layers_of_a_call(self):
        """Returns the layers that matter to a call, or `None` for all."""

    def _flatten_layers(self, include_self=True, recursive=True):
        few = self.layers_of_a_call()
        if few is None or not recursive:
            return super()._flatten_layers(include_self, recursive)
        return [self, *few] if include_self else list(few)

    def _clear_losses(self):
        few = self.layers_of_a_call()
        if few is None:
            super()._clear_losses()
            return
        for layer in few:
            if layer._get_own_losses():
                layer._clear_losses()


def own_variables(layer):
    """Returns the variables that a layer holds directly."""
    own = [*layer._trainable_variables, *layer._non_trainable_variables]
    return list({id(v): v for v in own}.values())


def own_trainable(layer):
    """Returns the flag behind `trainable`, which subclasses override."""
    return layer._trainable


def set_own_trainable(layer, value):
    """Sets the flag behind `trainable`, and nothing inside the layer."""
    layer._trainable = value


@contextlib.contextmanager
def unlocked(layer):
    """Yields the state tracker of a built layer, unlocked."""
    layer._tracker.unlock()
    try:
        yield layer._tracker
    finally:
        layer._tracker.lock()


def renew_torch_parameters(layer):
    """Makes a layer list its torch parameters again, if it lists them."""
    if hasattr(layer, "_torch_params"):
        layer._track_variables()


def unlist_attributes(layer, names):
    """Removes names from the list of dicts that TensorFlow exports."""
    if "_tracked" in vars(layer):
        tracked = vars(layer)["_tracked"]
        tracked[:] = [name for name in tracked if name not in names]


def is_computed_again(layer):
    """Returns whether the backward pass may call the layer again."""
    return layer._remat_mode is not None


def layer_of(output):
    """Returns the layer or operation that a symbolic output comes from."""
    return output._keras_history.operation


# Variables


def value_inside(variable):
    """Returns the tensor that a variable holds, on torch."""
    return variable._value


def set_value_inside(variable, tensor):
    """Makes a variable hold another tensor; the old one is unchanged."""
    variable._value = tensor


@functools.cache
def shown_class(cls):
    """Returns a class of variables that are read as an adapted weight says."""

    def _maybe_autocast(self, value):
        if self.geolora_weight.is_read_by_itself:
            return value
        shown = self.geolora_weight.shown()
        return cls._maybe_autocast(self, value if shown is None else shown)

    members = {"_maybe_autocast": _maybe_autocast, "__module__": __name__}
    return type(cls.__name__, (cls,), {**members, "geolora_class": cls})


def become_shown(variable, weight):
    """Makes reading a variable give what an adapted weight shows.

    Args:
        variable: `keras.Variable`.
        weight: Has `shown()`, a tensor or `None` for the variable itself, and
            `is_read_by_itself`, whether to read it unrounded, too.
    """
    variable.geolora_weight = weight
    if not hasattr(variable, "geolora_class"):
        variable.__class__ = shown_class(type(variable))


def become_plain_variable(variable):
    """Undoes `become_shown`."""
    if hasattr(variable, "geolora_class"):
        variable.__class__ = variable.geolora_class
        del variable.geolora_weight


def trainable_from_birth(layer):
    """Returns the variables that a layer holds directly and created to train.

    Variables that have been frozen since are among them.
    """
    return list(layer._trainable_variables)


def set_layout(variable, layout):
    """Sets the layout of a variable."""
    variable._layout = layout


# Models


def compile_config(model):
    """Returns an object that every `compile` replaces, or `None`."""
    return getattr(model, "_compile_config", None)


def renew_compiled_state(model):
    """Makes a compiled model forget layers that it no longer contains."""
    if "_compiled_trainable_state" in vars(model):
        # Neither changed in place nor set as an attribute: TensorFlow would
        # track it and refuse to save it.
        del model._compiled_trainable_state
        vars(model)["_compiled_trainable_state"] = {
            x: x.trainable for x in all_layers(model)
        }


def unpickle_model(file):
    """Restores a model from what Keras writes into a pickle."""
    return keras.Model._unpickle_model(file)


# Optimizers


def variables_of(optimizer):
    """Returns the variables that an optimizer was built on, if any."""
    return getattr(optimizer, "_trainable_variables", [])


def own_state(optimizer):
    """Returns an optimizer's variables, without those of an inner one."""
    return optimizer._variables


def rate_as_given(optimizer):
    """Returns the learning rate, a variable or a schedule."""
    return optimizer._learning_rate


def decays(optimizer, variable):
    """Returns whether weight decay applies to a variable."""
    return optimizer._use_weight_decay(variable)


def checked_gradients(optimizer, gradients, variables):
    """Returns the gradients and variables that pass Keras' checks."""
    optimizer._check_variables_are_known(variables)
    return optimizer._filter_empty_gradients(gradients, variables)


def gradient_accumulators(optimizer):
    """Returns the gradients accumulated between two updates, if any."""
    return getattr(optimizer, "_accumulated_gradients", [])


def sums_of_gradients(optimizer, variables):
    """Returns the gradients of variables, accumulated between two updates."""
    sums = gradient_accumulators(optimizer)
    return [sums[optimizer._get_variable_index(v)] for v in variables]


def iterations_variable(optimizer):
    """Returns the counter of all steps, including those that accumulate."""
    return optimizer._iterations


def take_step(optimizer, gradients, variables):
    """Takes the step of an accumulating optimizer immediately."""
    gradients = optimizer._clip_gradients(gradients)
    optimizer._apply_weight_decay(variables)
    optimizer._backend_update_step(
        gradients, variables, optimizer.learning_rate
    )
    optimizer._backend_reset_gradient_accumulators()
