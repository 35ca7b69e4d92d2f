"""Which transport of the slots, and how often to cut: the oracle.

    python benchmarks/transports.py

Matrix regression in float64 NumPy, where the right answer is known:
`y = x @ W` with `W` of shape 96 x 64, rank 6 and condition 10, inputs of
condition 10, 400 steps of batch 64, buffers of 16, tolerance 0.02. Prints
Markdown tables of the relative error of `W` at the end, the median of three
seeds. The geometric step is the reference of the test suite.

Candidates for the first moment: `untouched`, `rotated` with the bases, or
`projected` on the new tangent space. For the second: `untouched`, `squared`
(by the squares of the rotation), `filled` (the same, and what is missing in new
directions is the mean), `averaged` over the rank axis, or `followed`: filled
for `K` and `L`, averaged for `S`, as in the library.

The first table retracts in every step, the second at the steps at which the
library does by default, with cuts 100 steps apart.
"""

import math
import pathlib
import sys
from functools import partial

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
import reference

INPUT_DIM, OUTPUT_DIM, TRUE_RANK, MAX_RANK = 96, 64, 6, 16
STEPS, BATCH, SEEDS = 400, 64, (0, 1, 2)


def rotated(m, old, new):
    """`m_K B`, `A.T m_S B` and `m_L A`."""
    (U, V), (U1, V1) = old, new
    A, B = U.T @ U1, V.T @ V1
    return [m[0] @ B, A.T @ m[1] @ B, m[2] @ A]


def projected(m, old, new):
    """The moment as a tangent vector, projected on the new tangent space."""
    (U, V), (U1, V1) = old, new
    M = m[0] @ V.T + U @ m[2].T - U @ m[1] @ V.T
    return [M @ V1, U1.T @ M @ V1, M.T @ U1]


def squared(v, old, new):
    """As `rotated`, with the squares of the rotations."""
    (U, V), (U1, V1) = old, new
    A, B = (U.T @ U1) ** 2, (V.T @ V1) ** 2
    return [v[0] @ B, A.T @ v[1] @ B, v[2] @ A]


def filled(v, old, new):
    """As `squared`; the mean of all columns stands for new directions."""
    (U, V), (U1, V1) = old, new
    A, B = (U.T @ U1) ** 2, (V.T @ V1) ** 2

    def fill(x, squares):
        missing = np.maximum(1 - squares.sum(axis=0), 0)
        return x @ squares + missing * x.mean(axis=1, keepdims=True)

    return [fill(v[0], B), fill(fill(v[1].T, A).T, B), fill(v[2], A)]


def averaged(v, old, new):
    """The mean over the rank axis."""
    ones = np.ones((1, new[0].shape[1]))
    return [
        v[0].mean(axis=1, keepdims=True) @ ones,
        v[1].mean() * ones.T @ ones,
        v[2].mean(axis=1, keepdims=True) @ ones,
    ]


def followed(v, old, new):
    """As `filled` for `K` and `L`, as `averaged` for `S`."""
    K, _, L = filled(v, old, new)
    return [K, averaged(v, old, new)[1], L]


def untouched(slots, old, new):
    """The slot stays, cut or padded with zeros to the new rank."""
    rank = new[0].shape[1]
    shapes = [new[0].shape, (rank, rank), new[1].shape]
    moved = []
    for slot, shape in zip(slots, shapes, strict=True):
        rows, columns = (
            min(a, b) for a, b in zip(slot.shape, shape, strict=True)
        )
        padded = np.zeros(shape)
        padded[:rows, :columns] = slot[:rows, :columns]
        moved.append(padded)
    return moved


def direction(inner, gradient, m, v, i, step):
    """What an inner optimizer subtracts, for a learning rate of one.

    Updates the moments `m[i]` and `v[i]` of the unknown `i`. The rate of an
    optimizer called "falling" falls linearly to zero.
    """
    if inner == "falling adam":
        falling = 1 - (step - 1) / STEPS
        return falling * direction("adam", gradient, m, v, i, step)
    if inner == "sgd":
        return gradient
    if inner == "momentum":
        m[i] = 0.9 * m[i] + gradient
        return m[i]
    m[i] = 0.9 * m[i] + 0.1 * gradient
    v[i] = 0.999 * v[i] + 0.001 * gradient * gradient
    correction = np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
    return correction * m[i] / (np.sqrt(v[i]) + 1e-7)


def every_step(step):
    """A retraction in every step."""
    return True


def now_and_then(step):
    """Whether the library retracts after so many steps, by default."""
    from keras_geolora.optimizer.retractions import blocks_begun

    return math.floor(blocks_begun(step)) > math.floor(blocks_begun(step - 1))


def train(
    inner,
    rate,
    first,
    second,
    seed,
    interval=1,
    tolerance=0.02,
    is_due=every_step,
):
    """Returns the relative error and the rank at the end."""
    rng = np.random.default_rng(seed)
    sigma = np.geomspace(1, 0.1, TRUE_RANK)
    U, S, V = reference.random_factors(rng, INPUT_DIM, OUTPUT_DIM, sigma)
    target = U @ S @ V.T
    U, S, V = reference.random_factors(rng, INPUT_DIM, OUTPUT_DIM, [0.0] * 4)
    m, v = ([np.zeros_like(x) for x in (U, S, V)] for _ in range(2))
    K, L = U @ S, V @ S.T
    for step in range(1, STEPS + 1):
        x = rng.normal(size=(BATCH, INPUT_DIM))
        x *= np.sqrt(np.geomspace(1, 0.1, INPUT_DIM))
        G = x.T @ (x @ (update_of(U, K, V, L) - target)) / BATCH
        dK, dS, dL = (
            rate * direction(inner, g, m, v, i, step)
            for i, g in enumerate((G @ V, U.T @ G @ V, G.T @ U))
        )
        if not all(np.isfinite(x).all() for x in (dK, dS, dL)):
            return np.inf, 0
        # Of the steps of `K` and `L` only what is orthogonal to the bases.
        S = S - dS
        K = U @ S + outside(U, K - dK)
        L = V @ S.T + outside(V, L - dL)
        if not is_due(step) and step % interval:
            continue
        U1, S, V1 = reference.retract(
            U,
            V,
            K,
            S,
            L,
            tolerance=tolerance if step % interval == 0 else 1e-9,
            max_rank=MAX_RANK,
        )
        m = first(m, (U, V), (U1, V1))
        v = second(v, (U, V), (U1, V1))
        U, V = U1, V1
        K, L = U @ S, V @ S.T
    error = np.linalg.norm(update_of(U, K, V, L) - target)
    error = error / np.linalg.norm(target)
    return error, len(S)


def update_of(U, K, V, L):
    """The update between two retractions; `U S V.T` is in `K` and in `L`."""
    return K @ V.T + U @ outside(V, L).T


def outside(basis, X):
    """Returns what of `X` is orthogonal to a basis."""
    return X - basis @ (basis.T @ X)


def lora(inner, rate, seed):
    """The same by LoRA of rank 16: `A` random, `B` zero, no geometry."""
    rng = np.random.default_rng(seed)
    sigma = np.geomspace(1, 0.1, TRUE_RANK)
    U, S, V = reference.random_factors(rng, INPUT_DIM, OUTPUT_DIM, sigma)
    target = U @ S @ V.T
    factors = [
        rng.uniform(-1, 1, (INPUT_DIM, MAX_RANK)) * np.sqrt(6 / INPUT_DIM),
        np.zeros((MAX_RANK, OUTPUT_DIM)),
    ]
    m, v = ([np.zeros_like(f) for f in factors] for _ in range(2))
    for step in range(1, STEPS + 1):
        x = rng.normal(size=(BATCH, INPUT_DIM))
        x *= np.sqrt(np.geomspace(1, 0.1, INPUT_DIM))
        A, B = factors
        G = x.T @ (x @ (A @ B - target)) / BATCH
        for i, g in enumerate((G @ B.T, A.T @ G)):
            update = direction(inner, g, m, v, i, step)
            factors[i] = factors[i] - rate * update
    A, B = factors
    return np.linalg.norm(A @ B - target) / np.linalg.norm(target)


def median(function):
    """Runs a function of a seed for all seeds; formats the median."""
    with np.errstate(all="ignore"):
        results = [function(seed) for seed in SEEDS]
    if isinstance(results[0], tuple):
        errors, ranks = zip(*results, strict=True)
        return f"{np.median(errors):.0e} ({', '.join(map(str, ranks))})"
    return f"{np.median(results):.0e}"


def print_transports(settings, candidates, is_due, interval):
    """Prints a table: a line an optimizer and rate, a column a candidate."""
    print("| inner, rate | " + " | ".join([*candidates, "LoRA"]) + " |")
    print("|---" * (len(candidates) + 2) + "|")
    for inner, rate in settings:
        run = partial(train, inner, rate, is_due=is_due, interval=interval)
        cells = [median(partial(run, *moves)) for moves in candidates.values()]
        cells.append(median(partial(lora, inner, rate)))
        print(f"| {inner} {rate:g} | " + " | ".join(cells) + " |", flush=True)


def main():
    """Prints the tables."""
    candidates = {
        "untouched": (untouched, untouched),
        "rotated, second untouched": (rotated, untouched),
        "rotated, second squared": (rotated, squared),
        "rotated, second averaged": (rotated, averaged),
        "projected, second averaged": (projected, averaged),
        "projected, second filled": (projected, filled),
        "projected, second followed": (projected, followed),
    }
    settings = [
        ("sgd", 0.2),
        ("momentum", 0.01),
        ("momentum", 0.03),
        ("adam", 1e-3),
        ("adam", 3e-3),
        ("adam", 1e-2),
        ("falling adam", 3e-3),
        ("falling adam", 1e-2),
        ("falling adam", 3e-2),
    ]
    print("Transport, cut at every step: error (ranks of the three seeds)\n")
    print_transports(settings, candidates, every_step, 1)
    print("\nTransport, retractions now and then, cuts every 100 steps\n")
    settings = [setting for setting in settings if "adam" in setting[0]]
    names = ("averaged", "filled", "followed")
    names = [f"projected, second {name}" for name in names]
    candidates = {name: candidates[name] for name in names}
    print_transports(settings, candidates, now_and_then, 100)

    intervals = (1, 5, 20, 100)
    print("\nInterval between cuts, Adam, projected and averaged\n")
    print("| rate, tolerance | " + " | ".join(map(str, intervals)) + " |")
    print("|---" * (len(intervals) + 1) + "|")
    for rate, tolerance in [
        (1e-3, 0.02),
        (1e-3, 0.1),
        (3e-3, 0.1),
        (1e-2, 0.1),
    ]:
        adam = partial(train, "adam", rate, projected, averaged)
        cells = [
            median(partial(adam, interval=i, tolerance=tolerance))
            for i in intervals
        ]
        print(
            f"| {rate:g}, {tolerance} | " + " | ".join(cells) + " |", flush=True
        )


if __name__ == "__main__":
    main()
