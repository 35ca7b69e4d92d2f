"""Matrix regression through `fit`: the right answer is known."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_geolora import GeoLoRA, GeoLoRADense

INPUT_DIM, OUTPUT_DIM, TRUE_RANK = 96, 64, 6
STEPS, BATCH = 400, 64


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


def train(regression, optimizer, rank):
    x, y, target = regression
    layer = GeoLoRADense(
        OUTPUT_DIM,
        use_bias=False,
        kernel_initializer="zeros",
        rank=rank,
        max_rank=16,
        seed=1,
    )
    model = keras.Sequential([keras.Input((INPUT_DIM,)), layer])
    model.compile(optimizer=optimizer, loss=half_squared_error)
    model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
    delta = ops.convert_to_numpy(layer.delta())
    error = np.linalg.norm(delta - target) / np.linalg.norm(target)
    U = ops.convert_to_numpy(layer.adapter.U)[:, : layer.rank]
    V = ops.convert_to_numpy(layer.adapter.V)[:, : layer.rank]
    drift = max(abs(B.T @ B - np.eye(layer.rank)).max() for B in (U, V))
    return error, layer.rank, drift


@pytest.mark.parametrize("rank", [2, 16])
@pytest.mark.parametrize(
    "inner",
    [
        {"class_name": "SGD", "config": {"learning_rate": 0.2}},
        {"class_name": "Adam", "config": {"learning_rate": 3e-3}},
    ],
    ids=["sgd", "adam"],
)
def test_the_true_matrix_and_its_rank_are_found(regression, inner, rank):
    optimizer = GeoLoRA(keras.optimizers.get(inner), tolerance=0.02)
    error, found, drift = train(regression, optimizer, rank)
    assert error < 1e-4
    assert found == TRUE_RANK
    assert drift < 2e-5
