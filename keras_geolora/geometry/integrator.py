"""The geometric step: lift, augment, truncate.

Pure functions of arrays. Every function is batched: `...` stands for any
leading axes, in practice one axis over the layers of equal shape, so that the
number of operations does not grow with the number of layers.

| name         | shape                    | invariant                        |
| ------------ | ------------------------ | -------------------------------- |
| `U`          | (..., input_dim, r_max)  | first `rank` columns orthonormal |
| `V`          | (..., output_dim, r_max) | as `U`                           |
| `S`          | (..., r_max, r_max)      | diagonal, nonnegative            |
| `K` = U S    | as `U`                   | unknown of the K-step            |
| `L` = V S.T  | as `V`                   | unknown of the L-step            |

Columns beyond the rank are exactly zero, in the factors and in everything
derived from them. So shapes are static, and the rank is the number of nonzero
columns.

References:
    Schotthöfer et al. 2024, GeoLoRA, arXiv 2410.18720.
    Ceruti, Kusch, Lubich 2024, A parallel rank-adaptive integrator for
    dynamical low-rank approximation, SIAM J. Sci. Comput. 46(3).
"""

from typing import NamedTuple

from keras import ops

# Values below `ROUNDING` times the largest one are float32 rounding noise: a
# few units in the last place, accumulated over a small matrix.
ROUNDING = 2e-6


class Point(NamedTuple):
    """A point on the manifold of low-rank matrices, `U @ S @ V.T`."""

    U: object
    S: object
    V: object


class Unknowns(NamedTuple):
    """What the inner optimizer updates: `K = U S`, `S` and `L = V S.T`.

    Also holds a tangent vector `M`, such as a gradient or a first moment, as
    its products `M V`, `U.T M V` and `M.T U`.
    """

    K: object
    S: object
    L: object


class Move(NamedTuple):
    """How a step, or a cut, moved a point.

    | name     | shape       | meaning                                       |
    | -------- | ----------- | --------------------------------------------- |
    | `old`    | `Point`     | before                                        |
    | `new`    | `Point`     | after                                         |
    | `active` | (..., r)    | which columns of the old bases were in use    |
    | `A`      | (..., r, r) | `old.U.T @ new.U`                             |
    | `B`      | (..., r, r) | `old.V.T @ new.V`                             |
    """

    old: Point
    new: Point
    active: object
    A: object
    B: object


def T(x):
    """Transposes the last two axes."""
    return ops.swapaxes(x, -1, -2)


def active_columns(basis):
    """Returns which columns of a basis are in use.

    Args:
        basis: Array of shape `(..., dim, r_max)`, `U` or `V`.

    Returns:
        Boolean array of shape `(..., r_max)`; its sum is the rank.
    """
    return ops.any(ops.not_equal(basis, 0), axis=-2)


def diagonal(sigma):
    """Puts a batch of vectors `(..., r)` on diagonals `(..., r, r)`."""
    return sigma[..., None] * ops.eye(sigma.shape[-1], dtype=sigma.dtype)


def core_values(point):
    """Returns the singular values of a point, `(..., r)`, descending."""
    return ops.diagonal(point.S, axis1=-2, axis2=-1)


def lift(point):
    """Converts a point to the coordinates of the inner optimizer.

    Args:
        point: `Point`.

    Returns:
        `Unknowns` with `K = U S`, `S` and `L = V S.T`.
    """
    U, S, V = point
    sigma = core_values(point)[..., None, :]
    return Unknowns(U * sigma, S, V * sigma)


class Extension(NamedTuple):
    """A basis and the directions that a step adds to it, as `both @ mix`.

    In `both = [basis, extra]` the columns of `extra` have any length. The
    columns of `both @ mix` are orthonormal or zero, and the first half is the
    basis. `gram` and `mix` are small: computing with them touches the large
    arrays as rarely as possible.

    | name    | shape           | meaning                                    |
    | ------- | --------------- | ------------------------------------------ |
    | `both`  | (..., dim, 2 r) | basis and further columns                  |
    | `gram`  | (..., 2 r, 2 r) | `both.T @ both`                            |
    | `mix`   | (..., 2 r, 2 r) | makes the columns orthonormal              |
    | `used`  | (..., 2 r)      | which columns of `both @ mix` are not zero |
    | `gain`  | (..., r, r)     | new directions, transposed, times the step |
    | `finite`| (...)           | false if the step was replaced by zero     |
    """

    both: object
    gram: object
    mix: object
    used: object
    gain: object
    finite: object


def extend(basis, active, change, known):
    """Finds an orthonormal basis of the directions that a step adds.

    They span the range of `(I - basis basis.T) change`. Directions that are
    rounding noise, or missing because the residual is rank-deficient, become
    zero columns: orthonormalising them would give arbitrary columns that
    overlap `basis`.

    Two passes use the Gram matrix of the residual. The first separates the
    directions. The second, with columns scaled to unit length, makes them
    orthonormal to each other and to `basis`, so that small directions are as
    accurate as large ones.

    Args:
        basis: Array of shape `(..., dim, r)`, columns orthonormal or zero.
        active: Bool array of shape `(..., r)`, the columns of `change` to use.
        change: Array of shape `(..., dim, r)`, the change of `K`.
        known: Array of shape `(..., 1, 1)`, the norm of `K` before the step:
            anything small relative to it is rounding noise.

    Returns:
        `Extension`.
    """
    r = basis.shape[-1]
    in_use, active = active, active[..., None, :]
    # Scaling avoids underflow and overflow of the squares.
    sizes = ops.mean(ops.abs(change), axis=-2, keepdims=True)
    size = ops.sum(ops.where(active, sizes, 0.0), axis=-1, keepdims=True)
    finite = ops.isfinite(size)
    size = ops.where(finite, size, 0.0)
    counts = ops.logical_and(active, finite)
    X = ops.where(counts, change * divide(1.0, size), 0.0)
    inside = ops.matmul(T(basis), X)
    residual = X - ops.matmul(basis, inside)
    _, Q = ops.eigh(ops.matmul(T(residual), residual))
    extra = ops.matmul(residual, Q)
    both = ops.concatenate([basis, extra], axis=-1)
    gram = ops.matmul(T(both), both)

    lengths = ops.sqrt(ops.diagonal(gram, axis1=-2, axis2=-1))[..., r:]
    noise = ROUNDING * (norm(X, (-2, -1)) + known * divide(1.0, size))
    lengths = ops.where(lengths > noise[..., 0], lengths, 0.0)
    unit = divide(1.0, lengths)[..., None, :]
    overlap = gram[..., :r, r:] * unit
    apart = T(unit) * gram[..., r:, r:] * unit - ops.matmul(T(overlap), overlap)
    eigenvalues, Q = ops.eigh(apart)
    # A unit column that is almost in the span of the others is noise as well.
    used = ops.concatenate([in_use, eigenvalues > 1e-2], axis=-1)
    clear = used[..., None, r:]
    eigenvalues = eigenvalues[..., None, :]
    Q = ops.where(clear, Q / ops.sqrt(ops.where(clear, eigenvalues, 1.0)), 0.0)

    new, back = T(unit) * Q, -ops.matmul(overlap, Q)
    eye = ops.eye(r, dtype=basis.dtype) * ops.ones_like(new)
    mix = ops.concatenate(
        [
            ops.concatenate([eye, back], axis=-1),
            ops.concatenate([ops.zeros_like(new), new], axis=-1),
        ],
        axis=-2,
    )
    gain = ops.matmul(T(new), ops.matmul(T(extra), X))
    gain = gain + ops.matmul(T(back), inside)
    finite = finite[..., 0, 0]
    return Extension(both, gram, mix, used, gain * size, finite)


def turn(extension, rotation, stay, keep):
    """Returns the basis `both @ mix @ rotation` and its overlap with the old.

    One Newton-Schulz pass keeps rounding errors from accumulating: columns
    that are orthonormal up to `error` become orthonormal up to `error ** 2`.
    Zero columns stay zero.

    Args:
        extension: `Extension`.
        rotation: Array of shape `(..., 2 r, r)`, columns orthonormal or zero.
        stay: Bool array of shape `(..., 1, 1)`, where to keep the old basis.
        keep: Bool array of shape `(..., 1, r)`, which of its columns to keep.

    Returns:
        Tuple of the basis, `(..., dim, r)`, and `basis_old.T @ basis`.
    """
    Z = ops.matmul(extension.mix, rotation)
    gram = ops.matmul(T(Z), ops.matmul(extension.gram, Z))
    Z = 1.5 * Z - 0.5 * ops.matmul(Z, gram)
    eye = ops.eye(*rotation.shape[-2:], dtype=rotation.dtype)
    Z = ops.where(stay, ops.where(keep, eye, 0.0), Z)
    overlap = ops.matmul(extension.gram[..., : Z.shape[-1], :], Z)
    return ops.matmul(extension.both, Z), overlap


def norm(X, axis):
    """Returns the Euclidean norm over `axis`, with `keepdims=True`."""
    return ops.sqrt(ops.sum(ops.square(X), axis=axis, keepdims=True))


def divide(X, size):
    """Returns `X / size`, and zero where `size` is zero."""
    return ops.where(size > 0, X / ops.where(size > 0, size, 1.0), 0.0)


def truncated_rank(sigma, tolerance, min_rank, max_rank):
    """Chooses the rank from the singular values.

    The smallest `r` with `||sigma[r:]|| <= tolerance * ||sigma||`, clamped to
    `[min_rank, max_rank]`.

    Args:
        sigma: Array of shape `(..., r)`, descending.
        tolerance: Scalar in [0, 1), the share of the norm to discard.
        min_rank: Int array of shape `(..., 1)`.
        max_rank: Int or int array of shape `(..., 1)`, which takes precedence
            over `min_rank`.

    Returns:
        Int array of shape `(..., 1)`.
    """
    energy = ops.square(divide(sigma, sigma[..., :1]))
    tails = ops.sqrt(ops.flip(ops.cumsum(ops.flip(energy, -1), axis=-1), -1))
    # The value of a schedule has the dtype `keras.config.floatx()`.
    tolerance = ops.cast(tolerance, sigma.dtype)
    rank = count(tails > tolerance * tails[..., :1])
    return ops.minimum(ops.maximum(rank, min_rank), max_rank)


def count(mask):
    """Counts the true values along the last axis, with `keepdims=True`."""
    return ops.sum(ops.cast(mask, "int32"), axis=-1, keepdims=True)


def in_turn(x, earlier):
    """Returns `x`, but not before `earlier` has been computed.

    On CPU, jaxlib computes a batch of decompositions on the thread pool that
    also runs the program, and one of these threads waits for the result. As
    many decompositions at once as there are threads therefore deadlock (seen
    with jaxlib 0.10.2 on two cores). This runs them one after the other.
    """
    spoilt = ops.cast(ops.any(ops.isnan(earlier)), x.dtype)
    return x + 1e-30 * spoilt  # adds zero, but no compiler knows


class Augmented(NamedTuple):
    """The point after a step, before truncation, as an SVD.

    The bases `U_hat` and `V_hat`, two `Extension`s, have twice as many columns
    as the buffers. The point is
    `size * U_hat @ P @ diag(sigma) @ (V_hat @ Q).T`, with `sigma` descending.
    `size`, `(..., 1, 1)`, is zero where the point must not move: no gradient,
    or a step that is not `finite`. `longest`, of the same shape, is the length
    of the longest step that the inner optimizer has proposed so far: its norm
    divided by the root of its rank.
    """

    point: Point
    active: object
    U_hat: Extension
    V_hat: Extension
    P: object
    sigma: object
    Q: object
    size: object
    finite: object
    longest: object


def augment(point, change, max_change=None, longest=0.0):
    """Expresses a step in bases that span the old and the new directions.

    The bases are augmented by the directions `U_tilde` and `V_tilde` that the
    K- and L-step found. The core in the augmented bases is

        S_hat = [[S_new,             L_new.T V_tilde],
                 [U_tilde.T K_new,   0              ]]

    Args:
        point: `Point` before the step.
        change: `Unknowns`, the change by the inner step. Columns that are not
            in use are ignored.
        max_change: Array of shape `(..., 1, 1)` or `None`, the bound on the
            Frobenius norm of a step. If the longest step so far, this one
            included, exceeds it when rescaled to the current rank, the step
            is scaled down by that factor.
        longest: Array of shape `(..., 1, 1)` or 0, the length of the longest
            step before this one. Divided by the root of the rank, so that the
            bound does not depend on the initial rank.

    Returns:
        `Augmented`.
    """
    U, S, V = point
    active = active_columns(U)
    known = norm(S, (-2, -1))
    U_hat = extend(U, active, change.K, known)
    V_hat = extend(V, active, in_turn(change.L, U_hat.gain), known)
    counts = ops.logical_and(active[..., None], active[..., None, :])
    step_S = ops.where(counts, change.S, 0.0)
    finite = ops.all(ops.isfinite(step_S), axis=(-2, -1))
    step_S = ops.where(finite[..., None, None], step_S, 0.0)
    for extension in (U_hat, V_hat):
        finite = ops.logical_and(finite, extension.finite)
    step = ops.concatenate(
        [
            ops.concatenate([step_S, T(V_hat.gain)], axis=-1),
            ops.concatenate([U_hat.gain, ops.zeros_like(S)], axis=-1),
        ],
        axis=-2,
    )
    root = ops.sqrt(ops.cast(count(active)[..., None], S.dtype))
    longest = ops.maximum(longest, divide(norm(step, (-2, -1)), root))
    if max_change is not None:
        step = step_scale(max_change, longest, root) * step
    r = S.shape[-1]
    S_hat = step + ops.pad(S, [(0, 0)] * (len(S.shape) - 2) + [(0, r)] * 2)
    size = ops.max(ops.abs(S_hat), axis=(-2, -1), keepdims=True)
    P, sigma, Qt = ops.svd(divide(S_hat, size), full_matrices=False)
    size = ops.where(finite[..., None, None], size, 0.0)
    return Augmented(
        point, active, U_hat, V_hat, P, sigma, T(Qt), size, finite, longest
    )


def step_scale(max_change, longest, root):
    """Returns the factor in (0, 1] by which a bound scales a step.

    Args:
        max_change: Array, the bound on the Frobenius norm of a step.
        longest: Array, the length of the longest step so far.
        root: Array, the root of the rank.
    """
    at_this_rank = root * longest
    share = divide(max_change, at_this_rank)
    return ops.where(at_this_rank > max_change, share, 1.0)


def truncate(augmented, rank):
    """Returns to the manifold: keeps the largest singular values of a step.

    `U = U_hat P`, `S = diag(sigma)`, `V = V_hat Q`, cut to the first columns.
    Without truncation, plain gradient descent gives `W - lr * P(W) G`, where
    `P(W)` projects onto the tangent space.

    Args:
        augmented: `Augmented`, the step.
        rank: Int array of shape `(..., 1)`.

    Returns:
        `Move`. Where the point must not move, only its columns are cut.
    """
    max_rank = augmented.point.S.shape[-1]
    keep = ops.arange(max_rank, dtype="int32") < rank
    columns = keep[..., None, :]
    stay = ops.equal(augmented.size, 0)
    P = ops.where(columns, augmented.P[..., :max_rank], 0.0)
    Q = ops.where(columns, augmented.Q[..., :max_rank], 0.0)
    U, A = turn(augmented.U_hat, P, stay, columns)
    V, B = turn(augmented.V_hat, Q, stay, columns)
    sigma = ops.where(keep, singular_values(augmented), 0.0)
    new = Point(U, diagonal(sigma), V)
    return Move(augmented.point, new, augmented.active, A, B)


def cut(point, rank):
    """Truncates a point without a step.

    Its core is diagonal and descending, so truncation only drops columns and
    rotates nothing.

    Args:
        point: `Point`.
        rank: Int array of shape `(..., 1)`.

    Returns:
        `Move`.
    """
    keep = ops.arange(point.S.shape[-1], dtype="int32") < rank
    new = Point(*(ops.where(keep[..., None, :], x, 0.0) for x in point))
    A = diagonal(ops.cast(keep, point.S.dtype))
    return Move(point, new, active_columns(point.U), A, A)


def singular_values(augmented):
    """Returns the singular values after a step, `(..., r)`, untruncated."""
    before = core_values(augmented.point)
    size = augmented.size[..., 0]
    after = augmented.sigma[..., : before.shape[-1]] * size
    return ops.where(size > 0, after, before)


def wanted_rank(augmented, tolerance, min_rank):
    """Returns the rank that `tolerance` asks for after a step.

    Args:
        augmented: `Augmented`, the step.
        tolerance: Scalar in [0, 1), share of the norm that may be cut.
        min_rank: Int array of shape `(..., 1)`.

    Returns:
        Int array of shape `(..., 1)`. Where the point must not move, the
        number of columns in use.
    """
    possible = usable_columns(augmented)
    rank = truncated_rank(augmented.sigma, tolerance, min_rank, possible)
    stay = ops.equal(augmented.size[..., 0], 0)
    return ops.where(stay, count(augmented.active), rank)


def usable_columns(augmented):
    """Counts the leading singular vectors that can become basis columns.

    The augmented bases have zero columns, and singular vectors whose values
    are zero or rounding noise may point there. A small value alone is no
    reason to drop a direction: in its first step the value is of second order,
    the product of what the K- and the L-step found.

    Args:
        augmented: `Augmented`, the step.

    Returns:
        Int array of shape `(..., 1)`, at most `r`.
    """
    outside = 0.0
    for extension, vectors in (
        (augmented.U_hat, augmented.P),
        (augmented.V_hat, augmented.Q),
    ):
        squares = ops.square(vectors)
        zero = ops.logical_not(extension.used)[..., None]
        lost = ops.sum(ops.where(zero, squares, 0.0), axis=-2)
        outside = ops.maximum(outside, lost)
    max_rank = augmented.active.shape[-1]
    spoilt = ops.cumsum(ops.cast(outside > 1e-3, "int32"), axis=-1)
    return count(spoilt[..., :max_rank] < 1)


def wanted_rank_at_rest(point, tolerance, min_rank):
    """Returns the rank that `tolerance` asks for, without a step.

    Like `wanted_rank`, for the singular values of the point itself.
    """
    sigma = core_values(point)
    in_use = count(active_columns(point.U))
    rank = truncated_rank(sigma, tolerance, min_rank, in_use)
    return ops.where(sigma[..., :1] > 0, rank, in_use)


def discarded_share(sigma, rank):
    """Returns the share of the norm that a truncation discards.

    Args:
        sigma: Array of shape `(..., r)`.
        rank: Int array of shape `(..., 1)`.

    Returns:
        Array of shape `(...)`, in [0, 1].
    """
    beyond = ops.arange(sigma.shape[-1], dtype="int32") >= rank
    tail = norm(ops.where(beyond, sigma, 0.0), -1)
    return divide(tail, norm(sigma, -1))[..., 0]


def discarded_in_step(augmented, rank):
    """Like `discarded_share`, for a step that is truncated to a rank."""
    stay = ops.equal(augmented.size[..., 0, 0], 0)
    at_rest = discarded_share(core_values(augmented.point), rank)
    return ops.where(stay, at_rest, discarded_share(augmented.sigma, rank))


def choose(mask, these, those):
    """Selects `these` arrays where a mask is true, `those` elsewhere.

    Args:
        mask: Bool array with the shape of the leading axes of the others.
        these: Tuple of arrays.
        those: Tuple of arrays of the same shapes.

    Returns:
        Tuple like `these`.
    """

    def select(x, y):
        inner = len(x.shape) - len(mask.shape)
        return ops.where(mask[(..., *[None] * inner)], x, y)

    return type(these)(*map(select, these, those))
