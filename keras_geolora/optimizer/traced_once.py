"""Functions of arrays that TensorFlow traces once, and not for every model.

Tracing the return to the manifold takes half a second, and nothing of it
depends on the model: only on the rank and on the kinds of the arguments.
"""

import functools

import keras

ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
if ON_TENSORFLOW:
    import tensorflow as tf


def traced_once(function, rank, *args):
    """Calls a function, in a trace of TensorFlow by a graph that all share.

    TensorFlow puts the operations of the graph in the place of the call before
    it runs them. Leading axes, and others that are no ranks, are left open in
    the graph: it serves adapters of all shapes.

    Args:
        function: Function of strings and of arrays, or nested tuples of them,
            with one leading axis over matrices. It must be pure.
        rank: Int, the `max_rank` of the adapters.
        *args: What it is called with.

    Returns:
        What the function returns. In a trace the shapes may be less known than
        they are, see `with_shape`.
    """
    if not ON_TENSORFLOW or not tf.inside_function():
        return function(*args)
    args = tf.nest.map_structure(as_tensor, args)
    specs = tf.nest.map_structure(
        functools.partial(with_open_axes, rank=rank), args
    )
    graph = program(function).get_concrete_function(*specs)
    return graph(*filter(tf.is_tensor, tf.nest.flatten(args)))


@functools.cache
def program(function):
    """Returns the traces of a function, as TensorFlow keeps them."""
    return tf.function(function, autograph=False)


def as_tensor(x):
    """Converts what is no string to a tensor."""
    return x if isinstance(x, str) else tf.convert_to_tensor(x)


def with_open_axes(x, rank):
    """Describes a tensor, with the length of those axes only that are ranks."""
    if isinstance(x, str):
        return x
    known = 1, rank, 2 * rank
    shape = [
        size if axis and size in known else None
        for axis, size in enumerate(x.shape)
    ]
    return tf.TensorSpec(shape, x.dtype)


def with_shape(array, shape):
    """Returns an array, of whose shape a trace of TensorFlow may know less."""
    if ON_TENSORFLOW:
        array.set_shape(shape)
    return array
