"""Training that teaches nothing must not go unnoticed."""

import warnings

import keras
import numpy as np
import pytest

from keras_geolora import GeoLoRA

X = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
Y = np.random.default_rng(1).normal(size=(32, 8)).astype("float32")


def fit(model, rate=0.01, loss="mse", **options):
    model.compile(GeoLoRA(keras.optimizers.SGD(rate)), loss=loss, **options)
    return warned(model)


def warned(model, x=X, y=Y, epochs=2):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x, y, batch_size=8, epochs=epochs, verbose=0)
    return [
        str(w.message) for w in caught if "first epoch" in str(w.message)
    ] + [str(w.message) for w in caught if "last layer" in str(w.message)]


def sequential(*layers):
    return keras.Sequential([keras.Input((8,)), *layers])


def test_a_healthy_training_says_nothing():
    model = sequential(keras.layers.Dense(8), keras.layers.Dense(8))
    model.enable_geolora(rank=2)
    assert fit(model) == []


def test_adapters_that_do_not_move_are_reported_once():
    model = sequential(keras.layers.Dense(8))
    model.enable_geolora(rank=2)
    (message,) = fit(model, rate=0.0)
    assert "None of the 1 adapters" in message and "learning rate" in message
    for epochs in (1, 3):
        assert warned(model, epochs=epochs) == [message]


def test_an_adapter_that_the_loss_does_not_see_is_reported():
    inputs = keras.Input((8,))
    seen = keras.layers.Dense(8, name="seen")(inputs)
    unseen = keras.layers.Dense(8, name="unseen")(inputs)
    model = keras.Model(inputs, seen + 0.0 * unseen)
    model.enable_geolora(rank=2)
    (message,) = fit(model)
    assert "1 of 2 adapters" in message and "(unseen)" in message


def test_an_adapter_that_somebody_froze_may_stand_still():
    model = sequential(keras.layers.Dense(8), keras.layers.Dense(8))
    model.enable_geolora(rank=2, train_bias=True)
    model.layers[0].adapter.trainable = False
    assert fit(model) == []
    model.layers[1].adapter.trainable = False
    (message,) = fit(model)
    assert "None of the 2 adapters has moved" in message


def test_a_frozen_head_is_reported():
    model = sequential(
        keras.layers.Dense(8), keras.layers.Dense(8, name="head")
    )
    model.enable_geolora(rank=2, exclude="head")
    (message,) = fit(model)
    assert "'head', is frozen" in message and "modules_to_save" in message
    model.remove_geolora()
    model.enable_geolora(rank=2, modules_to_save="head")
    assert fit(model) == []


def constant(y, prediction):
    return keras.ops.sum(
        prediction - keras.ops.stop_gradient(prediction) + 2.0, axis=-1
    )


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_loss_that_does_not_change_is_reported(at_once):
    if at_once > 1 and keras.backend.backend() == "torch":
        pytest.skip("Keras on torch has no `steps_per_execution`")
    model = sequential(keras.layers.Dense(8), keras.layers.Dense(8))
    model.enable_geolora(rank=2)
    (message,) = fit(model, loss=constant, steps_per_execution=at_once)
    assert "loss has not changed" in message and "it is 16" in message
    one_an_epoch = 8 * at_once  # does not change either
    assert warned(model, X[:one_an_epoch], Y[:one_an_epoch]) == []
