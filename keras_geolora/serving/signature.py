"""Inputs and outputs of a model: names, shapes and samples."""

import re

import keras
import numpy as np
from keras import ops

from keras_geolora.keras_internals import layer_of

# Lengths that stand for a free axis of samples: two, so that an axis that is
# free by name only is found out. Images need more than sequences.
LENGTHS = (8, 13)
SIZES = (64, 96)
BATCHES = (2, 3)
STRING = "string"
# The signature that generates tokens.
GENERATE = "generate"
# The input that names the adapter of every row.
ADAPTER = "adapter"
# How answers of the base are called in files; no adapter can have this name.
BASE_ANSWERS = ".base"
SENTENCES = ["A first sentence.", "And a second one, which is rather longer."]


class Signature:
    """The named inputs of a model, and how the model takes them.

    Args:
        specs: List of dicts with `name`, `shape` (a list, `None` is free) and
            `dtype`, one for each input.
        kind: `"one"`, `"list"` or `"dict"`, how to pass inputs to a model
            without a graph, or `"graph"`.
    """

    def __init__(self, specs, kind):
        self.specs = specs
        self.kind = kind

    @classmethod
    def of(cls, model, input_signature=None):
        """Finds the signature of a model, or takes the given one.

        Args:
            model: `keras.Model`.
            input_signature: A `keras.InputSpec` or a list or dict of them,
                or `None` for a model with a graph.

        Raises:
            ValueError: If there is neither a graph nor an `input_signature`,
                or if the latter lacks a shape or a dtype.
        """
        if input_signature is None:
            if not has_graph(model):
                raise ValueError(
                    "A model without a graph needs a description of its "
                    "inputs: `export(model, path, input_signature="
                    "keras.InputSpec(shape=(None, 8), dtype='float32'))`, or "
                    "a list or dict of these, as `model.call` takes them. "
                    f"Received: input_signature=None for model '{model.name}'"
                )
            return cls([spec(x, x.name) for x in model.inputs], "graph")
        if isinstance(input_signature, dict):
            pairs, kind = list(input_signature.items()), "dict"
        elif isinstance(input_signature, (list, tuple)):
            pairs = [(f"input_{i}", x) for i, x in enumerate(input_signature)]
            kind = "list"
        else:
            pairs, kind = [("inputs", input_signature)], "one"
        for _, given in pairs:
            shape, dtype = (getattr(given, x, None) for x in ("shape", "dtype"))
            if shape is None or dtype is None:
                raise ValueError(
                    "`input_signature` needs a shape and a dtype for every "
                    "input, for example `keras.InputSpec(shape=(None, 8), "
                    f"dtype='float32')`. Received: {given!r}"
                )
        return cls([spec(x, name) for name, x in pairs], kind)

    def pack(self, model, tensors):
        """Returns the inputs as the model takes them.

        Args:
            model: The `keras.Model`.
            tensors: Dict from name to tensor.
        """
        flat = [tensors[x["name"]] for x in self.specs]
        if self.kind == "graph":
            # A Sequential may lack `input`; it takes one tensor.
            structure = getattr(model, "input", model.inputs[0])
            return keras.tree.pack_sequence_as(structure, flat)
        if self.kind == "one":
            return flat[0]
        return tensors if self.kind == "dict" else flat

    def named(self, inputs):
        """Returns the inputs of a call as a dict from name to array."""
        tensors = self.named_tensors(inputs)
        return {x["name"]: as_array(tensors[x["name"]], x) for x in self.specs}

    def takes_strings(self):
        """Returns whether any input is made of strings."""
        return any(x["dtype"] == STRING for x in self.specs)

    def named_tensors(self, inputs):
        """Returns the inputs of a call by name.

        Raises:
            ValueError: If they are not those of the signature.
        """
        names = [x["name"] for x in self.specs]
        if is_text(inputs):
            inputs = [inputs]
        if isinstance(inputs, dict):
            given = {plain_name(name): x for name, x in inputs.items()}
        elif isinstance(inputs, (list, tuple)):
            given = dict(zip(names, inputs, strict=False))
        else:
            given = {names[0]: inputs}
        if set(given) != set(names):
            raise ValueError(
                f"A model with several inputs needs them by name: {names}. "
                f"Received: {sorted(given)}"
            )
        return given

    def draw(self, vocabulary_size=None):
        """Returns random samples, of two sizes where axes are free.

        Strings are sentences. Integers are tokens below `vocabulary_size` if
        that is known, and otherwise 0 or 1, which every vocabulary has. A mask
        hides the end of every second row.

        Args:
            vocabulary_size: Int or `None`.

        Returns:
            List of two dicts from name to array.
        """
        rng = np.random.default_rng(0)
        return [
            {
                x["name"]: draw(x, batch, which, vocabulary_size, rng)
                for x in self.specs
            }
            for which, batch in enumerate(BATCHES)
        ]


def is_text(inputs):
    """Returns whether inputs are a list, or an array, of strings."""
    if not isinstance(inputs, (list, tuple, np.ndarray)):
        return False
    return isinstance(next(iter(inputs), None), (str, bytes))


def as_array(tensor, spec):
    """Returns an input as an array; strings as bytes, so files can hold them.

    Args:
        tensor: Tensor, array or nested list.
        spec: Dict of a `Signature`.
    """
    if spec["dtype"] != STRING:
        return np.asarray(ops.convert_to_numpy(tensor), dtype=spec["dtype"])
    array = np.asarray(tensor.numpy() if hasattr(tensor, "numpy") else tensor)
    texts = [x.encode() if isinstance(x, str) else x for x in array.ravel()]
    array = np.array(texts, "bytes").reshape(array.shape)
    # A list may stand for a column.
    one_less = array.ndim + 1 == len(spec["shape"]) and spec["shape"][-1] == 1
    return array[..., np.newaxis] if one_less else array


def spec(tensor, name):
    """Describes an input in a form that JSON can hold."""
    return {
        "name": plain_name(name),
        "shape": list(tensor.shape),
        "dtype": keras.backend.standardize_dtype(tensor.dtype),
    }


def plain_name(name):
    """Returns a name that TensorFlow leaves unchanged."""
    return re.sub(r"\W", "_", name)


def has_graph(model):
    """Returns whether a model has a graph, and so knows its inputs."""
    return bool(getattr(model, "inputs", None))


def graph_outputs(model):
    """Returns the symbolic outputs of a model; none without a graph."""
    return getattr(model, "outputs", None) or []


def draw(spec, batch, which, vocabulary_size, rng):
    """Returns a random array for one input."""
    lengths = SIZES if len(spec["shape"]) > 3 else LENGTHS
    shape = [batch, *(n or lengths[which] for n in spec["shape"][1:])]
    if spec["dtype"] == STRING:
        return as_array(rng.choice(SENTENCES, shape), spec)
    if spec["dtype"].startswith(("float", "bfloat")):
        return rng.normal(size=shape).astype(spec["dtype"])
    if "mask" in spec["name"] or spec["dtype"] == "bool":
        mask = np.ones(shape, spec["dtype"])
        mask[::2, shape[-1] // 2 + 1 :] = 0
        return mask
    tokens = vocabulary_size and "token" in spec["name"]
    largest = vocabulary_size if tokens else 2
    return rng.integers(largest, size=shape).astype(spec["dtype"])


def tokenized(model, text):
    """Returns the inputs that the preprocessor of a task makes of strings.

    That of a language model makes labels as well.
    """
    return keras.utils.unpack_x_y_sample_weight(model.preprocessor(text))[0]


def named_outputs(model, outputs):
    """Returns the outputs of a model as a dict from name to tensor.

    The names are the keys of a dict, the layers of a model with a graph, or
    otherwise `output_0`, `output_1` and so on.
    """
    if isinstance(outputs, dict):
        return {plain_name(name): x for name, x in outputs.items()}
    flat = keras.tree.flatten(outputs)
    names = [layer_of(x).name for x in graph_outputs(model)]
    if len(set(names)) != len(flat):
        names = [f"output_{i}" for i in range(len(flat))]
    return {plain_name(n): x for n, x in zip(names, flat, strict=True)}


def answers(model, signature, samples):
    """Returns the outputs of the model for samples, as float arrays by name."""
    outputs = model(signature.pack(model, samples), training=False)
    return {
        name: np.array(ops.convert_to_numpy(ops.cast(x, "float32")))
        for name, x in named_outputs(model, outputs).items()
    }
