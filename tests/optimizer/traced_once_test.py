"""A step is traced once for all models, and computes the same."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_geolora.geometry import integrator
from keras_geolora.geometry.transport import transport
from keras_geolora.optimizer.groups import cut
from keras_geolora.optimizer.traced_once import program, traced_once

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="elsewhere functions are called as they are",
)
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
    """A compiled retraction in which functions are called in a certain way."""
    import tensorflow as tf

    def retract(block):
        augmented = call(integrator.augment, RANK, block)
        rank = ops.ones_like(augmented.size[..., 0], dtype="int32")
        move, share = call(cut, RANK, augmented, rank)
        slots = integrator.lift(block)
        return move, share, call(transport, RANK, "linear", slots, move)

    return tf.function(retract, autograph=False)


def directly(function, rank, *args):
    del rank
    return function(*args)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shared_graph_gives_the_same_numbers(shape):
    block = between_two_retractions(*shape)
    expected = retraction(directly)(block)
    found = retraction(traced_once)(block)
    for one, other in zip(
        keras.tree.flatten(found), keras.tree.flatten(expected), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_adapters_of_any_shape_and_number_share_a_graph():
    def traces():
        programs = map(program, SHARED)
        return [x.experimental_get_tracing_count() for x in programs]

    retraction(traced_once)(between_two_retractions(3, 9, 7))
    before = traces()
    retraction(traced_once)(between_two_retractions(5, 8, 11))
    assert traces() == before and min(before) > 0


def test_what_is_not_traced_makes_no_graph():
    def square(x):
        return x * x

    assert float(traced_once(square, RANK, ops.convert_to_tensor(3.0))) == 9
    assert program(square).experimental_get_tracing_count() == 0
