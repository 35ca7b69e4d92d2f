"""One GeoLoRA step in float64 NumPy, as dull as possible: the oracle.

No buffers, no batches, no masks: matrices have exactly `rank` columns, and
everything that the library does in a clever way is done here by the book.
"""

import numpy as np


def tangent_projection(U, V, Z):
    """Orthogonal projection of `Z` on the tangent space at `U S V.T`."""
    return U @ (U.T @ Z) + (Z @ V) @ V.T - U @ (U.T @ Z @ V) @ V.T


def new_directions(basis, X):
    """Orthonormal basis of what the columns of `X` add to `basis`."""
    residual = X - basis @ (basis.T @ X)
    residual = residual - basis @ (basis.T @ residual)
    u, sigma, _ = np.linalg.svd(residual, full_matrices=False)
    u = u[:, sigma > 1e-13 * np.linalg.norm(X)]
    u = u - basis @ (basis.T @ u)
    return np.linalg.qr(u)[0]


def truncated_rank(sigma, tolerance, min_rank, max_rank):
    """Smallest rank whose tail holds at most `tolerance` of the norm."""
    for rank in range(len(sigma) + 1):
        tail = np.linalg.norm(sigma[rank:])
        if tail <= tolerance * np.linalg.norm(sigma):
            break
    return max(min_rank, min(rank, max_rank, len(sigma)))


def retract(U, V, K, S, L, tolerance=0.0, min_rank=1, max_rank=10**9):
    """Returns `U, S, V` of the step from unknowns `K`, `S`, `L`."""
    U_tilde, V_tilde = new_directions(U, K), new_directions(V, L)
    corner = np.zeros((U_tilde.shape[1], V_tilde.shape[1]))
    S_hat = np.block([[S, L.T @ V_tilde], [U_tilde.T @ K, corner]])
    P, sigma, Qt = np.linalg.svd(S_hat)
    rank = truncated_rank(sigma, tolerance, min_rank, max_rank)
    return (
        np.hstack([U, U_tilde]) @ P[:, :rank],
        np.diag(sigma[:rank]),
        np.hstack([V, V_tilde]) @ Qt[:rank].T,
    )


def sgd_step(U, S, V, G, lr, **truncation):
    """One step of plain gradient descent on the manifold."""
    K = U @ S - lr * (G @ V)
    L = V @ S.T - lr * (G.T @ U)
    return retract(U, V, K, S - lr * (U.T @ G @ V), L, **truncation)


def random_factors(rng, input_dim, output_dim, sigma):
    """Random bases with the given singular values."""
    U = np.linalg.qr(rng.normal(size=(input_dim, len(sigma))))[0]
    V = np.linalg.qr(rng.normal(size=(output_dim, len(sigma))))[0]
    return U, np.diag(np.asarray(sigma, "float64")), V


def put_factors(adapter, U, S, V):
    """Gives an adapter factors, filled up with zeros."""
    adapter.assign_factors(U, S, V)


class Adam:
    """Adam on the manifold: moments that follow the bases, by the book.

    Between two retractions the update is `U S V.T + P V.T + U Q.T`, and the
    bases stay. The first moment stands for a matrix, which is projected on the
    tangent space of every new point, as far as rows knew of it. The second
    moments of `K` and `L` follow their columns, and that of `S` is averaged;
    with `averages` all are.
    """

    def __init__(
        self,
        U,
        S,
        V,
        lr,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-7,
        averages=False,
    ):
        self.U, self.S, self.V = U, S, V
        self.followed = averaged if averages else followed
        self.P, self.Q = np.zeros_like(U), np.zeros_like(V)
        self.lr, self.epsilon = lr, epsilon
        self.beta_1, self.beta_2 = beta_1, beta_2
        self.steps = 0
        self.m = [np.zeros_like(x) for x in (U, S, V)]
        self.v = [np.zeros_like(x) for x in (U, S, V)]

    def delta(self):
        U, V = self.U, self.V
        return U @ self.S @ V.T + self.P @ V.T + U @ self.Q.T

    def step(self, G):
        """Moves by the gradient `G` of the full matrix."""
        U, V = self.U, self.V
        self.steps += 1
        gradients = G @ V, U.T @ G @ V, G.T @ U
        dK, dS, dL = (self.update(i, g) for i, g in enumerate(gradients))
        self.P = self.P - (dK - U @ (U.T @ dK))
        self.S = self.S - dS
        self.Q = self.Q - (dL - V @ (V.T @ dL))

    def retract(self, **truncation):
        """Returns to the manifold."""
        U, S, V = self.U, self.S, self.V
        K, L = U @ S + self.P, V @ S.T + self.Q
        self.U, self.S, self.V = retract(U, V, K, S, L, **truncation)
        self.P, self.Q = np.zeros_like(self.U), np.zeros_like(self.V)
        m_K, m_S, m_L = self.m
        M = m_K @ V.T + U @ m_L.T - U @ m_S @ V.T
        self.m = [
            limited(M @ self.V, m_K @ V.T @ self.V),
            self.U.T @ M @ self.V,
            limited(M.T @ self.U, m_L @ U.T @ self.U),
        ]
        v_K, v_S, v_L = self.v
        self.v = [
            self.followed(v_K, V, self.V),
            np.full_like(self.S, v_S.mean()),
            self.followed(v_L, U, self.U),
        ]

    def update(self, i, g):
        self.m[i] = self.beta_1 * self.m[i] + (1 - self.beta_1) * g
        self.v[i] = self.beta_2 * self.v[i] + (1 - self.beta_2) * g * g
        m = self.m[i] / (1 - self.beta_1**self.steps)
        correction = np.sqrt(1 - self.beta_2**self.steps)
        return self.lr * m * correction / (np.sqrt(self.v[i]) + self.epsilon)


def followed(v, old, new):
    """Means of columns, weighted by how much of a new direction each is."""
    moved = np.empty((len(v), new.shape[1]))
    for j, direction in enumerate(new.T):
        shares = (old.T @ direction) ** 2
        moved[:, j] = v @ shares + (1 - shares.sum()) * v.mean(axis=1)
    return moved


def averaged(v, old, new):
    """The mean of all columns, for every new direction."""
    return np.repeat(v.mean(axis=1, keepdims=True), new.shape[1], axis=1)


def limited(rows, own):
    """Rows, of which the part that is not their own is at most as long."""
    others = rows - own
    lengths = np.linalg.norm(others, axis=1, keepdims=True)
    known = np.linalg.norm(own, axis=1, keepdims=True)
    return own + np.minimum(1, known / np.maximum(lengths, 1e-300)) * others
