"""How the slots of the inner optimizer follow the moving bases.

The columns of `U` and `V` change at every retraction, so an unchanged moment
would refer to directions that no longer exist. How a slot moves depends on its
kind, which `register_slot_rules` declares for each optimizer class.

| kind          | the slot                       | how it moves               |
| ------------- | ------------------------------ | -------------------------- |
| `"linear"`    | sum of gradients or steps      | projected, see below       |
| `"quadratic"` | sum of their squares or sizes  | follows, see below         |
| `"averaged"`  | the same                       | mean over the rank axis    |
| `"row"`       | one number per row             | unchanged; for `S`: mean   |
| `"column"`    | one number per column          | mean over the rank axis    |

A linear slot represents a tangent vector at the old point. Its projection onto
the tangent space at the new point is the nearest vector that the new
coordinates can express. `limited_sum` bounds what a row gets from others.

A quadratic slot cannot be projected: it says how large gradients were, not
which. A new column of `K` or `L` gets the mean of the old ones, weighted by the
squares of its overlaps with them, and their plain mean as far as it lies
outside. So every direction keeps a size of its own, and none loses energy,
which would make its steps too large. The slot of `S` becomes one number, its
mean: sizes that differ between the entries of `S` mislead the step. Where every
step retracts, averages do better, and stand in for it.

A mean over the rank axis covers only the columns in use.
"""

from keras import ops

from keras_geolora.geometry.integrator import T, Unknowns, divide, norm


def transport(kind, slots, move):
    """Moves the slots of one kind into new bases.

    Args:
        kind: String, one of the table above.
        slots: `Unknowns` of arrays, the slots of `K`, `S` and `L`.
        move: `Move` of the point.

    Returns:
        `Unknowns` of the same shapes.
    """
    return MOVES[kind](slots, move)


def _project(slots, move):
    """Projects `M = m_K V.T + U m_L.T - U m_S V.T` onto a new tangent space.

    The slots are `M V`, `U.T M V` and `M.T U`, given in the old bases and
    returned in the new ones; `M` is never formed.
    """
    m_K, m_S, m_L = slots
    old, new, _, A, B = move
    K_in_U = ops.matmul(T(new.U), m_K)
    across = ops.matmul(T(m_L), new.V) - ops.matmul(m_S, B)
    down = T(K_in_U) - ops.matmul(T(m_S), A)
    return Unknowns(
        limited_sum(ops.matmul(m_K, B), ops.matmul(old.U, across)),
        ops.matmul(K_in_U, B) + ops.matmul(T(A), across),
        limited_sum(ops.matmul(m_L, A), ops.matmul(old.V, down)),
    )


def limited_sum(own, others):
    """Adds `others` to `own`, each row scaled down to at most its own norm.

    A row without a gradient, such as that of an unseen token, has a second
    moment of zero: anything added to its first moment would be divided by
    that.
    """
    share = divide(norm(own, -1), norm(others, -1))
    return own + ops.minimum(share, 1.0) * others


def _average(slots, move):
    return Unknowns(
        mean_of_active(slots.K, move.active),
        mean_of_all(slots.S, move.active),
        mean_of_active(slots.L, move.active),
    )


def _follow(slots, move):
    return Unknowns(
        followed(slots.K, move.B, move.active),
        mean_of_all(slots.S, move.active),
        followed(slots.L, move.A, move.active),
    )


def followed(x, overlaps, active):
    """Returns weighted means of columns, one for each new basis vector.

    Args:
        x: Array of shape `(..., n, r)`, a column for each old basis vector.
        overlaps: Array of shape `(..., r, r)`, products of the old basis
            vectors and the new ones.
        active: Bool array of shape `(..., r)`, which old ones are in use.

    Returns:
        Array of the shape of `x`.
    """
    weights = ops.square(overlaps)
    outside = 1.0 - ops.sum(weights, axis=-2, keepdims=True)
    outside = ops.maximum(outside, 0.0) * mean_of_active(x, active)
    return ops.matmul(x, weights) + outside


def _average_columns(slots, move):
    return Unknowns(*(mean_of_row(x, move.active) for x in slots))


def _keep_rows(slots, move):
    K, S, L = slots
    return Unknowns(K, mean_of_row(S, move.active), L)


def mean_of_row(x, active):
    """Like `mean_of_active`, for arrays without rows, `(..., r)`."""
    return mean_of_active(x[..., None, :], active)[..., 0, :]


def mean_of_all(x, active):
    """Like `mean_of_active`, over both axes of arrays `(..., r, r)`."""
    return mean_of_active(T(mean_of_active(T(x), active)), active)


def mean_of_active(x, active):
    """Replaces the entries of the last axis by the mean of the active ones.

    Args:
        x: Array of shape `(..., n, r)`.
        active: Bool array of shape `(..., r)`.

    Returns:
        Array of the shape of `x`.
    """
    weights = ops.cast(active, x.dtype)
    number = ops.sum(weights, axis=-1, keepdims=True)
    weights = weights / ops.maximum(number, 1.0)
    mean = ops.matmul(x, weights[..., None])
    return ops.broadcast_to(mean, ops.shape(x))


MOVES = {
    "linear": _project,
    "quadratic": _follow,
    "averaged": _average,
    "row": _keep_rows,
    "column": _average_columns,
}
