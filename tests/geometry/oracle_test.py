"""Matrix regression through `fit`: the right answer is known."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_geolora import GeoLoRA, GeoLoRADense

INPUT_DIM, OUTPUT_DIM, TRUE_RANK = 96, 64, 6
STEPS, BATCH = 400, 64
SGD = {"class_name": "SGD", "config": {"learning_rate": 0.2}}
ADAM = {"class_name": "Adam", "config": {"learning_rate": 3e-3}}

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.fixture(scope="module")
def regression():
    """Inputs of condition 10 and the outputs of a matrix of rank 6."""
    rng = np.random.default_rng(1)
    U = np.linalg.qr(rng.normal(size=(INPUT_DIM, TRUE_RANK)))[0]
    V = np.linalg.qr(rng.normal(size=(OUTPUT_DIM, TRUE_RANK)))[0]
    target = U @ np.diag(np.geomspace(1, 0.1, TRUE_RANK)) @ V.T
    x = rng.normal(size=(STEPS * BATCH, INPUT_DIM))
    x *= np.sqrt(np.geomspace(1, 0.1, INPUT_DIM))
    return x.astype("float32"), (x @ target).astype("float32"), target


def half_squared_error(y, prediction):
    return 0.5 * ops.sum(ops.square(y - prediction), axis=-1)


def train(regression, optimizer, ranks):
    """Trains a layer from each rank, all at once on the same inputs."""
    x, y, _ = regression
    layers = [
        GeoLoRADense(
            OUTPUT_DIM,
            use_bias=False,
            kernel_initializer="zeros",
            rank=rank,
            max_rank=16,
            seed=1,
        )
        for rank in ranks
    ]
    inputs = keras.Input((INPUT_DIM,))
    model = keras.Model(inputs, [layer(inputs) for layer in layers])
    losses = [half_squared_error] * len(layers)
    model.compile(optimizer=optimizer, loss=losses)
    model.fit(x, [y] * len(layers), batch_size=BATCH, shuffle=False, verbose=0)
    return layers


def errors(layer, target):
    """Returns how far a layer is from the target, and its bases from one."""
    delta = ops.convert_to_numpy(layer.delta())
    U = ops.convert_to_numpy(layer.adapter.U)[:, : layer.rank]
    V = ops.convert_to_numpy(layer.adapter.V)[:, : layer.rank]
    drift = max(abs(B.T @ B - np.eye(layer.rank)).max() for B in (U, V))
    return np.linalg.norm(delta - target) / np.linalg.norm(target), drift


@pytest.mark.parametrize("inner", [SGD, ADAM], ids=["sgd", "adam"])
def test_the_true_matrix_and_its_rank_are_found(regression, inner):
    optimizer = GeoLoRA(keras.optimizers.get(inner), tolerance=0.02)
    for layer in train(regression, optimizer, ranks=(2, 16)):
        error, drift = errors(layer, regression[-1])
        assert error < 1e-4
        assert layer.rank == TRUE_RANK
        assert drift < 2e-5


TRUE_RANKS = (1, 4, 10)


def random_matrix(rng, sizes):
    U = np.linalg.qr(rng.normal(size=(INPUT_DIM, len(sizes))))[0]
    V = np.linalg.qr(rng.normal(size=(OUTPUT_DIM, len(sizes))))[0]
    return U, np.diag(sizes), V


def layer_of(rank):
    return GeoLoRADense(
        OUTPUT_DIM,
        use_bias=False,
        kernel_initializer="zeros",
        rank=rank,
        max_rank=16,
        seed=rank,
    )


@pytest.mark.parametrize("start, inner", [(2, ADAM), (10, SGD)])
def test_a_budget_is_spent_where_ranks_are_needed(start, inner):
    rng = np.random.default_rng(2)
    matrices = [
        random_matrix(rng, np.geomspace(1, 0.3, rank)) for rank in TRUE_RANKS
    ]
    x = rng.normal(size=(500 * BATCH, INPUT_DIM)).astype("float32")
    y = [(x @ (U @ S @ V.T)).astype("float32") for U, S, V in matrices]
    layers = [layer_of(start) for _ in TRUE_RANKS]
    inputs = keras.Input((INPUT_DIM,))
    model = keras.Model(inputs, [layer(inputs) for layer in layers])
    optimizer = GeoLoRA(
        keras.optimizers.get(inner), 0.02, rank_budget=sum(TRUE_RANKS)
    )
    model.compile(optimizer, loss=[half_squared_error] * len(layers))
    model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
    assert tuple(layer.rank for layer in layers) == TRUE_RANKS


def test_directions_that_join_late_are_found():
    rng = np.random.default_rng(0)
    U, S, V = random_matrix(rng, [10, 8, 1, 0.7, 0.5, 0.3])
    target = U @ S @ V.T
    layer = layer_of(2)
    model = keras.Sequential([keras.Input((INPUT_DIM,)), layer])
    layer.adapter.assign_factors(U[:, :2], S[:2, :2], V[:, :2])
    optimizer = GeoLoRA(keras.optimizers.Adam(1e-3), tolerance=0.02)
    model.compile(optimizer, loss=half_squared_error)
    x = rng.normal(size=(1000 * BATCH, INPUT_DIM)).astype("float32")
    y = (x @ target).astype("float32")
    model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
    left = np.linalg.norm(ops.convert_to_numpy(layer.delta()) - target)
    assert left < 0.1 * np.linalg.norm(S[2:])
    assert layer.rank == TRUE_RANK
