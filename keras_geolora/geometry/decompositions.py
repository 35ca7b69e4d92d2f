"""Eigenvalues and singular values, also where a library gives up.

The routines of LAPACK iterate, and rarely, on matrices of finite numbers, do
not converge: with one of 256 x 256, zero but for a block that was nearly the
identity, PyTorch raised an error where other libraries had no difficulty.
"""

from keras import ops


def eigh(x):
    """Returns the eigenvalues, ascending, and eigenvectors.

    Args:
        x: Array `(..., n, n)`, symmetric.

    Returns:
        Tuple of arrays `(..., n)` and `(..., n, n)`. JAX puts NaN where it did
        not find them.
    """
    return again_in_float64(ops.eigh, x)


def svd(x):
    """Returns the singular value decomposition.

    Args:
        x: Array `(..., n, n)`.

    Returns:
        Tuple of arrays `(..., n, n)`, `(..., n)`, descending, and
        `(..., n, n)`. JAX puts NaN where it did not find them.
    """
    return again_in_float64(ops.svd, x)


def again_in_float64(decompose, x):
    """Decomposes a matrix, with more digits if that failed.

    Only torch raises an error that can be caught: other numbers take another
    path through the same routine.
    """
    try:
        return decompose(x)
    except RuntimeError:
        found = decompose(ops.cast(x, "float64"))
        return tuple(ops.cast(y, x.dtype) for y in found)
