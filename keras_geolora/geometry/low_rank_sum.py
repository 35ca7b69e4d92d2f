"""Factors a sum of low-rank products without forming the sum."""

import numpy as np


def svd_of_sum(products, rank=None, min_rank=1):
    """Returns `U, sigma, V` with `U diag(sigma) V.T = sum of A @ C @ B.T`.

    With stacked factors the sum is `[A1, A2] diag(C1, C2) [B1, B2].T`. Two QR
    decompositions reduce it to a small matrix, whose SVD gives that of the
    sum. Singular values that are rounding noise are dropped.

    Args:
        products: List of `(A, C, B)`, arrays of shapes `(input_dim, r)`,
            `(r, s)` and `(output_dim, s)`, finite.
        rank: Int, the largest number of singular values. Defaults to all.
        min_rank: Int, the smallest number to keep, zeros included, if the
            products have that many columns. Defaults to 1.

    Returns:
        Float64 arrays of shapes `(input_dim, k)`, `(k,)`, descending, and
        `(output_dim, k)`. `U` and `V` have orthonormal columns.
    """
    A, C, B = (
        [np.asarray(x, "float64") for x in factors]
        for factors in zip(*products, strict=True)
    )
    Q_A, R_A = np.linalg.qr(np.hstack(A))
    Q_B, R_B = np.linalg.qr(np.hstack(B))
    P, sigma, Qt = np.linalg.svd(R_A @ block_diagonal(C) @ R_B.T)
    count = max(int((sigma > 1e-7 * sigma[0]).sum()), min_rank)
    count = min(count, len(sigma), len(sigma) if rank is None else rank)
    return Q_A @ P[:, :count], sigma[:count], Q_B @ Qt[:count].T


def trimmed(block, max_rank=None, min_rank=1):
    """Returns the factors of an update, without unused columns.

    Args:
        block: `Block` of arrays.
        max_rank: Int, the largest rank. Defaults to that of the update.
        min_rank: Int, the smallest rank. Defaults to 1.

    Returns:
        Float32 arrays `U`, `S`, diagonal, and `V`. At rest they are those of
        the block, otherwise those of the closest matrix of rank `max_rank`.
    """
    U, S, V, P, Q = (np.asarray(x) for x in block)
    rank = int((U != 0).any(axis=0).sum())
    at_rest = not (P.any() or Q.any() or (S - np.diag(S.diagonal())).any())
    if not at_rest and all(np.isfinite(x).all() for x in block):
        U, V, P, Q = (x[:, :rank] for x in (U, V, P, Q))
        eye = np.eye(rank)
        left = U.astype("float64") @ S[:rank, :rank] + P
        products = [(left, eye, V), (U, eye, Q)]
        U, sigma, V = svd_of_sum(products, max_rank, min_rank)
        return tuple(x.astype("float32") for x in (U, np.diag(sigma), V))
    if not at_rest:  # not finite
        S = np.full_like(S, np.nan)
    return U[:, :rank], S[:rank, :rank], V[:, :rank]


def block_diagonal(blocks):
    """Returns a matrix with blocks along its diagonal and zeros elsewhere."""
    rows, columns = np.sum([block.shape for block in blocks], axis=0)
    matrix = np.zeros((rows, columns))
    row = column = 0
    for block in blocks:
        matrix[row : row + block.shape[0], column : column + block.shape[1]] = (
            block
        )
        row, column = row + block.shape[0], column + block.shape[1]
    return matrix
