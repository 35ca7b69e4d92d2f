"""Checks whether the factors of an adapter are on the manifold.

There the first `rank` columns of `U` and `V` are orthonormal, and everything
beyond the rank is zero. Between two retractions `P` and `Q` are not zero, but
orthogonal to `U` and `V`. Every step of `GeoLoRA` keeps this true; averaging
factors, or training them with another optimizer, does not. The outputs look
fine, but truncation, transport and ranks are wrong from then on.
"""

import numpy as np
from keras import ops

# Training stays below 1e-5. The mean of two adapters is off by 0.1 to 1, a step
# of another optimizer by about its learning rate times the root of the width.
TOLERANCE = 1e-3

RULE = (
    "The factors `U` and `V` of an adapter must have orthonormal columns. "
    "Averaging factors, or training them without `GeoLoRA`, breaks this."
)
AVERAGE = "Average updates, not factors: `model.average_geolora(clients)`."
MEND = (
    "To repair an adapter without changing its updates `U S V.T`, write "
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


def distance(U, S, V, P=None, Q=None):
    """Returns how far factors are from the manifold.

    Only products of thin matrices are formed.

    Args:
        U: Array of shape `(input_dim, max_rank)`.
        S: Array of shape `(max_rank, max_rank)`.
        V: Array of shape `(output_dim, max_rank)`.
        P: Array like `U`, or `None` for zero.
        Q: Array like `V`, or `None` for zero.

    Returns:
        Float: the largest `basis_error`, or the largest entry of `U.T @ P` or
        `V.T @ Q` relative to the largest entry of `S`, `P` and `Q`. At least 1
        if an unused entry is not zero, infinite if a number is not finite.
    """
    P = np.zeros_like(U) if P is None else P
    Q = np.zeros_like(V) if Q is None else Q
    U, S, V, P, Q = (np.asarray(x, "float64") for x in (U, S, V, P, Q))
    if not all(np.isfinite(x).all() for x in (U, S, V, P, Q)):
        return float("inf")
    rank = int((U != 0).any(axis=0).sum())
    unused = [x[:, rank:] for x in (U, S, V, P, Q)] + [S[rank:]]
    padded = not any(x.any() for x in unused)
    largest = max(np.abs(x).max(initial=0.0) for x in (S, P, Q)) or 1.0
    inside = max(np.abs(U.T @ P).max(), np.abs(V.T @ Q).max())
    return max(
        basis_error(U, rank),
        basis_error(V, rank),
        float(inside / largest),
        0.0 if padded and rank else 1.0,
    )


def far_off(factors):
    """Returns the factors that are off the manifold, and how far.

    Args:
        factors: Dict from name to `(U, S, V)`, or with `P` and `Q`, arrays or
            variables.

    Returns:
        Dict from name to float.
    """
    found = {
        name: distance(*map(ops.convert_to_numpy, arrays))
        for name, arrays in factors.items()
    }
    return {name: far for name, far in found.items() if far > TOLERANCE}


def described(far):
    """Describes what `far_off` found, in a few words."""
    worst = max(far.values())
    off = f"off by {worst:.1g}" if np.isfinite(worst) else "not finite"
    listed = ", ".join(f"'{name}'" for name in list(far)[:4])
    more = f", ... ({len(far)} in all)" if len(far) > 4 else ""
    return f"factors that are {off} ({TOLERANCE:g} is allowed): {listed}{more}"


def check_factors(factors, then):
    """Refuses factors that are off the manifold.

    Args:
        factors: As in `far_off`.
        then: String, what was not done, and what to do instead.
    """
    far = far_off(factors)
    if far:
        raise ValueError(f"{RULE} Received: {described(far)}. {then}")


def have_shapes(U, S, V, P=None, Q=None):
    """Returns whether arrays have the shapes of factors."""
    columns = np.shape(S)[-1:]
    return (
        np.ndim(U) == np.ndim(V) == 2
        and np.shape(U)[1:] == np.shape(V)[1:] == columns
        and np.shape(S) == 2 * columns
        and (P is None or np.shape(P) == np.shape(U))
        and (Q is None or np.shape(Q) == np.shape(V))
    )
