"""Activations may be computed anew: `keras.RematScope`."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_geolora import GeoLoRA, GeoLoRADense
from keras_geolora.layers.tree import adapted_layers

X = np.random.default_rng(0).normal(size=(8, 20, 6)).astype("float32")
Y = np.random.default_rng(1).normal(size=(8, 20, 5)).astype("float32")


class Block(keras.layers.Layer):
    """A layer that hands nothing on of what it is told about training."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.wide = keras.layers.Dense(12, activation="tanh")
        self.narrow = keras.layers.EinsumDense("abc,cd->abd", (None, 6))

    def build(self, shape):
        self.wide.build(shape)
        self.narrow.build((*shape[:-1], 12))

    def call(self, x):
        return x + self.narrow(self.wide(x))


def model_of(scope=None):
    keras.utils.set_random_seed(0)
    if scope is None:
        return plain()
    with scope:
        return plain()


def plain():
    return keras.Sequential(
        [keras.Input((20, 6)), Block(name="block"), keras.layers.Dense(5)]
    )


def trained(model):
    model.enable_geolora(rank=2, max_rank=4, seed=0)
    model.compile(GeoLoRA(keras.optimizers.Adam(1e-2)), loss="mse")
    model.fit(X, Y, batch_size=4, epochs=3, shuffle=False, verbose=0)
    return [
        ops.convert_to_numpy(x.delta()) for x in adapted_layers(model).values()
    ]


def scopes():
    yield "activations", lambda: keras.RematScope("activations")
    # On TensorFlow, Keras cannot compute anew a layer that is called with
    # arguments by name, as it calls every layer that knows `training`.
    if keras.backend.backend() != "tensorflow":
        yield "full", lambda: keras.RematScope("full")
        yield (
            "block",
            lambda: keras.RematScope("list_of_layers", layer_names=["block"]),
        )


@pytest.mark.parametrize(
    "scope", [pytest.param(scope, id=name) for name, scope in scopes()]
)
def test_training_is_that_without_remat(scope):
    expected = trained(model_of())
    for ours, theirs in zip(trained(model_of(scope())), expected, strict=True):
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < 1e-4


def test_a_traced_training_drops_as_a_known_one_does():
    layer = GeoLoRADense(5, rank=2, dropout=0.5, seed=0)
    layer.build((None, 6))
    layer.adapter.S.assign(np.eye(4))
    x = X.reshape(-1, 6)
    seed = layer.adapter.dropout.variables[0]
    for training in (False, True):
        seed.assign([0, 0])
        known = layer.adapter(x, training=training)
        seed.assign([0, 0])
        traced = layer.adapter.drop(x, ops.convert_to_tensor(training))
        dropped = np.mean(ops.convert_to_numpy(traced) == 0) > 0.3
        assert dropped == training
        same = layer.adapter(traced, training=False)
        np.testing.assert_allclose(
            ops.convert_to_numpy(known), ops.convert_to_numpy(same), atol=1e-5
        )
