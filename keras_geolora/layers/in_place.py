"""Changes the class or an attribute of a layer in place."""

import contextlib
import contextvars

import keras

from keras_geolora.keras_internals import unlist_attributes

# Ids of the layers that are reading their own kernels, in this thread.
READERS = contextvars.ContextVar("keras_geolora_readers", default=())


@contextlib.contextmanager
def reading_itself(layer):
    """Lets a layer read its kernels without the update, even in a call."""
    token = READERS.set((*READERS.get(), id(layer)))
    try:
        yield
    finally:
        READERS.reset(token)


def forget_attributes(layer, names):
    """Deletes attributes of a layer, also from the backend's lists."""
    for name in names:
        if name in vars(layer):
            delattr(layer, name)
    unlist_attributes(layer, names)


@contextlib.contextmanager
def name_scopes_of(layer):
    """Gives new variables the paths they would get in the layer's `build`."""
    with contextlib.ExitStack() as scopes:
        for part in (layer.path or layer.name).split("/"):
            scopes.enter_context(keras.name_scope(part))
        yield


def become_adapted(layer, cls):
    """Gives a layer or model an adapted class, in place."""
    layer.__class__ = cls
    # Keras stores a bound `quantize` in every layer, which hides ours.
    if "quantize" in vars(layer):
        vars(layer)["_plain_class_quantize"] = vars(layer).pop("quantize")


def become_plain(layer):
    """Gives a layer or model its former class back."""
    layer.__class__ = getattr(layer, "plain_class", type(layer))
    if "_plain_class_quantize" in vars(layer):
        vars(layer)["quantize"] = vars(layer).pop("_plain_class_quantize")


@contextlib.contextmanager
def set_aside(layer, attribute):
    """Sets an attribute of a layer to `None` for a block."""
    value = getattr(layer, attribute)
    # Bypasses Keras, which would track a layer, and torch, which keeps modules
    # elsewhere.
    there = attribute in vars(layer)
    vars(layer)[attribute] = None
    try:
        yield value
    finally:
        if there:
            vars(layer)[attribute] = value
        else:
            del vars(layer)[attribute]
