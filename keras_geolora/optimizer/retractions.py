"""When adapters return to the manifold, and how only then anything is computed.

A retraction is expensive: small eigenvalue and singular value problems of every
adapter. Between two of them an adapter moves in the tangent space at the last
one. At first the bases are still being found, so that retractions are dense;
later they are `LONGEST` steps apart.
"""

import math

import keras
import numpy as np
from keras import ops

ON_JAX = keras.backend.backend() == "jax"
if ON_JAX:
    import jax

# The interval after `t` updates is `t / GROWTH`, from 1 to `LONGEST`.
GROWTH, LONGEST = 4, 20


def blocks_begun(updates, growth=GROWTH, longest=LONGEST):
    """Returns how many intervals have passed after some updates, a float."""
    if updates <= growth:
        return float(updates)
    grown = growth * (1 + math.log(min(updates / growth, longest)))
    return grown + max(updates - growth * longest, 0) / longest


def due_updates(interval, turn, turns):
    """Returns after which updates the adapters of one turn are retracted.

    Groups of adapters take turns, so that no step is much longer than others.

    Args:
        interval: Int, the number of steps between two retractions, or
            `"auto"` for one that grows.
        turn: Int, the number of the turn.
        turns: Int, how many turns there are.

    Returns:
        Pair of bool arrays: for the first updates, beginning with number 0,
        which is none, and for all later ones, again and again.
    """
    ahead = turn / turns
    if interval != "auto":
        last = np.arange(interval) == (interval - 1 - int(ahead * interval))
        return np.zeros(1, bool), last
    first = GROWTH * LONGEST + 1
    begun = [
        math.floor(blocks_begun(t) + ahead) for t in range(first + LONGEST)
    ]
    due = np.diff(begun, prepend=math.floor(ahead)) > 0
    return due[:first], due[first:]


def is_due(updates, interval, turn, turns):
    """Returns whether the adapters of one turn are retracted now.

    Args:
        updates: Int scalar, the number of updates including this one.
        interval: As in `due_updates`.
        turn: As in `due_updates`.
        turns: As in `due_updates`.

    Returns:
        Bool scalar.
    """
    first, later = due_updates(interval, turn, turns)
    place = updates - len(first)
    place = ops.where(place < 0, updates, len(first) + place % len(later))
    return ops.take(np.concatenate([first, later]), place)


def was_due(updates, interval, turns):
    """Returns whether adapters of all turns were retracted after an update.

    Args:
        updates: Int, the number of that update.
        interval: As in `due_updates`.
        turns: As in `due_updates`.
    """
    return all(
        bool(is_due(updates, interval, turn, turns)) for turn in range(turns)
    )


def update_if(condition, update, variables):
    """Calls a function if a condition holds.

    Args:
        condition: Bool scalar, maybe traced.
        update: Function without arguments. It may assign to `variables` only,
            and read no other variable.
        variables: List of `keras.Variable`s.
    """
    try:
        known = bool(condition)
    except TypeError:  # of TensorFlow and, as a subclass, of JAX
        known = None
    if known is not None:
        if known:
            update()
        return
    values = values_of(variables)
    updated = stateless(update, variables)
    values = ops.cond(condition, lambda: updated(values), lambda: values)
    assign(variables, values)


class Program:
    """A function that changes variables, compiled once where that pays.

    On JAX every operation outside of a compiled function is compiled by itself;
    elsewhere such operations are fast enough.

    Args:
        update: Function of arrays. It may assign to `variables` only, and read
            no other variable.
        variables: List of `keras.Variable`s.
    """

    def __init__(self, update, variables):
        self.update, self.variables = update, variables
        if ON_JAX:
            self.compiled = jax.jit(stateless(update, variables))

    def __call__(self, *args):
        """Changes the variables."""
        if not ON_JAX:
            self.update(*args)
            return
        values = self.compiled(values_of(self.variables), *args)
        assign(self.variables, values)


def stateless(update, variables):
    """Returns a function from the values of variables to their new values.

    Args:
        update: As in `Program`.
        variables: List of `keras.Variable`s.
    """

    def updated(values, *args):
        pairs = list(zip(variables, values, strict=True))
        with keras.StatelessScope(state_mapping=pairs) as scope:
            update(*args)
        return [scope.get_current_value(v) for v in variables]

    return updated


def values_of(variables):
    """Returns the values of variables as tensors."""
    return [ops.convert_to_tensor(v.value) for v in variables]


def assign(variables, values):
    """Assigns values to variables."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
