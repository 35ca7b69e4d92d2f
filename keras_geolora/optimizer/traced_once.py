"""Functions of arrays that are traced once, and not for every model.

Nothing of a return to the manifold depends on the model: only on the rank, the
shapes, and the kinds of the arguments. On TensorFlow tracing it takes half a
second. On JAX it has a hundred operations, each of which is a program of its
own in a step that is not compiled.
"""

import functools

import keras

ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
ON_JAX = keras.backend.backend() == "jax"
if ON_TENSORFLOW:
    import tensorflow as tf
elif ON_JAX:
    import jax


def traced_once(function, rank, *args):
    """Calls a function by a program that all models share.

    On TensorFlow, in a trace: by a graph, whose operations take the place of
    the call before they run. Leading axes, and others that are no ranks, are
    left open, so that it serves adapters of all shapes. On JAX: by a compiled
    function, one for each set of shapes. On torch, and on TensorFlow outside of
    a trace, the function is called as it is.

    Args:
        function: Function of strings and of arrays, or nested tuples of them,
            with one leading axis over matrices. It must be pure.
        rank: Int, the `max_rank` of the adapters.
        *args: What it is called with.

    Returns:
        What the function returns. In a trace of TensorFlow the shapes may be
        less known than they are, see `with_shape`.
    """
    if ON_JAX:
        words = tuple(i for i, x in enumerate(args) if isinstance(x, str))
        return compiled(function, words)(*args)
    if not ON_TENSORFLOW or not tf.inside_function():
        return function(*args)
    args = tf.nest.map_structure(as_tensor, args)
    specs = tf.nest.map_structure(
        functools.partial(with_open_axes, rank=rank), args
    )
    graph = program(function).get_concrete_function(*specs)
    return graph(*filter(tf.is_tensor, tf.nest.flatten(args)))


@functools.cache
def compiled(function, words):
    """Returns a function as JAX compiles it.

    Args:
        function: The function.
        words: Tuple with the positions of arguments that are strings.
    """
    return jax.jit(function, static_argnums=words)


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
