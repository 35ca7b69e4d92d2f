"""What a step under `tf.distribute` needs beyond what Keras does.

Keras sums gradients over replicas inside the inner optimizer. Before and after
that, the geometric step is the same on every replica: each works on its own
copy of the variables, and only gradients are exchanged.
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


def strategy_scope_of(model):
    """Returns a context in which variables are created like a model's own.

    It is the scope of the strategy under which the model was created.
    """
    strategy = getattr(model, "distribute_strategy", None)  # of TensorFlow
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def check_strategy(variables):
    """Refuses strategies whose replicas could not take the same steps.

    Args:
        variables: List of the variables that an optimizer is built on.
    """
    if not on_tensorflow() or not tf.distribute.has_strategy():
        return
    strategy = tf.distribute.get_strategy()
    if isinstance(strategy, tf.distribute.ParameterServerStrategy):
        raise ValueError(
            "Asynchronous workers would update the factors U, S and V of an "
            "adapter inconsistently. Train with "
            "`tf.distribute.MirroredStrategy` or "
            "`tf.distribute.MultiWorkerMirroredStrategy`. Received: "
            f"{type(strategy).__name__}"
        )
    for variable in variables:
        if not strategy.extended.variable_created_in_scope(variable.value):
            raise ValueError(
                "Replicas would all write to the same variable. Create, load "
                "and adapt the model inside `with strategy.scope():`. "
                f"Received: variable '{variable.path}', which was not created "
                f"under {type(strategy).__name__}"
            )


def on_tensorflow():
    """Returns whether `tf.distribute` may be in use."""
    return keras.backend.backend() == "tensorflow"


def apply(optimizer, gradients, variables):
    """Takes a step of a Keras optimizer, on all replicas together.

    With gradient accumulation, each replica of Keras decides for itself
    whether to update, and TensorFlow cannot sum over replicas inside such a
    condition (https://github.com/keras-team/keras/issues/20582). Here one
    decision is made for all, as in `keras.optimizers.LossScaleOptimizer`.

    Args:
        optimizer: Built `keras.optimizers.Optimizer`.
        gradients: List of gradients.
        variables: List of their variables.
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


def on_all_replicas(flags):
    """Returns whether flags hold on every replica.

    Args:
        flags: Bool array.
    """
    if not on_tensorflow() or not tf.distribute.has_strategy():
        return flags
    context = tf.distribute.get_replica_context()
    if context is None:
        return flags
    number = context.num_replicas_in_sync
    total = context.all_reduce(
        tf.distribute.ReduceOp.SUM, ops.cast(flags, "float32")
    )
    return ops.equal(total, number)


def on_any_replica(flags):
    """Returns whether flags hold on some replica.

    Args:
        flags: Bool array.
    """
    return ops.logical_not(on_all_replicas(ops.logical_not(flags)))


def decides_alone():
    """Returns whether a replica may sum over all inside its own condition."""
    if not on_tensorflow():
        return True
    return tf.__internal__.distribute.strategy_supports_no_merge_call()


def accumulate_or_update(strategy, optimizer, gradients, variables):
    """Decides for all replicas whether to accumulate or to update."""
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
    """Accumulates the gradients of all replicas.

    The sums are the same on every replica, so that a cut or a file may use
    those of any one.
    """
    context = tf.distribute.get_replica_context()
    gradients = context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
    for total, g in zip(
        sums_of_gradients(optimizer, variables), gradients, strict=True
    ):
        total.assign(total + g)


def update(optimizer, gradients, variables):
    """Takes a step with the mean of the accumulated gradients."""
    context = tf.distribute.get_replica_context()
    steps = optimizer.gradient_accumulation_steps
    # The optimizer sums over replicas: each contributes its share.
    share = 1 / context.num_replicas_in_sync
    totals = sums_of_gradients(optimizer, variables)
    gradients = [
        (g + share * total) / steps
        for g, total in zip(gradients, totals, strict=True)
    ]
    take_step(optimizer, gradients, variables)
