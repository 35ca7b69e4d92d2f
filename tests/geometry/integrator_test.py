"""The geometric step against the float64 reference, and its properties."""

import numpy as np
import pytest
import reference
from keras import ops

from keras_geolora.geometry import integrator
from keras_geolora.geometry.integrator import Block, Point, Unknowns

INPUT_DIM, OUTPUT_DIM = 24, 17
SIGMA = (3.0, 1.0, 0.3, 0.01)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def padded(U, S, V, max_rank):
    """Float32 buffers of one adapter from exact factors, batch of one."""
    rank = S.shape[0]
    missing = max_rank - rank
    return Point(
        np.pad(U, ((0, 0), (0, missing)))[None].astype("float32"),
        np.pad(S, (0, missing))[None].astype("float32"),
        np.pad(V, ((0, 0), (0, missing)))[None].astype("float32"),
    )


def stacked(*points):
    return Point(
        *(np.concatenate(arrays) for arrays in zip(*points, strict=True))
    )


def numpy(arrays):
    return type(arrays)(*(ops.convert_to_numpy(x) for x in arrays))


def product(point):
    U, S, V = (np.asarray(x, "float64") for x in point)
    return U @ S @ V.swapaxes(-1, -2)


def sgd(point, G, lr):
    """The unknowns after one inner step of plain gradient descent."""
    K, S, L = (np.asarray(x, "float64") for x in numpy(lift(point)))
    U, _, V = (np.asarray(x, "float64") for x in point)
    GT = G.swapaxes(-1, -2)
    return Unknowns(
        *(
            x.astype("float32")
            for x in (
                K - lr * (G @ V),
                S - lr * (U.swapaxes(-1, -2) @ G @ V),
                L - lr * (GT @ U),
            )
        )
    )


def block_at(point):
    """A point on the manifold, as a block in which nothing has moved yet."""
    point = Point(*map(ops.convert_to_tensor, point))
    return Block(*point, ops.zeros_like(point.U), ops.zeros_like(point.V))


def lift(point):
    return integrator.lift(block_at(point))


def advance(block, unknowns):
    """Takes a step without a bound to new values of the unknowns."""
    unknowns = Unknowns(*map(ops.convert_to_tensor, unknowns))
    change = Unknowns(
        *(x - y for x, y in zip(unknowns, integrator.lift(block), strict=True))
    )
    moving = ops.ones(len(change.S), dtype="bool")
    return integrator.advance(block, change, moving)[0]


def retract(point, unknowns, tolerance=0.0, min_rank=1):
    return return_to_manifold(
        advance(block_at(point), unknowns), tolerance, min_rank
    )


def return_to_manifold(block, tolerance=0.0, min_rank=1):
    augmented = integrator.augment(block)
    min_rank = ops.full((len(block.S), 1), min_rank, dtype="int32")
    rank = integrator.wanted_rank(augmented, tolerance, min_rank)
    return numpy(integrator.truncate(augmented, rank).new)


def new_directions(basis, change):
    known = ops.zeros((len(change), 1, 1))
    active = ops.ones((len(change), basis.shape[-1]), dtype="bool")
    extension = integrator.extend(basis, active, change, known)
    return ops.matmul(extension.both, extension.mix)[..., basis.shape[-1] :]


def ranks(point):
    return (point.U != 0).any(axis=-2).sum(axis=-1)


def check_invariants(point, tolerance=1e-5):
    """Orthonormal active columns, exact zeros elsewhere, S diagonal."""
    for U, S, V in zip(*point, strict=True):
        rank = (U != 0).any(axis=0).sum()
        for basis in (U, V):
            gram = basis[:, :rank].T @ basis[:, :rank]
            assert np.abs(gram - np.eye(rank)).max(initial=0) < tolerance
            assert (basis[:, rank:] == 0).all()
        sigma = S.diagonal()
        assert (S == np.diag(sigma)).all()
        assert (sigma[rank:] == 0).all()
        assert (np.diff(sigma) <= 0).all() and (sigma >= 0).all()


def test_the_reference_step_is_projected_gradient_descent(rng):
    U, S, V = reference.random_factors(rng, INPUT_DIM, OUTPUT_DIM, SIGMA)
    G = rng.normal(size=(INPUT_DIM, OUTPUT_DIM))
    U1, S1, V1 = reference.sgd_step(U, S, V, G, 0.1)
    expected = U @ S @ V.T - 0.1 * reference.tangent_projection(U, V, G)
    np.testing.assert_allclose(U1 @ S1 @ V1.T, expected, atol=1e-12)


def test_the_reference_projection_is_idempotent(rng):
    U, _, V = reference.random_factors(rng, INPUT_DIM, OUTPUT_DIM, SIGMA)
    Z = rng.normal(size=(INPUT_DIM, OUTPUT_DIM))
    once = reference.tangent_projection(U, V, Z)
    twice = reference.tangent_projection(U, V, once)
    np.testing.assert_allclose(twice, once, atol=1e-13)


@pytest.mark.parametrize("sigma", [SIGMA, (3.0, 1.0, 0.0, 0.0)])
def test_the_sgd_step_is_projected_gradient_descent(rng, sigma):
    U, S, V = reference.random_factors(rng, INPUT_DIM, OUTPUT_DIM, sigma)
    G = rng.normal(size=(INPUT_DIM, OUTPUT_DIM))
    point = padded(U, S, V, max_rank=8)
    moved = retract(point, sgd(point, G[None], 0.1))
    step = -0.1 * reference.tangent_projection(U, V, G)
    error = product(moved)[0] - (U @ S @ V.T + step)
    assert np.linalg.norm(error) < 5e-5 * np.linalg.norm(step)
    check_invariants(moved)


def test_between_retractions_steps_are_projected_at_the_base_point(rng):
    U, S, V = reference.random_factors(rng, INPUT_DIM, OUTPUT_DIM, SIGMA)
    block, lr = block_at(padded(U, S, V, max_rank=8)), 0.1
    W = U @ S @ V.T
    for _ in range(5):
        before = update_of(block)
        G = rng.normal(size=(INPUT_DIM, OUTPUT_DIM)) + W - before
        gradients = G @ V, U.T @ G @ V, G.T @ U
        unknowns = []
        for x, g in zip(numpy(integrator.lift(block)), gradients, strict=True):
            missing = zip(x[0].shape, g.shape, strict=True)
            g = np.pad(g, [(0, n - m) for n, m in missing])
            unknowns.append((x - lr * g).astype("float32"))
        block = advance(block, Unknowns(*unknowns))
        step = -lr * reference.tangent_projection(U, V, G)
        error = update_of(block) - before - step
        assert np.linalg.norm(error) < 5e-5 * np.linalg.norm(step)
    np.testing.assert_array_equal(numpy(block).U, padded(U, S, V, 8).U)
    assert np.abs(U.T @ numpy(block).P[0]).max() < 1e-6
    # A retraction with room for all directions changes nothing.
    moved = return_to_manifold(block)
    error = product(moved)[0] - update_of(block)
    assert np.linalg.norm(error) < 5e-5 * np.linalg.norm(step)
    assert ranks(moved)[0] == 8
    check_invariants(moved)


def update_of(block):
    U, S, V, P, Q = (x[0].astype("float64") for x in numpy(block))
    return U @ S @ V.T + P @ V.T + U @ Q.T


@pytest.mark.parametrize("tolerance", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("max_rank", [4, 6])
def test_the_step_equals_the_reference(rng, tolerance, max_rank):
    U, S, V = reference.random_factors(rng, INPUT_DIM, OUTPUT_DIM, SIGMA)
    G = rng.normal(size=(INPUT_DIM, OUTPUT_DIM))
    point = padded(U, S, V, max_rank)
    moved = retract(point, sgd(point, G[None], 0.05), tolerance)
    U1, S1, V1 = reference.sgd_step(
        U, S, V, G, 0.05, tolerance=tolerance, max_rank=max_rank
    )
    assert ranks(moved)[0] == len(S1)
    expected = U1 @ S1 @ V1.T
    error = np.linalg.norm(product(moved)[0] - expected)
    assert error < 1e-5 * np.linalg.norm(expected)
    sigma = moved.S[0].diagonal()[: len(S1)]
    np.testing.assert_allclose(sigma, np.diag(S1), rtol=1e-4, atol=1e-5)


def test_swapping_the_sides_transposes_the_step(rng):
    U, S, V = reference.random_factors(rng, INPUT_DIM, OUTPUT_DIM, SIGMA)
    G = rng.normal(size=(1, INPUT_DIM, OUTPUT_DIM))
    point, swapped = padded(U, S, V, 8), padded(V, S.T, U, 8)
    moved = retract(point, sgd(point, G, 0.1))
    other = retract(swapped, sgd(swapped, G.swapaxes(1, 2), 0.1))
    np.testing.assert_allclose(
        product(moved), product(other).swapaxes(1, 2), atol=1e-5
    )


def test_a_batch_steps_as_its_members_do(rng):
    points = [
        padded(*reference.random_factors(rng, 12, 10, sigma), max_rank=4)
        for sigma in [(2.0, 1.0), (1.0,), (1e-3, 1e-4, 1e-5)]
    ]
    G = rng.normal(size=(3, 12, 10))
    together = retract(stacked(*points), sgd(stacked(*points), G, 0.1))
    for i, point in enumerate(points):
        alone = retract(point, sgd(point, G[i : i + 1], 0.1))
        np.testing.assert_allclose(
            product(together)[i], product(alone)[0], atol=1e-5
        )


def test_the_number_of_decompositions_does_not_grow_with_the_batch(
    rng, monkeypatch
):
    calls = []

    def counted(name):
        decompose = getattr(ops, name)

        def count(*args, **options):
            calls.append(name)
            return decompose(*args, **options)

        return count

    for name in ("svd", "eigh"):
        monkeypatch.setattr(ops, name, counted(name))
    point = padded(*reference.random_factors(rng, 12, 10, (2.0, 1.0)), 4)
    points = stacked(*[point] * 7)
    retract(points, sgd(points, rng.normal(size=(7, 12, 10)), 0.1))
    assert sorted(calls) == ["eigh"] * 4 + ["svd"]


def test_a_step_without_change_keeps_the_point(rng):
    U, S, V = reference.random_factors(rng, INPUT_DIM, OUTPUT_DIM, SIGMA)
    point = padded(U, S, V, 8)
    moved = retract(point, numpy(lift(point)))
    assert ranks(moved)[0] == 4
    np.testing.assert_allclose(product(moved), product(point), atol=3e-6)


def test_from_zero_the_step_reaches_the_projected_gradient(rng):
    U, S, V = reference.random_factors(rng, INPUT_DIM, OUTPUT_DIM, (0.0,) * 3)
    G = rng.normal(size=(1, INPUT_DIM, OUTPUT_DIM))
    point = padded(U, S, V, 6)
    moved = retract(point, sgd(point, G, 0.1))
    step = -0.1 * reference.tangent_projection(U, V, G[0])
    error = np.linalg.norm(product(moved)[0] - step)
    assert error < 5e-5 * np.linalg.norm(step)
    assert ranks(moved)[0] == 6


def test_where_nothing_moved_from_zero_the_point_stays_as_it_is(rng):
    U, S, V = reference.random_factors(rng, INPUT_DIM, OUTPUT_DIM, (0.0,) * 3)
    point = padded(U, S, V, 6)
    moved = retract(point, numpy(lift(point)), tolerance=0.1)
    for before, after in zip(point, moved, strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("true_rank", [1, 2])
def test_a_gradient_of_low_rank_adds_no_spurious_directions(rng, true_rank):
    U, S, V = reference.random_factors(rng, INPUT_DIM, OUTPUT_DIM, SIGMA)
    G = rng.normal(size=(INPUT_DIM, true_rank)) @ rng.normal(
        size=(true_rank, OUTPUT_DIM)
    )
    point = padded(U, S, V, 8)
    moved = retract(point, sgd(point, G[None], 0.1))
    assert ranks(moved)[0] <= 4 + true_rank
    step = -0.1 * reference.tangent_projection(U, V, G)
    error = product(moved)[0] - (U @ S @ V.T + step)
    assert np.linalg.norm(error) < 5e-5 * np.linalg.norm(step)
    check_invariants(moved)


def test_the_discarded_norm_is_within_tolerance(rng):
    sigma = 1.0 / np.arange(1, 13)
    U, S, V = reference.random_factors(rng, INPUT_DIM, OUTPUT_DIM, sigma)
    point = padded(U, S, V, 12)
    moved = retract(point, numpy(lift(point)), tolerance=0.15)
    discarded = np.linalg.norm(product(moved) - product(point))
    assert 0 < discarded <= 0.15 * np.linalg.norm(product(point))
    assert ranks(moved)[0] == reference.truncated_rank(sigma, 0.15, 1, 12)


def test_min_rank_holds_under_any_tolerance(rng):
    U, S, V = reference.random_factors(rng, INPUT_DIM, OUTPUT_DIM, SIGMA)
    point = padded(U, S, V, 6)
    moved = retract(point, numpy(lift(point)), 0.9, min_rank=3)
    assert ranks(moved)[0] == 3


def test_a_full_buffer_keeps_moving_its_subspace(rng):
    U, S, V = reference.random_factors(rng, INPUT_DIM, OUTPUT_DIM, SIGMA)
    point = padded(U, S, V, 4)
    G = rng.normal(size=(1, INPUT_DIM, OUTPUT_DIM))
    moved = retract(point, sgd(point, G, 0.5))
    assert ranks(moved)[0] == 4
    overlap = point.U[0].T @ moved.U[0]
    kept = np.linalg.svd(overlap, compute_uv=False)
    assert kept.min() < 0.99  # some of the old subspace is gone


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1.0, 1e12, 1e25])
def test_bases_stay_orthonormal_at_any_size_of_the_step(rng, size):
    U, S, V = reference.random_factors(rng, INPUT_DIM, OUTPUT_DIM, (0.0,) * 3)
    point = padded(U, S, V, 6)
    for _ in range(5):
        G = size * rng.normal(size=(1, INPUT_DIM, OUTPUT_DIM))
        before = product(point)
        moved = retract(point, sgd(point, G, 0.1))
        check_invariants(moved)
        assert np.isfinite(product(moved)).all()
        assert np.linalg.norm(product(moved) - before) > 0.01 * size
        point = moved


def test_a_residual_of_rounding_noise_adds_nothing(rng):
    basis = reference.random_factors(rng, 200, 10, (1.0,) * 4)[0]
    basis = ops.convert_to_tensor(basis[None].astype("float32"))
    mixed = ops.convert_to_tensor(rng.normal(size=(1, 4, 4)).astype("float32"))
    found = new_directions(basis, ops.matmul(basis, mixed))
    np.testing.assert_array_equal(ops.convert_to_numpy(found), 0.0)


def test_new_directions_of_very_different_size_are_all_found(rng):
    basis, _, _ = reference.random_factors(rng, 60, 10, (1.0,) * 4)
    sizes = np.array([1.0, 1e-2, 1e-4, 1e-5])
    fresh = rng.normal(size=(60, 4))
    fresh = np.linalg.qr(fresh - basis @ (basis.T @ fresh))[0]
    X = fresh * sizes @ reference.random_factors(rng, 4, 4, (1.0,) * 4)[0].T
    found = new_directions(
        ops.convert_to_tensor(basis[None].astype("float32")),
        ops.convert_to_tensor(X[None].astype("float32")),
    )
    found = ops.convert_to_numpy(found)[0].astype("float64")
    np.testing.assert_allclose(found.T @ found, np.eye(4), atol=1e-5)
    assert np.abs(basis.T @ found).max() < 1e-5
    residual = fresh - found @ (found.T @ fresh)
    assert (np.linalg.norm(residual, axis=0) < [1e-5, 1e-4, 1e-2, 0.1]).all()


@pytest.mark.parametrize("lr", [1e-2, 1e-4, 1e-6])
def test_directions_join_however_small_they_are_at_first(rng, lr):
    U, S, V = reference.random_factors(rng, INPUT_DIM, OUTPUT_DIM, (1.0, 0.5))
    point = padded(U, S, V, 4)
    G = rng.normal(size=(1, INPUT_DIM, OUTPUT_DIM))
    for _ in range(3):
        point = retract(point, sgd(point, G, lr))
        check_invariants(point)
    assert ranks(point)[0] == 4
    # From the second step on they grow as the others do.
    sigma = np.diag(np.asarray(point.S[0], "float64"))
    assert 0.1 * lr < sigma[3] < 20 * lr


@pytest.mark.parametrize("side", ["U", "V"])
def test_directions_of_one_side_alone_add_no_rank(rng, side):
    U, S, V = reference.random_factors(rng, INPUT_DIM, OUTPUT_DIM, SIGMA[:3])
    point = padded(U, S, V, 6)
    inside = rng.normal(size=(3, 3))
    outside = rng.normal(size=(INPUT_DIM, OUTPUT_DIM))
    outside = outside @ V @ V.T if side == "U" else U @ U.T @ outside
    moved = retract(point, sgd(point, (outside + U @ inside @ V.T)[None], 0.1))
    assert ranks(moved)[0] == 3
    check_invariants(moved)
