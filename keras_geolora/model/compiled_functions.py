"""What a model has compiled, and how it forgets that after a change."""

import keras

from keras_geolora.distribution import tf_replicas
from keras_geolora.keras_internals import (
    compile_config,
    renew_compiled_state,
    renew_torch_parameters,
)
from keras_geolora.layers.tree import inside, models_of
from keras_geolora.model.compiled_state import drop_unfit
from keras_geolora.optimizer.geolora import find_geolora, start_anew
from keras_geolora.optimizer.of_model import optimizers_of

# Attributes in which Keras and KerasHub keep compiled functions.
FUNCTIONS = (
    "train_function",
    "test_function",
    "predict_function",
    "generate_function",
)


def swap_functions(model, functions):
    """Replaces a model's compiled functions and returns the former ones.

    Functions from before the last `compile`, which use another optimizer and
    loss, are dropped.
    """
    compiled = compile_config(model)
    if functions.get("compiled") is not compiled:
        functions = {}
    before = {n: getattr(model, n) for n in FUNCTIONS if hasattr(model, n)}
    for name in before:
        setattr(model, name, functions.get(name))
    return {**before, "compiled": compiled}


def after_a_change(model):
    """Drops what was compiled for former layers or variables.

    Returns:
        List of `CompiledState`s, what was removed from the model.
    """
    forget_traces(model)
    return drop_unfit(model)


def after_other_factors(model):
    """Lets optimizers start anew, after other factors were loaded.

    What they remembered was in coordinates of the bases before.
    """
    for part in models_of(model):
        for optimizer in optimizers_of(part).values():
            if find_geolora(optimizer) is not None and optimizer.built:
                with tf_replicas.strategy_scope_of(part):
                    start_anew(optimizer)


def forget_traces(model):
    """Drops what was cached for the former layers.

    Compiled functions hold the old computation, torch modules a list of the old
    parameters.
    """
    for part in (model, *inside(model)):
        renew_torch_parameters(part)
        if isinstance(part, keras.Model):
            swap_functions(part, {})
            vars(part).pop("geolora_disabled_traces", None)
        renew_compiled_state(part)  # whose keys keep layers alive
