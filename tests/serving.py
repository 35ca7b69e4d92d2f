"""Reads SavedModels as a server would, on every backend of the tests."""

import pathlib
import shutil
import subprocess

import numpy as np
import pytest
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


def compiled_program(folder):
    """Compiles `ask_savedmodel.cc` into a folder; returns the program."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler on this machine")
    library = pathlib.Path(tf.sysconfig.get_lib())
    program = folder / "ask"
    subprocess.run(
        [
            compiler,
            str(pathlib.Path(__file__).with_name("ask_savedmodel.cc")),
            f"-I{tf.sysconfig.get_include()}",
            str(library / "libtensorflow_cc.so.2"),
            str(library / "libtensorflow_framework.so.2"),
            f"-Wl,-rpath,{library}",
            "-o",
            str(program),
        ],
        check=True,
    )
    return program
