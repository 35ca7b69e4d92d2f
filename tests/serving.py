"""Reads SavedModels as a server would, on every backend of the tests."""

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2


def load(path, signature="serving_default"):
    """Returns a function from a dict of arrays to a dict of arrays."""
    loaded = tf.saved_model.load(str(path))

    def ask(inputs):
        function = loaded.signatures[signature]
        outputs = function(**{n: tf.constant(x) for n, x in inputs.items()})
        return {name: x.numpy() for name, x in outputs.items()}

    return ask


def number_of_values(path):
    """Returns how many numbers the variables of a SavedModel hold."""
    variables = tf.train.list_variables(str(path / "variables" / "variables"))
    return sum(
        int(np.prod(shape))
        for name, shape in variables
        if name != "_CHECKPOINTABLE_OBJECT_GRAPH"
    )


def places(path, output, signature="serving_default"):
    """Returns the operations of a signature in the graph of a SavedModel.

    Returns:
        Tuple of a dict from the name of an input to `(operation, index)`, and
        the same pair for an output.
    """
    with (path / "saved_model.pb").open("rb") as file:
        saved = saved_model_pb2.SavedModel.FromString(file.read())
    definition = saved.meta_graphs[0].signature_def[signature]
    inputs = {n: x.name.split(":") for n, x in definition.inputs.items()}
    return inputs, definition.outputs[output].name.split(":")
