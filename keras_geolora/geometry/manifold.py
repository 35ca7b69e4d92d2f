"""Where the factors of an adapter belong, and how far they are from there.

The first `rank` columns of `U` and `V` are orthonormal, `S` is diagonal, and
all that is beyond is zero. Every step of `GeoLoRA` keeps it so. Means of
factors and steps of other optimizers do not, although nothing shows in the
outputs; truncation, transport and the ranks would be wrong from then on.
"""

import numpy as np
from keras import ops

# Training stays below 1e-5. A mean of two adapters is off by 0.1 to 1, a step
# of another optimizer by about its learning rate times the root of the width.
TOLERANCE = 1e-3

RULE = (
    "The factors of an adapter are bases `U` and `V` with orthonormal columns "
    "and a diagonal core `S`. Means of factors, and optimizers other than "
    "`GeoLoRA`, leave that."
)
AVERAGE = "Average updates by `model.average_geolora(clients)`, not factors."
MEND = (
    "To keep the updates `U S V.T` of an adapter as they are, write "
    "`model.combine_geolora('mended', {name: 1.0})` and "
    "`model.delete_geolora(name)`."
)


def basis_error(basis, rank):
    """Returns how far the first `rank` columns are from orthonormal.

    Args:
        basis: Array of shape `(dim, max_rank)`.
        rank: Int, the number of columns in use.

    Returns:
        Float, the largest entry of `basis.T @ basis - I`, where `I` has as
        many ones as there are columns in use.
    """
    basis = np.asarray(basis, "float64")
    ones = np.arange(basis.shape[1]) < rank
    with np.errstate(invalid="ignore"):  # infinities
        gram = basis.T @ basis
    return float(np.abs(gram - np.diag(ones)).max(initial=0.0))


def distance(U, S, V):
    """Returns how far factors are from where they belong.

    Only products of thin matrices are formed.

    Args:
        U: Array of shape `(input_dim, max_rank)`.
        S: Array of shape `(max_rank, max_rank)`.
        V: Array of shape `(output_dim, max_rank)`.

    Returns:
        Float: the largest `basis_error`, or the largest entry of `S` beside
        its diagonal, relative to the largest of all. At least 1 where what
        is not in use is not zero, infinite for numbers that are not finite.
    """
    U, S, V = (np.asarray(x, "float64") for x in (U, S, V))
    if not all(np.isfinite(x).all() for x in (U, S, V)):
        return float("inf")
    rank = int((U != 0).any(axis=0).sum())
    unused = U[:, rank:], V[:, rank:], S[rank:], S[:, rank:]
    padded = not any(x.any() for x in unused)
    beside = np.abs(S - np.diag(S.diagonal())).max(initial=0.0)
    return max(
        basis_error(U, rank),
        basis_error(V, rank),
        float(beside / (np.abs(S).max(initial=0.0) or 1.0)),
        0.0 if padded and rank else 1.0,
    )


def far_off(factors):
    """Returns those that are not where they belong, and how far they are off.

    Args:
        factors: Dict from name to `(U, S, V)`, arrays or variables.

    Returns:
        Dict from name to float.
    """
    found = {
        name: distance(*map(ops.convert_to_numpy, three))
        for name, three in factors.items()
    }
    return {name: far for name, far in found.items() if far > TOLERANCE}


def described(far):
    """Returns a few words on what `far_off` found."""
    worst = max(far.values())
    off = f"off by {worst:.1g}" if np.isfinite(worst) else "not finite"
    listed = ", ".join(f"'{name}'" for name in list(far)[:4])
    more = f", ... ({len(far)} in all)" if len(far) > 4 else ""
    return f"factors that are {off} ({TOLERANCE:g} is allowed): {listed}{more}"


def check_factors(factors, then):
    """Refuses factors that are not where they belong.

    Args:
        factors: As in `far_off`.
        then: String, what was not done, and what to do instead.
    """
    far = far_off(factors)
    if far:
        raise ValueError(f"{RULE} Received: {described(far)}. {then}")


def name_of(factor):
    """Returns what the adapter of a factor is called in messages."""
    return factor.path.rpartition("/")[0]


def factors_of(layers, name=None):
    """Returns the factors of the adapters of layers, active or not, by path.

    Args:
        layers: Iterable of adapted layers.
        name: String, the one adapter to look at. Defaults to all.
    """
    return {
        name_of(adapter.U): (adapter.U, adapter.S, adapter.V)
        for layer in layers
        for key, adapter in layer.adapters_by_name().items()
        if name in (None, key)
    }


def check_layers(layers, not_done, name=None):
    """Refuses layers with factors that are not where they belong.

    Args:
        layers: Iterable of adapted layers.
        not_done: Sentence on what was not done.
        name: String, the one adapter to look at. Defaults to all.
    """
    check_factors(factors_of(layers, name), f"{not_done} {MEND} {AVERAGE}")


def check_values(variables, values):
    """Refuses values for variables with such factors among them.

    Args:
        variables: List of variables, of which some are factors.
        values: List of as many arrays.
    """
    factors = {}
    for variable, value in zip(variables, values, strict=False):
        role = getattr(variable.constraint, "role", None)
        if role is not None:
            factors.setdefault(name_of(variable), {})[role] = value
    whole = {
        name: tuple(x[role] for role in "USV")
        for name, x in factors.items()
        if set(x) == set("USV") and have_shapes(*(x[role] for role in "USV"))
    }
    check_factors(whole, f"Nothing was changed. {AVERAGE}")


def have_shapes(U, S, V):
    """Says whether arrays have the shapes of factors."""
    columns = np.shape(S)[-1:]
    return (
        np.ndim(U) == np.ndim(V) == 2
        and np.shape(U)[1:] == np.shape(V)[1:] == columns
        and np.shape(S) == 2 * columns
    )
