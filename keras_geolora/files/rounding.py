"""Factors in half precision, and what that costs."""

import numpy as np

DTYPES = "float32", "float16", "bfloat16"


def check_dtype(dtype):
    """Raises if factors cannot be written in a dtype."""
    if dtype not in DTYPES:
        raise ValueError(
            "`dtype` is that of the factors in the file, one of "
            f"{', '.join(DTYPES)}. Received: dtype={dtype!r}"
        )


def rounded(A, B, dtype, module):
    """Returns two factors, rounded to a dtype, and the error of their product.

    Args:
        A: Array of shape `(rank, input_dim)`, or with an axis of experts in
            front.
        B: Array of shape `(output_dim, rank)`, or the same.
        dtype: String, one of `DTYPES`.
        module: String, for messages.

    Returns:
        `A` and `B` in the dtype, and a float: the norm of the error of `B A`
        relative to that of `B A`.
    """
    if dtype == "float32":
        return A, B, 0.0
    with np.errstate(over="ignore"):
        lower = A.astype(dtype), B.astype(dtype)
    A_low, B_low = (x.astype("float64") for x in lower)
    if not (np.isfinite(A_low).all() and np.isfinite(B_low).all()):
        raise ValueError(
            "float16 holds numbers up to 65504 only; bfloat16 holds all. "
            f"Received: dtype={dtype!r} and larger numbers in '{module}'"
        )
    error = norm(
        np.concatenate([B_low, -B], axis=-1),
        np.concatenate([A_low, A], axis=-2),
    )
    whole = norm(B.astype("float64"), A.astype("float64"))
    return *lower, float(error / whole) if whole else 0.0


def norm(B, A):
    """Returns the Frobenius norm of `B A`, without the product."""
    square = (B.swapaxes(-1, -2) @ B) * (A @ A.swapaxes(-1, -2))
    return np.sqrt(max(np.sum(square), 0.0))
