"""The geometric step: advance in the tangent space, augment, truncate.

Pure functions of arrays. Every function is batched: `...` stands for any
leading axes, in practice one axis over the layers of equal shape, so that the
number of operations does not grow with the number of layers.

| name | shape                    | invariant                                |
| ---- | ------------------------ | ---------------------------------------- |
| `U`  | (..., input_dim, r_max)  | first `rank` columns orthonormal         |
| `V`  | (..., output_dim, r_max) | as `U`                                   |
| `S`  | (..., r_max, r_max)      | diagonal, nonnegative, after a retraction |
| `P`  | as `U`                   | orthogonal to `U`, zero after a retraction |
| `Q`  | as `V`                   | orthogonal to `V`, zero after a retraction |

The update is `U S V.T + P V.T + U Q.T`. Between two retractions the bases `U`
and `V` stay, and steps change `P`, `S` and `Q`, in which the update is linear:
they move in the tangent space at the last retraction. A retraction returns to
the manifold of matrices of low rank.

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

from keras_geolora.geometry.decompositions import eigh, svd

# Values below `ROUNDING` times the largest one are float32 rounding noise: a
# few units in the last place, accumulated over a small matrix.
ROUNDING = 2e-6


class Point(NamedTuple):
    """A point on the manifold of low-rank matrices, `U @ S @ V.T`."""

    U: object
    S: object
    V: object


class Block(NamedTuple):
    """The factors of an update between two retractions.

    The update is `U @ S @ V.T + P @ V.T + U @ Q.T`.
    """

    U: object
    S: object
    V: object
    P: object
    Q: object


class Unknowns(NamedTuple):
    """What the inner optimizer updates.

    In full, `K = U S + P`, `S` and `L = V S.T + Q`. Also holds a tangent vector
    `M`, such as a gradient or a first moment, as its products `M V`, `U.T M V`
    and `M.T U`.
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


def lift(block, in_full=True):
    """Returns the unknowns of the inner optimizer.

    Args:
        block: `Block`.
        in_full: Bool, whether the values matter to the inner optimizer.
            Otherwise `P` and `Q` take the place of `K` and `L`: the gradients
            are the same, and weight decay of `P`, `S` and `Q` is that of the
            update, too. This saves two products.

    Returns:
        `Unknowns`.
    """
    U, S, V, P, Q = block
    if not in_full:
        return Unknowns(P, S, Q)
    return Unknowns(ops.matmul(U, S) + P, S, ops.matmul(V, T(S)) + Q)


def advance(block, change, moving, max_change=None, longest=None):
    """Takes a step in the tangent space.

    Args:
        block: `Block` before the step.
        change: `Unknowns`, the change by the inner step. Columns that are not
            in use stay zero.
        moving: Bool array `(...)`, false where nothing is to move.
        max_change: Array `(...)` or `None`, the bound on the Frobenius norm of
            a step. If the longest step so far, this one included, exceeds it
            when rescaled to the current rank, the step is scaled down by that
            factor.
        longest: Array `(...)` or `None`, the length of the longest step before
            this one: its norm divided by the root of the rank at that time, so
            that the bound does not depend on the initial rank.

    Returns:
        Tuple of the `Block` after the step, `longest` with this step, and a
        bool array `(...)`, whether the step was finite. Where it was not, or
        nothing is to move, the block and `longest` are as before.
    """
    U, S, V, P, Q = block
    active = active_columns(U)
    in_use = ops.cast(active, S.dtype)
    inside_K, inside_L = (
        ops.matmul(T(basis), x) for basis, x in ((U, change.K), (V, change.L))
    )
    scale = in_use
    if max_change is None:
        finite = all_finite(change)
        moving = ops.logical_and(moving, finite)
    else:
        squares = [column_squares(x) for x in (change.K, change.L)]
        squares += [-column_squares(x) for x in (inside_K, inside_L)]
        squares += [column_squares(in_use[..., None] * change.S)]
        squares = ops.sum(in_use * sum(squares), axis=-1)
        finite = ops.isfinite(squares)
        moving = ops.logical_and(moving, finite)
        # Rounding may make the norm of a step within the bases negative.
        squares = ops.maximum(squares, 0.0)
        root = ops.sqrt(ops.sum(in_use, axis=-1))
        length = divide(ops.sqrt(squares), root)
        longest = ops.where(moving, ops.maximum(longest, length), longest)
        scale = step_scale(max_change, longest, root)[..., None] * in_use
    scale = scale[..., None, :]
    after = [
        P + scale * change.K - ops.matmul(U, scale * inside_K),
        S + scale * (in_use[..., None] * change.S),
        Q + scale * change.L - ops.matmul(V, scale * inside_L),
    ]
    P, S, Q = choose(moving, after, (P, S, Q))
    return Block(U, S, V, P, Q), longest, finite


def column_squares(X):
    """Returns the sums of squares of columns, `(..., r)`."""
    return ops.sum(ops.square(X), axis=-2)


def all_finite(arrays):
    """Says for each leading index whether all numbers of arrays are finite."""
    sums = [ops.sum(x, axis=(-2, -1)) for x in arrays]
    return ops.all(ops.isfinite(ops.stack(sums)), axis=0)


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
    | `gain`  | (..., r, r)     | new directions, transposed, times `P`      |
    | `found` | (...)           | whether these are numbers                  |
    """

    both: object
    gram: object
    mix: object
    used: object
    gain: object
    found: object


def extend(basis, active, beyond, known):
    """Finds an orthonormal basis of the directions that steps added.

    They span the range of `(I - basis basis.T) beyond`. Directions that are
    rounding noise, or missing because the residual is rank-deficient, become
    zero columns: orthonormalising them would give arbitrary columns that
    overlap `basis`.

    Two passes use the Gram matrix of the residual. The first separates the
    directions. The second, with columns scaled to unit length, makes them
    orthonormal to each other and to `basis`, so that small directions are as
    accurate as large ones.

    Args:
        basis: Array of shape `(..., dim, r)`, columns orthonormal or zero.
        active: Bool array of shape `(..., r)`, which columns are in use.
        beyond: Array of shape `(..., dim, r)`, `P` or `Q`.
        known: Array of shape `(..., 1, 1)`, the norm of `S`: anything small
            relative to it is rounding noise.

    Returns:
        `Extension`.
    """
    r = basis.shape[-1]
    # Scaling avoids underflow and overflow of the squares.
    sizes = ops.mean(ops.abs(beyond), axis=-2, keepdims=True)
    size = ops.sum(sizes, axis=-1, keepdims=True)
    X = beyond * divide(1.0, size)
    inside = ops.matmul(T(basis), X)
    residual = X - ops.matmul(basis, inside)
    _, Q = eigh(ops.matmul(T(residual), residual))
    extra = ops.matmul(residual, Q)
    both = ops.concatenate([basis, extra], axis=-1)
    gram = ops.matmul(T(both), both)

    lengths = ops.sqrt(ops.diagonal(gram, axis1=-2, axis2=-1))[..., r:]
    noise = ROUNDING * (norm(X, (-2, -1)) + known * divide(1.0, size))
    lengths = ops.where(lengths > noise[..., 0], lengths, 0.0)
    unit = divide(1.0, lengths)[..., None, :]
    overlap = gram[..., :r, r:] * unit
    apart = T(unit) * gram[..., r:, r:] * unit - ops.matmul(T(overlap), overlap)
    eigenvalues, Q = eigh(apart)
    found = ops.isfinite(ops.sum(eigenvalues, axis=-1) + ops.sum(Q, (-2, -1)))
    # A unit column that is almost in the span of the others is noise as well.
    used = ops.concatenate([active, eigenvalues > 1e-2], axis=-1)
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
    return Extension(both, gram, mix, used, gain * size, found)


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
    """A block, before truncation, as an SVD.

    The bases `U_hat` and `V_hat`, two `Extension`s, have twice as many columns
    as the buffers. The update is
    `size * U_hat @ P @ diag(sigma) @ (V_hat @ Q).T`, with `sigma` descending.
    `size`, `(..., 1, 1)`, is zero where the block is at rest, a point on the
    manifold, which must not move. `found`, `(...)`, is false where a
    decomposition failed, and nothing else is valid.
    """

    block: Block
    active: object
    U_hat: Extension
    V_hat: Extension
    P: object
    sigma: object
    Q: object
    size: object
    found: object


def augment(block):
    """Expresses a block in bases that span the old and the new directions.

    The bases are augmented by the directions `U_tilde` and `V_tilde` of `P` and
    `Q`. The core in the augmented bases is

        S_hat = [[S,              Q.T V_tilde],
                 [U_tilde.T P,    0          ]]

    Args:
        block: `Block`.

    Returns:
        `Augmented`.
    """
    U, S, V, P, Q = block
    active = active_columns(U)
    known = norm(S, (-2, -1))
    U_hat = extend(U, active, P, known)
    V_hat = extend(V, active, in_turn(Q, U_hat.gain), known)
    S_hat = ops.concatenate(
        [
            ops.concatenate([S, T(V_hat.gain)], axis=-1),
            ops.concatenate([U_hat.gain, ops.zeros_like(S)], axis=-1),
        ],
        axis=-2,
    )
    size = ops.max(ops.abs(S_hat), axis=(-2, -1), keepdims=True)
    left, sigma, right = svd(divide(S_hat, size))
    size = ops.where(at_rest(block)[..., None, None], 0.0, size)
    values = ops.sum(sigma, axis=-1) + ops.sum(left + right, axis=(-2, -1))
    found = ops.stack([U_hat.found, V_hat.found, ops.isfinite(values)])
    found = ops.all(found, axis=0)
    right = T(right)
    return Augmented(
        block, active, U_hat, V_hat, left, sigma, right, size, found
    )


def at_rest(block):
    """Says which blocks are points on the manifold, `(...)`.

    There `P` and `Q` are zero, and `S` is diagonal.
    """
    _, S, _, P, Q = block
    beside = S * (1.0 - ops.eye(S.shape[-1], dtype=S.dtype))
    moved = [
        ops.any(ops.not_equal(x, 0), axis=(-2, -1)) for x in (beside, P, Q)
    ]
    return ops.logical_not(ops.any(ops.stack(moved), axis=0))


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
    """Returns to the manifold: keeps the largest singular values.

    `U = U_hat P`, `S = diag(sigma)`, `V = V_hat Q`, cut to the first columns.
    Without truncation, plain gradient descent gives `W - lr * P(W) G`, where
    `P(W)` projects onto the tangent space.

    Args:
        augmented: `Augmented`.
        rank: Int array of shape `(..., 1)`.

    Returns:
        `Move`. Where the block is at rest, only its columns are cut.
    """
    U, S, V, *_ = augmented.block
    max_rank = S.shape[-1]
    keep = ops.arange(max_rank, dtype="int32") < rank
    columns = keep[..., None, :]
    stay = ops.equal(augmented.size, 0)
    P = ops.where(columns, augmented.P[..., :max_rank], 0.0)
    Q = ops.where(columns, augmented.Q[..., :max_rank], 0.0)
    new_U, A = turn(augmented.U_hat, P, stay, columns)
    new_V, B = turn(augmented.V_hat, Q, stay, columns)
    sigma = ops.where(keep, singular_values(augmented), 0.0)
    new = Point(new_U, diagonal(sigma), new_V)
    return Move(Point(U, S, V), new, augmented.active, A, B)


def singular_values(augmented):
    """Returns the largest singular values, `(..., r)`, descending."""
    before = core_values(augmented.block)
    size = augmented.size[..., 0]
    after = augmented.sigma[..., : before.shape[-1]] * size
    return ops.where(size > 0, after, before)


def wanted_rank(augmented, tolerance, min_rank):
    """Returns the rank that `tolerance` asks for.

    Args:
        augmented: `Augmented`.
        tolerance: Scalar in [0, 1), share of the norm that may be cut.
        min_rank: Int array of shape `(..., 1)`.

    Returns:
        Int array of shape `(..., 1)`. Where the update is zero, the number of
        columns in use.
    """
    in_use = count(augmented.active)
    stay = ops.equal(augmented.size[..., 0], 0)
    possible = ops.where(stay, in_use, usable_columns(augmented))
    sigma = all_values(augmented)
    rank = truncated_rank(sigma, tolerance, min_rank, possible)
    return ops.where(sigma[..., :1] > 0, rank, in_use)


def all_values(augmented):
    """Returns all singular values, `(..., 2 r)`, relative to `size`.

    Where the block is at rest, they are its own.
    """
    at_rest = core_values(augmented.block)
    at_rest = ops.concatenate([at_rest, ops.zeros_like(at_rest)], axis=-1)
    stay = ops.equal(augmented.size[..., 0], 0)
    return ops.where(stay, at_rest, augmented.sigma)


def usable_columns(augmented):
    """Counts the leading singular vectors that can become basis columns.

    The augmented bases have zero columns, and singular vectors whose values
    are zero or rounding noise may point there. A small value alone is no
    reason to drop a direction: in its first step the value is of second order,
    the product of what the K- and the L-step found.

    Args:
        augmented: `Augmented`.

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


def discarded_share(augmented, rank):
    """Returns the share of the norm that a truncation discards.

    Args:
        augmented: `Augmented`.
        rank: Int array of shape `(..., 1)`.

    Returns:
        Array of shape `(...)`, in [0, 1].
    """
    sigma = all_values(augmented)
    beyond = ops.arange(sigma.shape[-1], dtype="int32") >= rank
    tail = norm(ops.where(beyond, sigma, 0.0), -1)
    return divide(tail, norm(sigma, -1))[..., 0]


def choose(mask, these, those):
    """Selects `these` arrays where a mask is true, `those` elsewhere.

    Args:
        mask: Bool array with the shape of the leading axes of the others.
        these: Tuple of arrays.
        those: Tuple of arrays of the same shapes, or of numbers.

    Returns:
        Tuple like `these`, or `these` itself if the mask is known to be true
        everywhere.
    """
    if holds_everywhere(mask):
        return these

    def select(x, y):
        inner = len(x.shape) - len(mask.shape)
        return ops.where(mask[(..., *[None] * inner)], x, y)

    found = map(select, these, those)
    return type(these)(*found) if hasattr(these, "_fields") else list(found)


def holds_everywhere(mask):
    """Returns whether a mask is known, outside of a trace, and all true."""
    try:  # a NumPy array is known in a trace, too
        return bool(mask.all() if hasattr(mask, "all") else ops.all(mask))
    except TypeError:  # of TensorFlow and, as a subclass, of JAX
        return False
