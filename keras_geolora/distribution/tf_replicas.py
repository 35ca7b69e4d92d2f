"""What a step under `tf.distribute` needs beyond what Keras does.

Keras sums gradients over replicas inside of the inner optimizer. What the
geometric step does before and after is the same on every replica: each works
on its own copy of the variables, and nothing but gradients is exchanged.
"""

import contextlib

import keras
from keras import ops

from keras_geolora.keras_internals import (
    iterations_variable,
    sums_of_gradients,
    take_step,
)

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf


def scope_of(model):
    """Returns a context in which variables are made as those of a model are.

    It is the scope of the strategy under which the model was created.
    """
    strategy = getattr(model, "distribute_strategy", None)  # of TensorFlow
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def check_strategy(variables):
    """Refuses replicas that could not take the same steps.

    Args:
        variables: List of the variables that an optimizer is built on.
    """
    if not on_tensorflow() or not tf.distribute.has_strategy():
        return
    strategy = tf.distribute.get_strategy()
    if isinstance(strategy, tf.distribute.ParameterServerStrategy):
        raise ValueError(
            "Workers that update variables each in its own time would take "
            "the factors of an adapter apart. Train with "
            "`tf.distribute.MirroredStrategy` or "
            "`tf.distribute.MultiWorkerMirroredStrategy`. Received: "
            f"{type(strategy).__name__}"
        )
    for variable in variables:
        if not strategy.extended.variable_created_in_scope(variable.value):
            raise ValueError(
                "Replicas would all write to the same variable. Create, load "
                "and adapt the model inside `with strategy.scope():`. "
                f"Received: variable '{variable.path}', which is not of "
                f"{type(strategy).__name__}"
            )


def on_tensorflow():
    """Says whether there may be strategies of `tf.distribute`."""
    return keras.backend.backend() == "tensorflow"


def apply(optimizer, gradients, variables):
    """Takes a step of a Keras optimizer, on all replicas together.

    Where gradients are accumulated, each replica of Keras decides by itself
    whether it is time for an update, and TensorFlow lets nothing be summed
    over replicas behind such a decision
    (https://github.com/keras-team/keras/issues/20582). Here one decision
    holds for all, as in `keras.optimizers.LossScaleOptimizer`.

    Args:
        optimizer: Built `keras.optimizers.Optimizer`.
        gradients: List of gradients.
        variables: List of as many variables.
    """
    if not optimizer.gradient_accumulation_steps or decides_alone():
        optimizer.apply(gradients, variables)
        return
    scale = optimizer.loss_scale_factor
    if scale is not None:
        gradients = [g / scale for g in gradients]
    tf.distribute.get_replica_context().merge_call(
        accumulate_or_update, (optimizer, gradients, variables)
    )
    for variable in variables:
        if variable.constraint is not None:
            variable.assign(variable.constraint(variable))
    iterations_variable(optimizer).assign_add(1)


def decides_alone():
    """Says whether a replica may sum over all behind a decision of its own."""
    if not on_tensorflow():
        return True
    return tf.__internal__.distribute.strategy_supports_no_merge_call()


def accumulate_or_update(strategy, optimizer, gradients, variables):
    """Decides for all replicas what each does with its gradients."""
    steps = optimizer.gradient_accumulation_steps

    def on_each(function):
        args = (optimizer, gradients, variables)
        strategy.extended.call_for_each_replica(function, args)

    ops.cond(
        ops.equal((iterations_variable(optimizer) + 1) % steps, 0),
        lambda: on_each(update),
        lambda: on_each(accumulate),
    )


def accumulate(optimizer, gradients, variables):
    """Adds up gradients of all replicas.

    The sums are the same on every replica, so that a cut or a file may take
    those of any.
    """
    context = tf.distribute.get_replica_context()
    gradients = context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
    for total, g in zip(
        sums_of_gradients(optimizer, variables), gradients, strict=True
    ):
        total.assign(total + g)


def update(optimizer, gradients, variables):
    """Takes a step with the mean of what was accumulated."""
    context = tf.distribute.get_replica_context()
    steps = optimizer.gradient_accumulation_steps
    # The optimizer sums over replicas: each brings its share.
    share = 1 / context.num_replicas_in_sync
    totals = sums_of_gradients(optimizer, variables)
    gradients = [
        (g + share * total) / steps
        for g, total in zip(gradients, totals, strict=True)
    ]
    take_step(optimizer, gradients, variables)
