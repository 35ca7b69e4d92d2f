"""The variables of an adapter: how they are known, and whether they fit."""

import keras
import numpy as np
from keras import ops

from keras_geolora.geometry.integrator import Block
from keras_geolora.geometry.low_rank_sum import trimmed
from keras_geolora.geometry.manifold import (
    AVERAGE,
    MEND,
    check_factors,
    have_shapes,
)

# The factors of an adapter, in the order of its variables.
ROLES = Block._fields
# Those that are trainable variables. P and Q need no gradients, but the trainer
# of JAX lets an optimizer change trainable variables only.
ON_JAX = keras.backend.backend() == "jax"
TRAINED_ROLES = ROLES if ON_JAX else ("U", "S", "V")


class Factor(keras.constraints.Constraint):
    """Marks a variable as one factor of an adapter.

    Keras calls a variable's constraint at the end of every optimizer step.
    The factors of an adapter live on a manifold, and their gradients are
    those of the geometric step, so this refuses optimizers that move them
    directly. `keras_geolora.GeoLoRA` gives its inner optimizer other variables.
    """

    def __init__(self, adapter, role):
        self.adapter = adapter
        self.role = role

    def __call__(self, variable):
        raise RuntimeError(
            "The factors of an adapter live on a manifold that an ordinary "
            "optimizer would leave. Wrap the optimizer: "
            "`model.compile(optimizer=keras_geolora.GeoLoRA("
            "keras.optimizers.AdamW(1e-3)), ...)`. Received an optimizer "
            f"other than GeoLoRA that updates variable '{variable.path}'."
        )


def factor_of(variable):
    """Returns the `Factor` that marks a variable of an adapter, or `None`."""
    mark = variable.constraint
    return mark if isinstance(mark, Factor) else None


def has_gradient(variable):
    """Returns whether a variable is given a gradient.

    Those of `P` and `Q` are given as those of `U` and `V`.
    """
    factor = factor_of(variable)
    return factor is None or factor.role not in ("P", "Q")


def name_of(factor):
    """Returns the name of a factor's adapter for messages."""
    return factor.path.rpartition("/")[0]


def factors_of(layers, name=None):
    """Returns the factors of the adapters of layers, active or not, by path.

    Args:
        layers: Iterable of adapted layers.
        name: String, the one adapter to look at. Defaults to all.
    """
    found = {}
    for layer in layers:
        for key, adapter in layer.adapters_by_name().items():
            if name in (None, key):
                found.update(by_matrix(name_of(adapter.U), adapter.factors))
    return found


def matrices(factors, count):
    """Returns the factors of each matrix, as a list of tuples.

    Args:
        factors: List of arrays `U, S, V` or `U, S, V, P, Q`, those of one
            matrix or with an axis of matrices in front.
        count: Int, the number of matrices, or `None` for an ordinary adapter.
    """
    if count is None:
        return [tuple(factors)]
    return list(zip(*factors, strict=True))


def stacked(factors):
    """Stacks factors of different ranks, padded with zeros.

    Args:
        factors: List of tuples of arrays `U`, `S` and `V`.
    """
    rank = max(len(S) for _, S, _ in factors)
    padded = [
        (
            np.pad(U, ((0, 0), (0, rank - len(S)))),
            np.pad(S, (0, rank - len(S))),
            np.pad(V, ((0, 0), (0, rank - len(S)))),
        )
        for U, S, V in factors
    ]
    return tuple(map(np.stack, zip(*padded, strict=True)))


def each_trimmed(factors, max_rank=None, min_rank=1):
    """Returns `U`, `S` and `V` without unused columns, as arrays.

    Args:
        factors: List of the arrays `U, S, V, P, Q`, with an axis of matrices
            in front or not.
        max_rank: Int, the largest rank. Defaults to that of the update.
        min_rank: Int, the smallest rank. Defaults to 1.
    """
    count = len(factors[0]) if np.ndim(factors[0]) == 3 else None
    found = [
        trimmed(block, max_rank, min_rank) for block in matrices(factors, count)
    ]
    return found[0] if count is None else stacked(found)


def by_matrix(name, factors):
    """Returns a dict from name to factors, with an entry for each matrix.

    Args:
        name: String, the name of an adapter.
        factors: List of its factors, variables or arrays.
    """
    if len(factors[0].shape) == 2:
        return {name: factors}
    arrays = [ops.convert_to_numpy(x) for x in factors]
    return {
        f"{name}[{i}]": [x[i] for x in arrays] for i in range(len(arrays[0]))
    }


def fit_together(*factors):
    """Returns whether arrays have the shapes of factors."""
    if np.ndim(factors[0]) != 3:
        return have_shapes(*factors)
    counts = {len(x) if np.ndim(x) == 3 else None for x in factors}
    return len(counts) == 1 and have_shapes(*(x[0] for x in factors))


def check_layers(layers, not_done, name=None):
    """Refuses layers with factors that are off the manifold.

    Args:
        layers: Iterable of adapted layers.
        not_done: Sentence that says what was not done.
        name: String, the one adapter to look at. Defaults to all.
    """
    check_factors(factors_of(layers, name), f"{not_done} {MEND} {AVERAGE}")


def check_values(variables, values):
    """Refuses values of variables if factors among them are off the manifold.

    Args:
        variables: List of variables, some of them factors.
        values: List of their arrays.
    """
    factors = {}
    for variable, value in zip(variables, values, strict=False):
        factor = factor_of(variable)
        if factor is not None:
            factors.setdefault(name_of(variable), {})[factor.role] = value
    whole = {}
    for name, x in factors.items():
        if set(x) == set(ROLES) and fit_together(*(x[r] for r in ROLES)):
            whole.update(by_matrix(name, [x[role] for role in ROLES]))
    check_factors(whole, f"Nothing was changed. {AVERAGE}")
