"""A step is traced once for all models, and computes the same."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_geolora.geometry import integrator
from keras_geolora.geometry.transport import transport
from keras_geolora.optimizer.groups import cut
from keras_geolora.optimizer.traced_once import program, traced_once

BACKEND = keras.backend.backend()
on_tensorflow = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="about graphs of TensorFlow"
)
# On JAX operations are fused, which rounds differently.
CLOSE = {"rtol": 1e-4, "atol": 1e-5} if BACKEND == "jax" else {"rtol": 0}
RANK = 2
SHARED = integrator.augment, cut, transport
# Matrices, rows and columns.
SHAPES = (3, 9, 7), (1, 6, 5), (2, 2 * RANK, RANK), (RANK, 5, 1)


def between_two_retractions(matrices, rows, columns):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=(matrices, *shape))

    U, V = normal(rows, RANK), normal(columns, RANK)
    S, P, Q = normal(RANK, RANK), normal(rows, RANK), normal(columns, RANK)
    if columns >= RANK:
        U, V = np.linalg.qr(U)[0], np.linalg.qr(V)[0]
    arrays = [x.astype("float32") for x in (U, S, V, P, Q)]
    return integrator.Block(*map(ops.convert_to_tensor, arrays))


def retraction(call):
    """A retraction in which functions are called in a certain way."""

    def retract(block):
        augmented = call(integrator.augment, RANK, block)
        rank = ops.ones_like(augmented.size[..., 0], dtype="int32")
        move, share = call(cut, RANK, augmented, rank)
        slots = integrator.lift(block)
        return move, share, call(transport, RANK, "linear", slots, move)

    if BACKEND != "tensorflow":
        return retract
    import tensorflow as tf

    return tf.function(retract, autograph=False)


def directly(function, rank, *args):
    del rank
    return function(*args)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shared_program_gives_the_same_numbers(shape):
    block = between_two_retractions(*shape)
    expected = retraction(directly)(block)
    found = retraction(traced_once)(block)
    for one, other in zip(
        keras.tree.flatten(found), keras.tree.flatten(expected), strict=True
    ):
        one, other = ops.convert_to_numpy(one), ops.convert_to_numpy(other)
        np.testing.assert_allclose(one, other, **CLOSE)


@on_tensorflow
def test_adapters_of_any_shape_and_number_share_a_graph():
    def traces():
        programs = map(program, SHARED)
        return [x.experimental_get_tracing_count() for x in programs]

    retraction(traced_once)(between_two_retractions(3, 9, 7))
    before = traces()
    retraction(traced_once)(between_two_retractions(5, 8, 11))
    assert traces() == before and min(before) > 0


@on_tensorflow
def test_what_is_not_traced_makes_no_graph():
    def square(x):
        return x * x

    assert float(traced_once(square, RANK, ops.convert_to_tensor(3.0))) == 9
    assert program(square).experimental_get_tracing_count() == 0


@pytest.mark.skipif(BACKEND != "jax", reason="only JAX compiles operations")
def test_a_step_that_is_not_compiled_compiles_functions_as_a_whole():
    traces = []

    def square(kind, x):
        traces.append(kind)
        return x * x

    for value in (3.0, 4.0):
        x = ops.convert_to_tensor(value)
        assert float(traced_once(square, RANK, "plain", x)) == value * value
    assert traces == ["plain"]
    traced_once(square, RANK, "other", x)
    assert traces == ["plain", "other"]
