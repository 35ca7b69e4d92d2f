"""Writes SavedModels: the part of an export that runs on TensorFlow.

`keras_geolora.export` calls it; on other backends than TensorFlow in a separate
process, `python -m keras_geolora.serving.saved_model FOLDER`. The folder holds
`model.keras`, `samples.npz` and `job.json`; the results, `saved_model` and
`report.json`, go into it.
"""

import collections
import dataclasses
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
from keras_geolora.model.forgotten import restore_input_quantizers
from keras_geolora.model.switching import geolora_adapters
from keras_geolora.serving.bundle import split_off_adapters
from keras_geolora.serving.endpoint import (
    Endpoint,
    GeneratingEndpoint,
    RoutedEndpoint,
    RoutedGeneratingEndpoint,
)
from keras_geolora.serving.places import PLACES
from keras_geolora.serving.routed_model import route_geolora
from keras_geolora.serving.signature import ADAPTER, BASE_ANSWERS, GENERATE

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
# As far as that, times what rounding moves them by, outputs may differ: it is
# the largest of a few.
ROUNDING = 2.0
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
    # Models are given up as soon as they are written: large ones fill memory.
    if job["baseline"]:
        progress("Writing the base model to compare with")
        write_base(folder, job)
        gc.collect()
        base = tf.saved_model.load(folder / "base")
        base = base.signatures[DEFAULT]
        report["base"] = {
            "operations": operations(base),
            "bytes": size_of(folder / "base"),
        }
    progress("Loading the model")
    report["form"], entries = write_served(folder, job, progress)
    gc.collect()

    progress("Comparing answers")
    served = tf.saved_model.load(folder / "saved_model").signatures
    report["bytes"] = size_of(folder / "saved_model")
    samples = Samples(folder, job)
    for name, about in entries.items():
        pairs = samples.of_signature(name)
        if job["route"] is not None:
            pairs = samples.of_rows(["", *job["adapters"]])
        report["signatures"][name] = {
            **about,
            "inputs": described(served[name].structured_input_signature[1]),
            "outputs": described(served[name].structured_outputs),
            "operations": operations(served[name]),
            **samples.compare(served, name, pairs),
        }
    progress("Measuring latency")
    inputs = samples.inputs()[0]
    asked = inputs if job["route"] is None else pairs[0][0]
    questions = {name: (served[name], asked) for name in entries}
    if base is not None:
        questions["base"] = base, inputs
    for name, milliseconds in latencies(questions).items():
        place = report if name == "base" else report["signatures"]
        place[name]["milliseconds"] = milliseconds
    (folder / "report.json").write_text(json.dumps(report))


def write_base(folder, job):
    """Writes the model without adapters."""
    model = load(folder, job)
    remove_geolora(model)
    save({DEFAULT: Endpoint(model, job)}, folder / "base")


def write_served(folder, job, progress):
    """Writes the model that will be served.

    Returns:
        The form of its adapters, and what a report tells of each signature.
    """
    model = load(folder, job)
    if job["route"] is None:
        form, endpoints = endpoints_of(model, job, progress)
    else:
        form, endpoints = routed_endpoint(model, job, progress)
    if job["generate"] is not None:
        progress("Tracing the generation of tokens")
        endpoints[GENERATE] = (
            GeneratingEndpoint(model, job)
            if job["route"] is None
            else RoutedGeneratingEndpoint(endpoints[DEFAULT], job)
        )
    progress("Writing the SavedModel")
    save(endpoints, folder / "saved_model")
    if job["route"] is not None:
        write_places(folder / "saved_model", endpoints[DEFAULT])
    return form, {name: x.about for name, x in endpoints.items()}


def endpoints_of(model, job, progress):
    """Returns the form of the adapters, and an `Endpoint` for each.

    Args:
        model: `keras.Model`, which changes.
        job: Dict, the description of the job.
        progress: Callable that takes one line for every stage.
    """
    names = geolora_adapters(model)
    form = "none"
    if adapted_layers(model) and (job["adapters"] or not mergeable(model)):
        progress("Cutting adapters to their ranks")
        form = "beside the kernels"
        keep_beside(model)
    elif adapted_layers(model):
        progress("Merging")
        form = "merged"
        merge_geolora(model, reversible=False)
    active = (names or [None])[0]
    endpoints = {DEFAULT: Endpoint(model, job, active)}
    for name in job["adapters"]:
        same = name == active
        endpoints[name] = (
            endpoints[DEFAULT] if same else Endpoint(model, job, name)
        )
    return form, endpoints


def routed_endpoint(model, job, progress):
    """Returns the same as `endpoints_of`, for an adapter in every row."""
    progress("Giving adapters their places")
    routed = route_geolora(model, job["adapters"], **job["route"])
    return "by row", {DEFAULT: RoutedEndpoint(routed, job)}


def write_places(folder, endpoint):
    """Prepares a SavedModel for adapters that come later.

    Args:
        folder: Path of the SavedModel.
        endpoint: Its `RoutedEndpoint`.
    """
    split_off_adapters(folder, len(endpoint.bank))
    description = {
        **dataclasses.asdict(endpoint.routed.places),
        "keys": endpoint.keys,
    }
    (folder / PLACES).write_text(json.dumps(description, indent=1))


def load(folder, job):
    """Returns the model of a job."""
    with warnings.catch_warnings():
        # Tasks of KerasHub come with an optimizer, which is not needed here.
        warnings.filterwarnings("ignore", "Skipping variable loading")
        # We wrote the file: its functions are those of the caller's model.
        model = keras.saving.load_model(
            folder / "model.keras", compile=False, safe_mode=False
        )
    restore_input_quantizers(model, job["input_quantizers"])
    return model


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


def save(endpoints, path):
    """Writes endpoints to a SavedModel; what they share is stored once."""
    root = tf.Module()
    root.tracked = [x for e in endpoints.values() for x in e.tracked]
    root.bank = [x for e in endpoints.values() for x in e.bank]
    signatures = {name: e.concrete for name, e in endpoints.items()}
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    tf.saved_model.save(root, path, signatures=signatures, options=options)


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
        # How far the outputs compared so far may differ.
        self.allowed = 0.0
        self.rounding = job["rounding"]
        # Tokens can be asked for their logits, texts cannot.
        sampler = (job["generate"] or {"sampler": {}})["sampler"]
        self.greedy = (
            sampler.get("class_name") == "GreedySampler"
            and not job["preprocess"]
        )
        if job["route"]:  # a row may have any adapter
            far = max(self.rounding.values(), default=0.0)
            self.rounding = {DEFAULT: far}
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

    def of_signature(self, signature):
        """Returns a list of pairs of inputs and expected outputs."""
        return [
            (inputs, self.arrays[signature, i])
            for i, inputs in enumerate(self.inputs())
        ]

    def of_rows(self, names):
        """Returns the same for rows with an adapter each.

        Every row of every batch is asked with every adapter, in mixed batches.

        Args:
            names: List of names of adapters, with `""` for the base.
        """
        pairs = []
        for i, inputs in enumerate(self.inputs()):
            (_, answers), *_ = self.arrays[BASE_ANSWERS, i].items()
            rows = len(answers)
            for start in range(len(names)):
                mix = [names[(start + row) % len(names)] for row in range(rows)]
                outputs = {
                    output: np.stack(
                        [
                            self.arrays[name or BASE_ANSWERS, i][output][row]
                            for row, name in enumerate(mix)
                        ]
                    )
                    for output in self.arrays[BASE_ANSWERS, i]
                }
                pairs.append(({**inputs, ADAPTER: tf.constant(mix)}, outputs))
        return pairs

    def compare(self, served, name, pairs):
        """Returns what a report tells of the outputs of a signature."""
        if name == GENERATE and ADAPTER in pairs[0][0]:
            return self.compare_with_logits(served, pairs)
        if name == GENERATE:
            return self.compare_tokens(served[name], pairs)
        rounding = self.rounding.get(name, 0.0)
        found = self.difference(served[name], pairs, rounding)
        self.allowed = max(self.allowed, found["allowed_difference"])
        return found

    def compare_tokens(self, function, pairs):
        """Returns how many generated tokens differ, if they are compared.

        They are where the sampler draws no random numbers. Where two tokens
        are about as likely, outputs that differ as far as they may give either
        of them, and others from there on: such a row counts as a tie.
        """
        if not any(expected for _, expected in pairs):
            return {}
        different, ties = 0, 0
        for inputs, expected in pairs:
            outputs = {n: x.numpy() for n, x in function(**inputs).items()}
            far = sum(
                (outputs[key] != expected[key]) & (expected["padding_mask"] > 0)
                for key in ("token_ids", "padding_mask")
            )
            rows, first = far.any(axis=1), far.argmax(axis=1)
            gaps = expected["gaps"][range(len(far)), first]
            tied = rows & (gaps <= 2 * self.allowed)
            different += int(far[~tied].sum())
            ties += int(tied.sum())
        return {"different_tokens": different, "ties": ties}

    def compare_with_logits(self, served, pairs):
        """Returns the same, of the logits that the SavedModel itself gives.

        Each token of a greedy sampler is the most likely one after those before
        it. The logits have been compared with the model, for every adapter.
        """
        if not self.greedy:
            return {}
        different, ties = 0, 0
        for inputs, _ in pairs:
            tokens = served[GENERATE](**inputs)
            (logits,) = served[DEFAULT](**{**inputs, **tokens}).values()
            logits = tf.cast(logits, tf.float32).numpy()[:, :-1]
            token_ids = tokens["token_ids"].numpy()[:, 1:, np.newaxis]
            chosen = np.take_along_axis(logits, token_ids, axis=2)[..., 0]
            gaps = logits.max(axis=2) - chosen
            new = tokens["padding_mask"].numpy() > inputs["padding_mask"]
            gaps = np.where(new[:, 1:], gaps, 0)
            different += int((gaps > 2 * self.allowed).sum())
            close = (gaps > 0) & (gaps <= 2 * self.allowed)
            ties += int(close.any(axis=1).sum())
        return {"different_tokens": different, "ties": ties}

    def difference(self, function, pairs, rounding):
        """Returns the largest difference of outputs, and the allowed one.

        Args:
            function: A signature of a SavedModel.
            pairs: List of pairs of inputs and expected outputs.
            rounding: Float, how far outputs move by rounding.
        """
        largest, allowed = 0.0, ROUNDING * rounding
        for inputs, outputs_of_model in pairs:
            outputs = function(**inputs)
            for name, expected in outputs_of_model.items():
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
        return {
            "max_difference": largest,
            "allowed_difference": allowed,
            "rounding": rounding,
        }


def latencies(questions):
    """Measures, in turns, the median milliseconds of a call after the first.

    Args:
        questions: Dict from name to a pair of a function and its inputs.
    """
    times = {name: [] for name in questions}
    end = time.perf_counter() + PATIENCE * len(questions)
    for turn in range(31):
        for name, (function, inputs) in questions.items():
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
