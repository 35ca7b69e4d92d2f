"""Layers that change their class, or lose an attribute, in place."""

import contextlib
import contextvars

import keras

from keras_geolora.keras_internals import unlist_attributes

# The layers that read their kernels themselves at the moment, in this thread.
READERS = contextvars.ContextVar("keras_geolora_readers", default=())


@contextlib.contextmanager
def reading_itself(layer):
    """Lets a layer read its kernels as they are, also while it is called."""
    token = READERS.set((*READERS.get(), id(layer)))
    try:
        yield
    finally:
        READERS.reset(token)


def forget_attributes(layer, names):
    """Deletes attributes of a layer, also where a backend knows their names."""
    for name in names:
        if name in vars(layer):
            delattr(layer, name)
    unlist_attributes(layer, names)


@contextlib.contextmanager
def name_scopes_of(layer):
    """Gives variables the paths that they get where the layer is built."""
    with contextlib.ExitStack() as scopes:
        for part in layer.path.split("/"):
            scopes.enter_context(keras.name_scope(part))
        yield


def become_adapted(layer, cls):
    """Gives a layer or model a class of ours, in place."""
    layer.__class__ = cls
    # Keras keeps a bound `quantize` with every layer, which hides ours.
    if "quantize" in vars(layer):
        vars(layer)["_plain_class_quantize"] = vars(layer).pop("quantize")


def become_plain(layer):
    """Gives a layer or model back the class that it had."""
    layer.__class__ = getattr(layer, "plain_class", type(layer))
    if "_plain_class_quantize" in vars(layer):
        vars(layer)["quantize"] = vars(layer).pop("_plain_class_quantize")


@contextlib.contextmanager
def set_aside(layer, attribute):
    """Lets a layer do without the value of an attribute for a while."""
    value = getattr(layer, attribute)
    # Written past Keras, which would track a layer, and past torch, which
    # keeps modules elsewhere.
    there = attribute in vars(layer)
    vars(layer)[attribute] = None
    try:
        yield value
    finally:
        if there:
            vars(layer)[attribute] = value
        else:
            del vars(layer)[attribute]
