"""Decompositions, where the library that computes them gives up."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_geolora.geometry import decompositions

pytestmark = pytest.mark.skipif(
    keras.backend.backend() == "jax",
    reason="JAX raises no error, see groups_test",
)


@pytest.fixture
def matrix():
    X = np.random.default_rng(0).normal(size=(2, 6, 6)).astype("float32")
    return X @ X.swapaxes(1, 2)


def failing_once(function, calls):
    def decompose(x):
        calls.append(x.dtype)
        if len(calls) == 1:  # as `torch.linalg.LinAlgError`
            raise RuntimeError("The algorithm failed to converge")
        return function(x)

    return decompose


@pytest.mark.parametrize("name", ["eigh", "svd"])
def test_what_did_not_converge_is_tried_again(name, matrix, monkeypatch):
    expected = getattr(decompositions, name)(ops.convert_to_tensor(matrix))
    calls = []
    monkeypatch.setattr(ops, name, failing_once(getattr(ops, name), calls))
    found = getattr(decompositions, name)(ops.convert_to_tensor(matrix))
    assert len(calls) == 2
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        x, y = np.abs(ops.convert_to_numpy(x)), np.abs(ops.convert_to_numpy(y))
        np.testing.assert_allclose(x, y, atol=1e-4)


def test_what_fails_twice_is_an_error():
    """Also what is no lack of convergence at all."""

    def decompose(x):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        decompositions.again_in_float64(decompose, ops.ones((2, 2)))
