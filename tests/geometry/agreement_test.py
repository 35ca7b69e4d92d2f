"""Twenty steps through Keras against the float64 reference.

What agrees with the reference within 5e-5 on every backend agrees between
any two within 1e-4.
"""

import keras
import numpy as np
import pytest
import reference
from keras import ops

from keras_geolora import GeoLoRA, GeoLoRADense

INPUT_DIM, OUTPUT_DIM, MAX_RANK, STEPS, BATCH = 20, 14, 6, 20, 8


@pytest.fixture
def problem():
    rng = np.random.default_rng(11)
    factors = reference.random_factors(rng, INPUT_DIM, OUTPUT_DIM, (1.0, 0.2))
    x = rng.normal(size=(STEPS, BATCH, INPUT_DIM))
    y = x @ rng.normal(size=(INPUT_DIM, OUTPUT_DIM))
    return factors, x, y


def half_squared_error(y, prediction):
    return 0.5 * ops.sum(ops.square(y - prediction), axis=-1)


def train(optimizer, factors, x, y):
    """Trains a layer from given factors; returns its update."""
    layer = GeoLoRADense(
        OUTPUT_DIM,
        use_bias=False,
        kernel_initializer="zeros",
        rank=2,
        max_rank=MAX_RANK,
    )
    model = keras.Sequential([keras.Input((INPUT_DIM,)), layer])
    reference.put_factors(layer.adapter, *factors)
    model.compile(optimizer=optimizer, loss=half_squared_error)
    for x_batch, y_batch in zip(x, y, strict=True):
        model.train_on_batch(
            x_batch.astype("float32"), y_batch.astype("float32")
        )
    return ops.convert_to_numpy(layer.delta()), layer.rank


def gradient(delta, x, y):
    return x.T @ (x @ delta - y) / BATCH


def check(found, rank, expected, expected_rank):
    assert rank == expected_rank
    error = np.linalg.norm(found - expected)
    assert error < 5e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("tolerance", [0.0, 0.1])
def test_sgd_follows_the_reference(problem, tolerance):
    factors, x, y = problem
    optimizer = GeoLoRA(
        keras.optimizers.SGD(0.02), tolerance=tolerance, cut_interval=1
    )
    found, rank = train(optimizer, factors, x, y)
    U, S, V = factors
    for x_batch, y_batch in zip(x, y, strict=True):
        G = gradient(U @ S @ V.T, x_batch, y_batch)
        U, S, V = reference.sgd_step(
            U, S, V, G, 0.02, tolerance=tolerance, max_rank=MAX_RANK
        )
    check(found, rank, U @ S @ V.T, len(S))


# After which updates adapters are retracted, apart from cuts.
RETRACTED = {
    1: range(STEPS + 1),
    3: range(0, STEPS + 1, 3),
    "auto": [1, 2, 3, 4, 6, 7, 9, 11, 14, 18],
}


@pytest.mark.parametrize("interval", RETRACTED)
@pytest.mark.parametrize("cut_interval", [1, 5])
def test_adam_follows_the_reference(problem, cut_interval, interval):
    factors, x, y = problem
    optimizer = GeoLoRA(
        keras.optimizers.Adam(0.01),
        tolerance=0.1,
        cut_interval=cut_interval,
        retraction_interval=interval,
    )
    found, rank = train(optimizer, factors, x, y)
    adam = reference.Adam(*factors, lr=0.01, averages=interval == 1)
    for step, (x_batch, y_batch) in enumerate(zip(x, y, strict=True), 1):
        adam.step(gradient(adam.delta(), x_batch, y_batch))
        cut = step % cut_interval == 0
        if cut or step in RETRACTED[interval]:
            tolerance = 0.1 if cut else 0.0
            adam.retract(tolerance=tolerance, max_rank=MAX_RANK)
    check(found, rank, adam.delta(), len(adam.S))
