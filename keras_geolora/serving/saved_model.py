"""Writes SavedModels: the part of an export that runs on TensorFlow.

`keras_geolora.export` calls it; on other backends than TensorFlow in a separate
process, `python -m keras_geolora.serving.saved_model FOLDER`. The folder holds
`model.keras`, `samples.npz` and `job.json`; the results, `saved_model` and
`report.json`, go into it.
"""

import collections
import contextlib
import gc
import importlib
import json
import pathlib
import statistics
import sys
import time
import warnings

import keras
import numpy as np
import tensorflow as tf

from keras_geolora.layers.tree import adapted_layers, layers_with_adapters
from keras_geolora.model.enabling import merge_geolora, remove_geolora
from keras_geolora.model.parts import adaptations_of
from keras_geolora.model.switching import activate_geolora, geolora_adapters
from keras_geolora.serving.signature import Signature, named_outputs, tokenized

# Nodes that compute nothing.
BOOKKEEPING = {
    "Const",
    "Identity",
    "IdentityN",
    "NoOp",
    "PartitionedCall",
    "Placeholder",
    "StatefulPartitionedCall",
}
DEFAULT = "serving_default"
# The most seconds that measuring one latency may take.
PATIENCE = 2.0


def write(folder, progress=print):
    """Writes, compares and measures the SavedModel of one export.

    Args:
        folder: Path of the folder with the job.
        progress: Callable that takes one line for every stage.
    """
    folder = pathlib.Path(folder)
    job = json.loads((folder / "job.json").read_text())
    report = {"signatures": {}, "tensorflow": tf.__version__}
    base = None
    if job["baseline"]:
        progress("Writing the base model to compare with")
        with loaded(folder) as model:
            remove_geolora(model)
            endpoints = {DEFAULT: Endpoint(model, job)}
            save(endpoints, folder / "base")
        base = tf.saved_model.load(folder / "base")
        base = base.signatures[DEFAULT]
        report["base"] = {
            "operations": operations(base),
            "bytes": size_of(folder / "base"),
        }

    progress("Loading the model")
    with loaded(folder) as model:
        names = geolora_adapters(model)
        report["form"] = "none"
        if adapted_layers(model) and (job["adapters"] or not mergeable(model)):
            progress("Cutting adapters to their ranks")
            report["form"] = "beside the kernels"
            keep_beside(model)
        elif adapted_layers(model):
            progress("Merging")
            report["form"] = "merged"
            merge_geolora(model, reversible=False)
        active = (names or [None])[0]
        endpoints = {DEFAULT: Endpoint(model, job, active)}
        for name in job["adapters"]:
            same = name == active
            endpoints[name] = (
                endpoints[DEFAULT] if same else Endpoint(model, job, name)
            )
        progress("Writing the SavedModel")
        save(endpoints, folder / "saved_model")

    progress("Comparing answers")
    served = tf.saved_model.load(folder / "saved_model").signatures
    report["bytes"] = size_of(folder / "saved_model")
    samples = Samples(folder, job)
    for name in endpoints:
        report["signatures"][name] = {
            "adapter": endpoints[name].adapter,
            "inputs": described(served[name].structured_input_signature[1]),
            "outputs": described(served[name].structured_outputs),
            "operations": operations(served[name]),
            **samples.difference(served[name], name),
        }
    progress("Measuring latency")
    functions = {n: served[n] for n in endpoints}
    if base is not None:
        functions["base"] = base
    for name, milliseconds in latencies(functions, samples).items():
        place = report if name == "base" else report["signatures"]
        place[name]["milliseconds"] = milliseconds
    (folder / "report.json").write_text(json.dumps(report))


@contextlib.contextmanager
def loaded(folder):
    """Loads the model of a job, for the length of a `with` block."""
    with warnings.catch_warnings():
        # Tasks of KerasHub come with an optimizer, which is not needed here.
        warnings.filterwarnings("ignore", "Skipping variable loading")
        # We wrote the file: its functions are those of the caller's model.
        model = keras.saving.load_model(
            folder / "model.keras", compile=False, safe_mode=False
        )
    yield model
    gc.collect()


def mergeable(model):
    """Returns whether every update can be added to its kernel."""
    try:
        for layer in adapted_layers(model).values():
            layer.check_mergeable()
    except ValueError:
        return False
    return True


def keep_beside(model):
    """Keeps adapters unmerged, with only the columns in use."""
    for layer in layers_with_adapters(model).values():
        layer.keeps_update_apart = True
        for name, adapter in layer.adapters_by_name().items():
            layer.resize_adapter(name, adapter.trimmed()[1].shape[-1])
            layer.adapters_by_name()[name].stop_training()


class Endpoint:
    """A function with named inputs and outputs, traced on creation.

    Args:
        model: `keras.Model`.
        job: Dict, the description of the job.
        adapter: String, the adapter to activate, or `None` if there is none.
    """

    def __init__(self, model, job, adapter=None):
        self.adapter = adapter
        adaptations = adaptations_of(model)
        if adaptations:
            activate_geolora(model, adapter)
        # Variables trained along with an adapter have values for each one.
        self.values = [
            (variable, tf.Variable(value, trainable=False))
            for adaptation in adaptations
            for variable, value in adaptation.co_trained_values()
        ]
        self.tracked = [*(v.value for v in model.variables), *tables(model)]
        signature = Signature(**job["signature"])
        specs = [
            tf.TensorSpec(x["shape"], x["dtype"], name=x["name"])
            for x in signature.specs
        ]
        if job["preprocess"]:
            self.tracked.append(model.preprocessor)
            specs = [tf.TensorSpec([None], tf.string, name="text")]

        def serve(**tensors):
            if job["preprocess"]:
                tokens = tokenized(model, tensors["text"])
                tensors = signature.named_tensors(tokens)
            with keras.StatelessScope(state_mapping=self.mapping()):
                inputs = signature.pack(model, tensors)
                return named_outputs(model, model(inputs, training=False))

        self.function = tf.function(serve, autograph=False)
        self.concrete = self.function.get_concrete_function(
            **{x.name: x for x in specs}
        )

    def mapping(self):
        return [(variable, tensor.value()) for variable, tensor in self.values]


def tables(model):
    """Returns the lookup tables and similar resources of a model."""
    resource = tf.saved_model.experimental.TrackableResource
    held = tf.train.TrackableView(model).descendants()
    return [x for x in held if isinstance(x, resource)]


def save(endpoints, path):
    """Writes endpoints to a SavedModel; what they share is stored once."""
    root = tf.Module()
    root.tracked = [x for e in endpoints.values() for x in e.tracked]
    root.values = [v for e in endpoints.values() for _, v in e.values]
    signatures = {name: e.concrete for name, e in endpoints.items()}
    tf.saved_model.save(root, path, signatures=signatures)


def operations(function):
    """Counts the operations of a function and of the functions it calls."""
    graph = function.graph.as_graph_def()
    library = {f.signature.name: f.node_def for f in graph.library.function}

    def count(nodes):
        counts = collections.Counter()
        for node in nodes:
            if node.op not in BOOKKEEPING:
                counts[node.op] += 1
            for attribute in node.attr.values():
                called = [attribute.func.name, *names_in(attribute.list.func)]
                for name in called:
                    counts += count(library.get(name, ()))
        return counts

    def names_in(functions):
        return [f.name for f in functions]

    return dict(sorted(count(graph.node).items()))


def described(structure):
    """Returns shapes and dtypes by name, in a form that JSON can hold."""
    return {
        name: {
            "shape": list(x.shape) if x.shape.rank is not None else None,
            "dtype": x.dtype.name,
        }
        for name, x in sorted(structure.items())
    }


def size_of(path):
    """Returns the bytes of all files in a folder."""
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


class Samples:
    """Inputs, and the outputs of the model in memory for them.

    The arrays in the file are named `inputs/NUMBER/NAME` and
    `SIGNATURE/NUMBER/NAME`.
    """

    def __init__(self, folder, job):
        self.tolerance = job["tolerance"]
        self.arrays = collections.defaultdict(dict)
        with np.load(folder / "samples.npz") as file:
            for key in file.files:
                what, number, name = key.split("/")
                self.arrays[what, int(number)][name] = file[key]

    def inputs(self):
        """Returns a list of dicts from name to tensor."""
        count = sum(what == "inputs" for what, _ in self.arrays)
        return [
            {n: tf.constant(x) for n, x in self.arrays["inputs", i].items()}
            for i in range(count)
        ]

    def difference(self, function, signature):
        """Returns the largest difference of outputs, and the allowed one."""
        largest, allowed = 0.0, 0.0
        for i, inputs in enumerate(self.inputs()):
            outputs = function(**inputs)
            for name, expected in self.arrays[signature, i].items():
                found = tf.cast(outputs[name], tf.float32).numpy()
                if found.shape != expected.shape:
                    raise ValueError(
                        f"Output '{name}' has the shape {found.shape} in the "
                        f"SavedModel and {expected.shape} in the model."
                    )
                far = np.abs(found - expected).max(initial=0.0)
                # NaN counts as an infinite difference.
                far = float(far) if np.isfinite(far) else float("inf")
                size = float(np.abs(expected).max(initial=0.0))
                largest = max(largest, far)
                allowed = max(allowed, self.tolerance * max(size, 1.0))
        return {"max_difference": largest, "allowed_difference": allowed}


def latencies(functions, samples):
    """Measures, in turns, the median milliseconds of a call after the first.

    Args:
        functions: Dict from name to function.
        samples: `Samples`; the first one is used.
    """
    inputs = samples.inputs()[0]
    times = {name: [] for name in functions}
    end = time.perf_counter() + PATIENCE * len(functions)
    for turn in range(31):
        for name, function in functions.items():
            start = time.perf_counter()
            for output in function(**inputs).values():
                output.numpy()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
        if turn and time.perf_counter() > end:
            break
    return {name: statistics.median(found) for name, found in times.items()}


def main(folder):
    """Runs a job in a separate process, with the settings of the caller."""
    settings = json.loads((pathlib.Path(folder) / "job.json").read_text())
    keras.config.set_floatx(settings["floatx"])
    keras.config.set_image_data_format(settings["image_data_format"])
    for name in settings["modules"]:
        importlib.import_module(name)
    write(folder, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main(sys.argv[1])
