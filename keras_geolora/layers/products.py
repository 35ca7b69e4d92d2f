"""Products with an update, and their gradients.

An update is given by its factors, the tuple `U, S, V, P, Q`:

| name   | shape                  |
| ------ | ---------------------- |
| `U`    | (input_dim, max_rank)  |
| `S`    | (max_rank, max_rank)   |
| `V`    | (output_dim, max_rank) |
| `P`    | as `U`                 |
| `Q`    | as `V`                 |

It is `scale * (U @ S @ V.T + P @ V.T + U @ Q.T)`. The terms with `P` and `Q`
are zero except between two retractions; an adapter that trains no more has
only `U`, `S` and `V`. The gradients are those of the geometric step: for `U`,
`S` and `V` those for `K = U S + P`, `S` and `L = V S.T + Q`, which are those of
`P` and `Q`, too.

The factors of several matrices have one more axis, the first. They have a
`low_rank_matrix`, and no product with inputs.
"""

import keras
from keras import ops

from keras_geolora.geometry.integrator import T

# The highest order of derivatives of a product on JAX.
ORDERS = 6


def with_gradients(forward, backward, *inputs, factors, order=1):
    """Computes `forward(*inputs)`, with gradients given by `backward`.

    The gradients can be differentiated again, as for a loss that contains
    derivatives of a model, because `backward` consists of such functions. For
    second derivatives JAX differentiates the operations of the *forward* pass,
    so there the forward pass is such a function, too, up to `ORDERS` times; one
    more raises an error.

    Args:
        forward: Function of the inputs that returns the output and an
            intermediate result to keep.
        backward: Function `(g, kept, *inputs)` that returns the gradients for
            the inputs, given `g`, that for the output. `kept` may be `None`,
            and is a constant on torch.
        *inputs: Tensors.
        factors: Tuple of the factors, further inputs.
        order: Int, the order of the derivative.
    """
    nested = keras.backend.backend() == "jax"
    number = len(inputs)

    @ops.custom_gradient
    def function(*inputs):
        def gradients(*args, upstream=None):
            return backward(
                args[0] if upstream is None else upstream, kept, *inputs
            )

        if nested and order < ORDERS:
            y, kept = (
                with_gradients(
                    forward,
                    backward,
                    *inputs[:number],
                    factors=inputs[number:],
                    order=order + 1,
                ),
                None,
            )
        elif nested:
            last = last_derivative(*inputs[number:])
            y, kept = forward(*inputs[:number], *last)
        else:
            y, kept = forward(*inputs)
        return y, gradients

    return function(*inputs, *factors)


@ops.custom_gradient
def last_derivative(*factors):
    """Returns the factors, which cannot be differentiated any more."""

    def gradients(*args, upstream=None):
        raise NotImplementedError(
            "On JAX, derivatives through the factors of an adapter are "
            f"limited to order {ORDERS} in training. Call the layer with "
            "`training=False`, which supports derivatives of any order with "
            "respect to its inputs. Received: a derivative of order "
            f"{ORDERS + 1}"
        )

    return factors, gradients


def transposed(U, S, V, *beyond):
    """Returns the factors of the transpose of an update."""
    *each, row, column = range(len(S.shape))
    # Not `T`, which the variables of TensorFlow do not accept.
    return V, ops.transpose(S, (*each, column, row)), U, *reversed(beyond)


def wide_factors(U, S, V, *beyond):
    """Returns `A` and `B`, so that `A @ B.T` is the update, unscaled."""
    A = ops.matmul(U, S)
    if not beyond:
        return A, V
    P, Q = beyond
    A = ops.concatenate([ops.add(A, P), U], axis=-1)
    return A, ops.concatenate([V, Q], axis=-1)


def low_rank_product(x, factors, scale, xU=None):
    """Computes the product of `x` with an update.

    Args:
        x: Tensor of shape `(batch, input_dim)`.
        factors: Tuple of tensors.
        scale: Float.
        xU: Tensor `x @ U`, if known. Defaults to `None`.

    Returns:
        Tensor of shape `(batch, output_dim)`, with the dtype of `x`. Its
        gradient for `x` is exact; the factors get the geometric ones. All can
        be differentiated again.
    """
    dtype, known = x.dtype, xU

    def forward(x, U, S, V, *beyond):
        xU = times_basis(x, U) if known is None else known
        left, right = ops.matmul(xU, ops.cast(S * scale, dtype)), V
        if beyond:
            P, Q = (y * scale for y in beyond)
            left = ops.add(left, ops.matmul(x, ops.cast(P, dtype)))
            left = ops.concatenate([left, xU], axis=1)
            right = ops.concatenate([V, Q], axis=1)
        return ops.matmul(left, ops.transpose(ops.cast(right, dtype))), xU

    def backward(g, xU, x, *factors):
        U, _, V, *_ = factors
        gV = times_basis(g, V)
        grads = factor_gradients(x, g, factors, scale, xU, gV)
        # On JAX the function may use nothing but its arguments.
        again = None if keras.backend.backend() == "jax" else gV
        grad_x = low_rank_product(g, transposed(*factors), scale, xU=again)
        return grad_x, *grads

    return with_gradients(forward, backward, x, factors=factors)


def sparse_product(x, factors, scale):
    """Computes `low_rank_product` for a sparse `x`.

    Custom gradients do not accept sparse inputs. Here the ordinary gradients
    are the geometric ones, because `U` and `V` enter as changes of `K` and `L`,
    with value zero. This costs two more thin products.

    Args:
        x: Sparse tensor of shape `(..., input_dim)`, or any tensor.
        factors: Tuple of tensors.
        scale: Float.
    """
    U, S, V, *beyond = factors
    P, Q = U - ops.stop_gradient(U), V - ops.stop_gradient(V)
    if beyond:
        P, Q = P + beyond[0], Q + beyond[1]
    P, S, Q = (ops.cast(y * scale, x.dtype) for y in (P, S, Q))
    xU = times_basis(x, U)
    z = ops.add(ops.matmul(xU, S), ops.matmul(x, P))
    V = ops.transpose(ops.stop_gradient(ops.cast(V, x.dtype)))
    return ops.add(ops.matmul(z, V), ops.matmul(xU, ops.transpose(Q)))


def is_sparse(x):
    """Returns whether a tensor is a sparse one of TensorFlow or JAX."""
    return keras.backend.backend() != "torch" and hasattr(x, "indices")


def factor_gradients(x, g, factors, scale, xU=None, gV=None):
    """Returns the gradients of `sum(g * (x @ update))` for the factors.

    They treat the bases as constants, the coordinates of the tangent space.

    Args:
        x: Tensor of shape `(batch, input_dim)`.
        g: Tensor of shape `(batch, output_dim)`.
        factors: Tuple of tensors.
        scale: Float.
        xU: Tensor `x @ U`, if known. Defaults to `None`.
        gV: Tensor `g @ V`, if known. Defaults to `None`.
    """
    U, _, V, *_ = factors
    grad_K = tall_product(x, times_basis(g, V) if gV is None else gV)
    # Torch kept a constant, which cannot be differentiated.
    if xU is None or getattr(grad_K, "requires_grad", False):
        xU = times_basis(x, U)
    grad_L = ops.cast(tall_product(g, xU), U.dtype) * scale
    return geometric(ops.cast(grad_K, U.dtype) * scale, grad_L, factors)


def geometric(grad_K, grad_L, factors):
    """Returns the gradients of all factors, given those of `K` and `L`."""
    U, _, _, *beyond = factors
    basis = T(ops.stop_gradient(U))
    gradients = grad_K, ops.matmul(basis, grad_K), grad_L
    if not beyond:
        return gradients
    if keras.backend.backend() == "torch":  # P and Q are not trainable there
        return *gradients, None, None
    return *gradients, grad_K, grad_L


def nothing(x):
    """Returns the gradient of a constant.

    Compilers drop these zeros; torch has no compiler and gets none.
    """
    return None if keras.backend.backend() == "torch" else ops.zeros_like(x)


def times_basis(x, basis):
    """Computes `x @ basis` in the dtype of `x`, for a constant basis."""
    return ops.matmul(x, ops.stop_gradient(ops.cast(basis, x.dtype)))


def tall_product(x, y):
    """Computes `x.T @ y`, where `y` has few columns."""
    if keras.backend.backend() == "torch":  # faster in this order
        return ops.transpose(ops.matmul(ops.transpose(y), x))
    return ops.matmul(ops.transpose(x), y)


def merged_product(x, kernel, factors, scale, transpose=False):
    """Computes the product of `x` with a frozen kernel plus an update.

    Args:
        x: Tensor of shape `(batch, input_dim)`, or `(batch, output_dim)` if
            transposed.
        kernel: Tensor of shape `(input_dim, output_dim)`, a constant.
        factors: Tuple of tensors.
        scale: Float.
        transpose: Bool, whether to multiply by the transpose of the sum.
            Defaults to `False`.

    Returns:
        Tensor of shape `(batch, output_dim)`, or `(batch, input_dim)` if
        transposed. Its gradients are those of `low_rank_product` plus the
        product with the kernel.
    """

    def forward(x, kernel, *factors):
        merged = kernel + product_of_factors(factors, scale)
        return ops.matmul(
            x, ops.transpose(merged) if transpose else merged
        ), None

    def backward(g, _, x, kernel, *factors):
        # Forms the sum again: keeping all sums would take as much memory as the
        # model.
        grad_x = merged_product(g, kernel, factors, scale, not transpose)
        rows, columns = (g, x) if transpose else (x, g)
        grads = factor_gradients(rows, columns, factors, scale)
        return grad_x, nothing(kernel), *grads

    return with_gradients(forward, backward, x, kernel, factors=factors)


def is_known(training):
    """Returns whether the value of a layer's argument `training` is known.

    Under `keras.RematScope` it may be a bool traced by JAX.
    """
    return training is None or isinstance(training, (bool, int))


def may_train(training):
    """Returns a layer's argument `training`, or `True` if it is unknown."""
    return bool(training) if is_known(training) else True


def merging_pays(rows, input_dim, output_dim, columns=None):
    """Returns whether `merged_product` is likely faster than two products.

    A separate low-rank product processes all rows of inputs and outputs once
    more, the sum all entries of the kernel. On torch the sum takes new memory
    every time, however many columns the factors have.
    `benchmarks/train_step.py --form` compares the two.

    Args:
        rows: Number of inputs, infinite if unknown.
        input_dim: Int.
        output_dim: Int.
        columns: Int, those of a factor, in training. Defaults to `None`,
            elsewhere: compaction must not change a prediction, to the last bit.
    """
    price = 1
    if keras.backend.backend() == "torch":
        price = 4 if columns is None else 4 / 3 + 20 / columns
    return rows * (input_dim + output_dim) >= price * input_dim * output_dim


def one_product_pays():
    """Returns whether a product costs little beside starting an operation.

    Torch starts every operation by itself. For one row at a time that takes
    longer than two thin products (`benchmarks/generation.py`).
    """
    return keras.backend.backend() == "torch"


def low_rank_rows(ids, factors, scale, dtype):
    """Computes rows of an update, with the geometric gradients.

    Args:
        ids: Int tensor of shape `(batch,)`, the rows, below 2**24.
        factors: Tuple of tensors.
        scale: Float.
        dtype: String, the dtype to compute in.

    Returns:
        Tensor of shape `(batch, output_dim)`. Its gradients are those of
        `low_rank_product` for one-hot inputs, which are never formed.
    """
    input_dim = factors[0].shape[0]
    if input_dim > 2**24:
        raise ValueError(
            "An adapter can select rows only from a matrix with at most 2**24 "
            f"rows. Received: {input_dim} rows"
        )

    # JAX cannot close over the ids inside a branch of `cond`, and has no
    # gradient for integers: they are passed as floats, exact below 2**24.
    def forward(numbers, U, S, V, *beyond):
        rows_of_U = rows_of(U, numbers)
        left, right = ops.matmul(rows_of_U, ops.cast(S * scale, dtype)), V
        if beyond:
            P, Q = (x * scale for x in beyond)
            left = ops.add(left, rows_of(P, numbers))
            left = ops.concatenate([left, rows_of_U], axis=1)
            right = ops.concatenate([V, Q], axis=1)
        y = ops.matmul(left, ops.transpose(ops.cast(right, dtype)))
        return y, rows_of_U

    def backward(g, rows_of_U, numbers, *factors):
        U, _, V, *_ = factors
        if rows_of_U is None:
            rows_of_U = rows_of(U, numbers)
        gV = ops.cast(times_basis(g, V), U.dtype)
        ids = ops.cast(numbers, "int32")
        grad_K = ops.segment_sum(gV, ids, num_segments=U.shape[0]) * scale
        grad_L = ops.cast(tall_product(g, rows_of_U), U.dtype) * scale
        return ops.zeros_like(numbers), *geometric(grad_K, grad_L, factors)

    def rows_of(U, numbers):
        ids = ops.cast(numbers, "int32")
        rows = ops.take(ops.stop_gradient(U), ids, axis=0)
        return ops.cast(rows, dtype)

    numbers = ops.cast(ids, "float32")
    return with_gradients(forward, backward, numbers, factors=factors)


def thin_factors(factors, scale):
    """Computes factors of an update, with the geometric gradients.

    Unlike `low_rank_product` this has no part in derivatives for the inputs of
    a layer, which are of any kind and order therefore.

    Args:
        factors: Tuple of tensors, with `P` and `Q`.
        scale: Float.

    Returns:
        Tensors `A` and `B` of shape `(input_dim, 2 * max_rank)` and
        `(output_dim, 2 * max_rank)`; the update is `A @ B.T`.
    """
    input_dim, max_rank = factors[0].shape

    def forward(*factors):
        A, B = wide_factors(*factors)
        return ops.concatenate([A * scale, B]), None

    def backward(G, _, *factors):
        # The first half of A has K as a factor, the second half of B has L.
        grad_K = G[:input_dim, :max_rank] * scale
        return geometric(grad_K, G[input_dim:, max_rank:], factors)

    both = with_gradients(forward, backward, factors=factors)
    return both[:input_dim], both[input_dim:]


def low_rank_matrix(factors, scale):
    """Computes the matrix of an update, with the geometric gradients.

    Args:
        factors: Tuple of tensors.
        scale: Float.

    Returns:
        Tensor of shape `(input_dim, output_dim)`, or `(count, input_dim,
        output_dim)` for the factors of several matrices.
    """

    def forward(*factors):
        return product_of_factors(factors, scale), None

    def backward(G, _, *factors):
        U, _, V, *_ = factors
        grad_K = times_basis(G, V) * scale
        grad_L = times_basis(T(G), U) * scale
        return geometric(grad_K, grad_L, factors)

    return with_gradients(forward, backward, factors=factors)


def product_of_factors(factors, scale):
    """Computes the matrix of an update, without custom gradients."""
    A, B = wide_factors(*factors)
    return ops.matmul(A * scale, T(B))
