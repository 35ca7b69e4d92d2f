"""Products with an update, and their gradients."""

import keras
from keras import ops

# The highest order of derivatives of a product on JAX.
ORDERS = 6


def with_gradients(forward, backward, *inputs, order=1):
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
        *inputs: Tensors, of which the last three are `U`, `S` and `V`.
        order: Int, the order of the derivative.
    """
    nested = keras.backend.backend() == "jax"

    @ops.custom_gradient
    def function(*inputs):
        def gradients(*args, upstream=None):
            return backward(
                args[0] if upstream is None else upstream, kept, *inputs
            )

        if nested and order < ORDERS:
            again = with_gradients(forward, backward, *inputs, order=order + 1)
            y, kept = again, None
        elif nested:
            *others, U, S, V = inputs
            y, kept = forward(*others, *last_derivative(U, S, V))
        else:
            y, kept = forward(*inputs)
        return y, gradients

    return function(*inputs)


@ops.custom_gradient
def last_derivative(U, S, V):
    """Returns the factors, which cannot be differentiated any more."""

    def gradients(*args, upstream=None):
        raise NotImplementedError(
            "On JAX, derivatives through the factors of an adapter are "
            f"limited to order {ORDERS} in training. Call the layer with "
            "`training=False`, which supports derivatives of any order with "
            "respect to its inputs. Received: a derivative of order "
            f"{ORDERS + 1}"
        )

    return (U, S, V), gradients


def low_rank_product(x, U, S, V, scale, xU=None):
    """Computes `scale * x @ U @ S @ V.T`, with the geometric gradients.

    Args:
        x: Tensor of shape `(batch, input_dim)`.
        U: Tensor of shape `(input_dim, max_rank)`.
        S: Tensor of shape `(max_rank, max_rank)`.
        V: Tensor of shape `(output_dim, max_rank)`.
        scale: Float.
        xU: Tensor `x @ U`, if known. Defaults to `None`.

    Returns:
        Tensor of shape `(batch, output_dim)`, with the dtype of `x`. Its
        gradient for `x` is exact; `U`, `S` and `V` get those for `K = U S`, `S`
        and `L = V S.T`. All can be differentiated again.
    """
    dtype, known = x.dtype, xU

    def forward(x, U, S, V):
        xU = times_basis(x, U) if known is None else known
        xUS = ops.matmul(xU, ops.cast(S * scale, dtype))
        return ops.matmul(xUS, ops.transpose(ops.cast(V, dtype))), xU

    def backward(g, xU, x, U, S, V):
        gV = times_basis(g, V)
        grads = factor_gradients(x, g, U, V, scale, xU, gV)
        # On JAX the function may use nothing but its arguments.
        again = None if keras.backend.backend() == "jax" else gV
        St = ops.transpose(S)
        return low_rank_product(g, V, St, U, scale, xU=again), *grads

    return with_gradients(forward, backward, x, U, S, V)


def sparse_product(x, U, S, V, scale):
    """Computes `low_rank_product` for a sparse `x`.

    Custom gradients do not accept sparse inputs. Here the ordinary gradients
    are the geometric ones, because `U` and `V` enter as changes of `K` and `L`,
    with value zero. This costs two more thin products.

    Args:
        x: Sparse tensor of shape `(..., input_dim)`, or any tensor.
        U: Tensor of shape `(input_dim, max_rank)`.
        S: Tensor of shape `(max_rank, max_rank)`.
        V: Tensor of shape `(output_dim, max_rank)`.
        scale: Float.
    """
    dK, dL = U - ops.stop_gradient(U), V - ops.stop_gradient(V)
    dK, S, dL = (ops.cast(y * scale, x.dtype) for y in (dK, S, dL))
    xU = times_basis(x, U)
    z = ops.add(ops.matmul(xU, S), ops.matmul(x, dK))
    V = ops.transpose(ops.stop_gradient(ops.cast(V, x.dtype)))
    return ops.add(ops.matmul(z, V), ops.matmul(xU, ops.transpose(dL)))


def is_sparse(x):
    """Returns whether a tensor is a sparse one of TensorFlow or JAX."""
    return keras.backend.backend() != "torch" and hasattr(x, "indices")


def factor_gradients(x, g, U, V, scale, xU=None, gV=None):
    """Returns the gradients of `sum(g * (x @ delta))` for `K`, `S` and `L`.

    They treat the bases as constants, the coordinates of the tangent space.

    Args:
        x: Tensor of shape `(batch, input_dim)`.
        g: Tensor of shape `(batch, output_dim)`.
        U: Tensor of shape `(input_dim, max_rank)`.
        V: Tensor of shape `(output_dim, max_rank)`.
        scale: Float.
        xU: Tensor `x @ U`, if known. Defaults to `None`.
        gV: Tensor `g @ V`, if known. Defaults to `None`.
    """
    grad_K = tall_product(x, times_basis(g, V) if gV is None else gV)
    # Torch kept a constant, which cannot be differentiated.
    if xU is None or getattr(grad_K, "requires_grad", False):
        xU = times_basis(x, U)
    grad_L = ops.cast(tall_product(g, xU), U.dtype) * scale
    grad_K = ops.cast(grad_K, U.dtype) * scale
    basis = ops.transpose(ops.stop_gradient(U))
    return grad_K, ops.matmul(basis, grad_K), grad_L


def times_basis(x, basis):
    """Computes `x @ basis` in the dtype of `x`, for a constant basis."""
    return ops.matmul(x, ops.stop_gradient(ops.cast(basis, x.dtype)))


def tall_product(x, y):
    """Computes `x.T @ y`, where `y` has few columns."""
    if keras.backend.backend() == "torch":  # faster in this order
        return ops.transpose(ops.matmul(ops.transpose(y), x))
    return ops.matmul(ops.transpose(x), y)


def merged_product(x, kernel, U, S, V, scale, transpose=False):
    """Computes `x @ (kernel + scale * U @ S @ V.T)` for a frozen kernel.

    Args:
        x: Tensor of shape `(batch, input_dim)`, or `(batch, output_dim)` if
            transposed.
        kernel: Tensor of shape `(input_dim, output_dim)`, a constant.
        U: Tensor of shape `(input_dim, max_rank)`.
        S: Tensor of shape `(max_rank, max_rank)`.
        V: Tensor of shape `(output_dim, max_rank)`.
        scale: Float.
        transpose: Bool, whether to multiply by the transpose of the sum.
            Defaults to `False`.

    Returns:
        Tensor of shape `(batch, output_dim)`, or `(batch, input_dim)` if
        transposed. Its gradients are those of `low_rank_product` plus the
        product with the kernel.
    """

    def forward(x, kernel, U, S, V):
        merged = kernel + product_of_factors(U, S, V, scale)
        return ops.matmul(
            x, ops.transpose(merged) if transpose else merged
        ), None

    def backward(g, _, x, kernel, U, S, V):
        # Forms the sum again: keeping all sums would take as much memory as the
        # model.
        grad_x = merged_product(g, kernel, U, S, V, scale, not transpose)
        rows, columns = (g, x) if transpose else (x, g)
        grads = factor_gradients(rows, columns, U, V, scale)
        # Compilers drop these zeros; torch has no compiler and gets none.
        on_torch = keras.backend.backend() == "torch"
        none = None if on_torch else ops.zeros_like(kernel)
        return grad_x, none, *grads

    return with_gradients(forward, backward, x, kernel, U, S, V)


def is_known(training):
    """Returns whether the value of a layer's argument `training` is known.

    Under `keras.RematScope` it may be a bool traced by JAX.
    """
    return training is None or isinstance(training, (bool, int))


def may_train(training):
    """Returns a layer's argument `training`, or `True` if it is unknown."""
    return bool(training) if is_known(training) else True


def merging_pays(rows, input_dim, output_dim):
    """Returns whether `merged_product` is likely faster than two products.

    A separate low-rank product processes all rows of inputs and outputs once
    more, the sum all entries of the kernel. On torch the sum takes new memory
    every time. `benchmarks/train_step.py --form` compares the two.
    """
    price = 4 if keras.backend.backend() == "torch" else 1
    return rows * (input_dim + output_dim) >= price * input_dim * output_dim


def low_rank_rows(ids, U, S, V, scale, dtype):
    """Computes rows of `scale * U @ S @ V.T`, with the geometric gradients.

    Args:
        ids: Int tensor of shape `(batch,)`, the rows, below 2**24.
        U: Tensor of shape `(input_dim, max_rank)`.
        S: Tensor of shape `(max_rank, max_rank)`.
        V: Tensor of shape `(output_dim, max_rank)`.
        scale: Float.
        dtype: String, the dtype to compute in.

    Returns:
        Tensor of shape `(batch, output_dim)`. Its gradients are those of
        `low_rank_product` for one-hot inputs, which are never formed.
    """
    if U.shape[0] > 2**24:
        raise ValueError(
            "An adapter can select rows only from a matrix with at most 2**24 "
            f"rows. Received: {U.shape[0]} rows"
        )

    # JAX cannot close over the ids inside a branch of `cond`, and has no
    # gradient for integers: they are passed as floats, exact below 2**24.
    def forward(numbers, U, S, V):
        rows_of_U = rows_of(U, numbers)
        y = ops.matmul(rows_of_U, ops.cast(S * scale, dtype))
        return ops.matmul(y, ops.transpose(ops.cast(V, dtype))), rows_of_U

    def backward(g, rows_of_U, numbers, U, S, V):
        if rows_of_U is None:
            rows_of_U = rows_of(U, numbers)
        gV = ops.cast(times_basis(g, V), U.dtype)
        ids = ops.cast(numbers, "int32")
        grad_K = ops.segment_sum(gV, ids, num_segments=U.shape[0]) * scale
        grad_L = ops.cast(tall_product(g, rows_of_U), U.dtype) * scale
        basis = ops.transpose(ops.stop_gradient(U))
        grad_S = ops.matmul(basis, grad_K)
        return ops.zeros_like(numbers), grad_K, grad_S, grad_L

    def rows_of(U, numbers):
        ids = ops.cast(numbers, "int32")
        rows = ops.take(ops.stop_gradient(U), ids, axis=0)
        return ops.cast(rows, dtype)

    numbers = ops.cast(ids, "float32")
    return with_gradients(forward, backward, numbers, U, S, V)


def low_rank_matrix(U, S, V, scale):
    """Computes `scale * U @ S @ V.T`, with the geometric gradients.

    Args:
        U: Tensor of shape `(input_dim, max_rank)`.
        S: Tensor of shape `(max_rank, max_rank)`.
        V: Tensor of shape `(output_dim, max_rank)`.
        scale: Float.

    Returns:
        Tensor of shape `(input_dim, output_dim)`. `U`, `S` and `V` get the
        gradients for `K = U S`, `S` and `L = V S.T`.
    """

    def forward(U, S, V):
        return product_of_factors(U, S, V, scale), None

    def backward(G, _, U, S, V):
        grad_K = times_basis(G, V) * scale
        grad_L = times_basis(ops.transpose(G), U) * scale
        basis = ops.transpose(ops.stop_gradient(U))
        return grad_K, ops.matmul(basis, grad_K), grad_L

    return with_gradients(forward, backward, U, S, V)


def product_of_factors(U, S, V, scale):
    """Computes `scale * U @ S @ V.T`, without custom gradients."""
    return ops.matmul(ops.matmul(U, S * scale), ops.transpose(V))
