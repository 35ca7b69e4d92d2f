"""The geometric step: lift, augment, truncate.

Pure functions of arrays. Every function is batched: `...` stands for any
leading axes, in practice one axis over the layers of equal shape, so that the
number of operations does not grow with the number of layers.

| name         | shape                    | invariant                        |
| ------------ | ------------------------ | -------------------------------- |
| `U`          | (..., input_dim, r_max)  | first `rank` columns orthonormal |
| `V`          | (..., output_dim, r_max) | as `U`                           |
| `S`          | (..., r_max, r_max)      | diagonal, not negative           |
| `K` = U S    | as `U`                   | unknown of the K-step            |
| `L` = V S.T  | as `V`                   | unknown of the L-step            |

Columns beyond the rank are exactly zero, in the factors and in everything that
is derived from them, so that shapes are static and the rank can be read off.

References:
    Schotthöfer et al. 2024, GeoLoRA, arXiv 2410.18720.
    Ceruti, Kusch, Lubich 2024, A parallel rank-adaptive integrator for
    dynamical low-rank approximation, SIAM J. Sci. Comput. 46(3).
"""

from typing import NamedTuple

from keras import ops

# Numbers below `ROUNDING` times the largest of their kind are rounding noise
# in float32: a few units in the last place, accumulated over a small matrix.
ROUNDING = 2e-6


class Point(NamedTuple):
    """A point on the manifold of low-rank matrices, `U @ S @ V.T`."""

    U: object
    S: object
    V: object


class Unknowns(NamedTuple):
    """What the inner optimizer moves: `K = U S`, `S` and `L = V S.T`.

    The same three shapes describe a tangent vector `M` by its products
    `M V`, `U.T M V` and `M.T U`, as gradients and first moments do.
    """

    K: object
    S: object
    L: object


def T(x):
    """Transposes the last two axes."""
    return ops.swapaxes(x, -1, -2)


def active_columns(basis):
    """Returns which columns of a basis are in use.

    Args:
        basis: Array of shape `(..., dim, r_max)`, as `U` or `V`.

    Returns:
        Boolean array of shape `(..., r_max)`; its sum is the rank.
    """
    return ops.any(ops.not_equal(basis, 0), axis=-2)


def diagonal(sigma):
    """Puts a batch of vectors `(..., r)` on diagonals `(..., r, r)`."""
    return sigma[..., None] * ops.eye(sigma.shape[-1], dtype=sigma.dtype)


def lift(point):
    """Changes to the coordinates of the inner optimizer.

    Args:
        point: `Point`.

    Returns:
        `Unknowns` with `K = U S`, `S` and `L = V S.T`.
    """
    U, S, V = point
    return Unknowns(ops.matmul(U, S), S, ops.matmul(V, T(S)))


def new_directions(basis, X):
    """Returns an orthonormal basis of what `X` adds to `basis`.

    That is a basis of the range of `(I - basis basis.T) X`. Directions that
    are rounding noise, or not there because the residual is rank-deficient,
    become zero columns: orthonormalising them would give arbitrary columns
    that overlap `basis`.

    The residual goes twice through its Gram matrix. The first pass separates
    the directions and scales each to length one, the second makes them
    orthonormal; both project `basis` out, so that small directions are as
    clean as large ones.

    Args:
        basis: Array of shape `(..., dim, r)`, columns orthonormal or zero.
        X: Array of shape `(..., dim, r)`.

    Returns:
        Array of shape `(..., dim, r)`, columns orthonormal or zero.
    """
    size = ops.max(ops.abs(X), axis=(-2, -1), keepdims=True)
    X = divide(X, size)  # squares of very small or large values stay finite
    noise = ROUNDING * norm(X, axis=(-2, -1))
    residual = project_out(basis, project_out(basis, X))

    _, Q = ops.eigh(ops.matmul(T(residual), residual))
    directions = ops.matmul(residual, Q)
    lengths = norm(directions, axis=-2)
    directions = ops.where(lengths > noise, divide(directions, lengths), 0.0)
    directions = project_out(basis, directions)

    eigenvalues, Q = ops.eigh(ops.matmul(T(directions), directions))
    eigenvalues = eigenvalues[..., None, :]
    return ops.where(
        # A unit column that the others nearly explain is noise as well.
        eigenvalues > 1e-2,
        ops.matmul(directions, Q)
        / ops.sqrt(ops.where(eigenvalues > 1e-2, eigenvalues, 1.0)),
        0.0,
    )


def project_out(basis, X):
    """Returns `(I - basis basis.T) X`."""
    return X - ops.matmul(basis, ops.matmul(T(basis), X))


def norm(X, axis):
    """Euclidean norm over `axis`, which is kept with length one."""
    return ops.sqrt(ops.sum(ops.square(X), axis=axis, keepdims=True))


def divide(X, size):
    """Returns `X / size`, and zero where `size` is zero."""
    return ops.where(size > 0, X / ops.where(size > 0, size, 1.0), 0.0)


def truncated_rank(sigma, tolerance, min_rank, max_rank):
    """Chooses the rank from the singular values.

    The smallest `r` with `||sigma[r:]|| <= tolerance * ||sigma||`, clamped to
    `[min_rank, max_rank]`. Singular values that are rounding noise never
    count, not even towards `min_rank`.

    Args:
        sigma: Array of shape `(..., r)`, descending.
        tolerance: Scalar in [0, 1), the share of the norm to discard.
        min_rank: Int array of shape `(..., 1)`.
        max_rank: Int.

    Returns:
        Int array of shape `(..., 1)`.
    """
    energy = ops.square(divide(sigma, sigma[..., :1]))
    tails = ops.sqrt(ops.flip(ops.cumsum(ops.flip(energy, -1), axis=-1), -1))
    rank = count(tails > tolerance * tails[..., :1])
    rank = ops.minimum(ops.maximum(rank, min_rank), max_rank)
    return ops.minimum(rank, count(sigma > ROUNDING * sigma[..., :1]))


def count(mask):
    """Counts the true values of the last axis, which is kept."""
    return ops.sum(ops.cast(mask, "int32"), axis=-1, keepdims=True)


def in_turn(x, earlier):
    """Returns `x`, but not before `earlier` has been computed.

    On CPU, jaxlib computes a batch of decompositions on the threads that run
    the program, and waits for them there: as many decompositions at a time as
    there are threads wait for each other for ever (seen with jaxlib 0.10.2 on
    two cores). So one waits for the other.
    """
    spoilt = ops.cast(ops.any(ops.isnan(earlier)), x.dtype)
    return x + 1e-30 * spoilt  # zero, but no compiler knows


def orthonormalize(basis):
    """One Newton-Schulz pass: keeps rounding errors from adding up.

    Moves columns that are orthonormal up to `error` to columns that are
    orthonormal up to `error ** 2`; zero columns stay zero.
    """
    gram = ops.matmul(T(basis), basis)
    return 1.5 * basis - 0.5 * ops.matmul(basis, gram)


class Augmented(NamedTuple):
    """A step, before truncation, as a singular value decomposition.

    The step is `U_hat @ P @ diag(sigma) @ (V_hat @ Q).T`; `sigma` is
    descending and relative to `size`, `(..., 1, 1)`, which is zero where
    nothing is known about any direction.
    """

    U_hat: object
    V_hat: object
    P: object
    sigma: object
    Q: object
    size: object


def augment(point, unknowns, max_change=None):
    """Writes a step in bases that hold the old and the new directions.

    The bases are augmented by the directions that the K- and L-step found,
    and the step in them is

        S_hat = [[S_new,             L_new.T V_tilde],
                 [U_tilde.T K_new,   0              ]]

    Args:
        point: `Point` before the step.
        unknowns: `Unknowns` after the inner step. Must be finite.
        max_change: Array of shape `(..., 1, 1)` or `None`. A step whose
            Frobenius norm is larger is shortened to it, in its direction.

    Returns:
        `Augmented`, with bases of twice as many columns as the buffers.
    """
    U, S, V = point
    K, S_new, L = unknowns
    U_tilde = new_directions(U, K)
    V_tilde = new_directions(V, in_turn(L, U_tilde))
    S_hat = ops.concatenate(
        [
            ops.concatenate([S_new, ops.matmul(T(L), V_tilde)], axis=-1),
            ops.concatenate(
                [ops.matmul(T(U_tilde), K), ops.zeros_like(S)], axis=-1
            ),
        ],
        axis=-2,
    )
    if max_change is not None:
        r = S.shape[-1]
        S_before = ops.pad(S, [(0, 0)] * (len(S.shape) - 2) + [(0, r)] * 2)
        change = S_hat - S_before
        length = norm(change, axis=(-2, -1))
        share = ops.where(length > max_change, divide(max_change, length), 1.0)
        S_hat = S_before + share * change
    size = ops.max(ops.abs(S_hat), axis=(-2, -1), keepdims=True)
    P, sigma, Qt = ops.svd(divide(S_hat, size), full_matrices=False)
    return Augmented(
        ops.concatenate([U, U_tilde], -1),
        ops.concatenate([V, V_tilde], -1),
        P,
        sigma,
        T(Qt),
        size,
    )


def truncate(point, augmented, rank):
    """Returns to the manifold: keeps the largest singular values of a step.

    `U = U_hat P`, `S = diag(sigma)`, `V = V_hat Q` with their first columns.
    Without truncation and with plain gradient descent the step is
    `W - lr * P(W) G`, where `P(W)` projects on the tangent space.

    Args:
        point: `Point` before the step.
        augmented: `Augmented`, the step.
        rank: Int array of shape `(..., 1)`.

    Returns:
        `Point`. Where `size` is zero the first columns of the old point stay
        as they were.
    """
    max_rank = point.S.shape[-1]
    U_hat, V_hat, P, sigma, Q, size = augmented
    keep = ops.arange(max_rank, dtype="int32") < rank
    columns = keep[..., None, :]
    P = ops.where(columns, P[..., :max_rank], 0.0)
    Q = ops.where(columns, Q[..., :max_rank], 0.0)
    sigma = ops.where(keep, sigma[..., :max_rank], 0.0) * size[..., 0]
    moved = Point(
        orthonormalize(ops.matmul(U_hat, P)),
        diagonal(sigma),
        orthonormalize(ops.matmul(V_hat, Q)),
    )
    stay = size == 0
    return Point(
        *(
            ops.where(stay, ops.where(columns, x, 0.0), y)
            for x, y in zip(point, moved, strict=True)
        )
    )


def wanted_rank(point, sigma, tolerance, min_rank):
    """Returns the rank that `tolerance` asks for.

    Args:
        point: `Point` before the step.
        sigma: Array of shape `(..., r)`, singular values after it.
        tolerance: Scalar in [0, 1), share of the norm that may be cut.
        min_rank: Int array of shape `(..., 1)`.

    Returns:
        Int array of shape `(..., 1)`. Where all singular values are zero,
        the number of columns in use.
    """
    rank = truncated_rank(sigma, tolerance, min_rank, point.S.shape[-1])
    in_use = count(active_columns(point.U))
    return ops.where(ops.equal(sigma[..., :1], 0), in_use, rank)


def cut(point, rank):
    """Truncates a point without a step.

    Its core is diagonal and descending, so that truncating takes columns
    away and turns nothing.

    Args:
        point: `Point`.
        rank: Int array of shape `(..., 1)`.

    Returns:
        `Point`.
    """
    keep = ops.arange(point.S.shape[-1], dtype="int32") < rank
    return Point(*(ops.where(keep[..., None, :], x, 0.0) for x in point))
