"""Rounding errors must not add up over a long training."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_geolora import GeoLoRA, GeoLoRADense

STEPS = 10_000

pytestmark = pytest.mark.usefixtures("optimized")


def random_gradients(size):
    """A loss whose gradient is random and of a given size."""

    def loss(y, prediction):
        return size * ops.sum(y * prediction, axis=-1)

    return loss


@pytest.mark.slow("ten thousand steps, one after the other")
def test_bases_stay_orthonormal_for_10000_random_steps():
    rng = np.random.default_rng(3)
    sizes = (1e-12, 1.0, 1e12, 0.0)
    layers = [
        GeoLoRADense(9, rank=3, max_rank=5, seed=0, use_bias=False)
        for _ in sizes
    ]
    inputs = keras.Input((12,))
    # One loss of all: what is around the steps takes longer than they do.
    outputs = ops.concatenate([layer(inputs) for layer in layers], axis=-1)
    model = keras.Model(inputs, outputs)
    on_tensorflow = keras.backend.backend() == "tensorflow"
    model.compile(
        optimizer=GeoLoRA("sgd"),
        loss=random_gradients(1.0),
        steps_per_execution=100 if on_tensorflow else 1,
    )
    x = rng.normal(size=(STEPS, 12)).astype("float32")
    y = rng.normal(size=(STEPS, 9)).astype("float32")
    y = np.concatenate([np.float32(size) * y for size in sizes], axis=1)
    model.fit(x, y, batch_size=1, verbose=0)
    for layer, size in zip(layers, sizes, strict=True):
        assert layer.rank >= 3
        for basis in (layer.adapter.U, layer.adapter.V):
            basis = ops.convert_to_numpy(basis)
            active = basis[:, : layer.rank]
            gram = active.T @ active
            assert np.abs(gram - np.eye(layer.rank)).max() < 1e-5
            assert (basis[:, layer.rank :] == 0).all()
        delta = np.linalg.norm(ops.convert_to_numpy(layer.delta()))
        assert delta > 0.1 * size if size else delta == 0


def test_a_layer_without_gradient_starts_to_learn_when_it_gets_one():
    rng = np.random.default_rng(3)
    layer = GeoLoRADense(9, rank=3, seed=0)
    model = keras.Sequential([keras.Input((12,)), layer])
    model.compile(
        optimizer=GeoLoRA(keras.optimizers.Adam(1e-2)),
        loss=random_gradients(1.0),
    )
    x = rng.normal(size=(64, 12)).astype("float32")
    y = np.tile(rng.normal(size=(1, 9)), (64, 1)).astype("float32")
    bases = ops.convert_to_numpy(layer.adapter.U)
    model.fit(x, 0 * y, batch_size=1, verbose=0)
    np.testing.assert_array_equal(bases, ops.convert_to_numpy(layer.adapter.U))
    np.testing.assert_array_equal(ops.convert_to_numpy(layer.delta()), 0)
    model.fit(x, y, batch_size=1, verbose=0)
    assert np.linalg.norm(ops.convert_to_numpy(layer.delta())) > 0.01
