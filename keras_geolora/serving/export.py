"""Exports models for serving as SavedModels, from every backend."""

import contextlib
import errno
import importlib.util
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading

import keras
import numpy as np
from keras import ops

from keras_geolora.layers.factor import check_layers
from keras_geolora.layers.tree import inside, layers_with_adapters
from keras_geolora.model.checks import check_model, check_not_suspended
from keras_geolora.model.forgotten import (
    check_tokenizer,
    complete_configs,
    input_quantizers,
)
from keras_geolora.model.parts import adaptations_of
from keras_geolora.model.switching import (
    activate_geolora,
    geolora_adapters,
    geolora_disabled,
)
from keras_geolora.serving.generating import (
    check_generate,
    described_generation,
    save_generated,
)
from keras_geolora.serving.routed_model import chosen_adapters, plan_route
from keras_geolora.serving.signature import (
    ADAPTER,
    BASE_ANSWERS,
    SENTENCES,
    Signature,
    answers,
    is_text,
    tokenized,
)
from keras_geolora.version import __version__
from keras_geolora.whole_files import write_whole

REPORT = "geolora_report.json"
# The allowed difference of outputs, relative to the largest of them.
TOLERANCES = {"float32": 1e-4, "float64": 1e-4}
LOW_PRECISION = 2e-2
# Some roundings of float32, as two orders of the same operations differ by.
SHAKE = 1e-6
# Packages that are installed wherever this one is.
AT_HOME = {"keras", "keras_hub", "keras_geolora", "builtins"}


class ExportError(RuntimeError):
    """A model could not be exported, or its export has other outputs."""


def export(
    model,
    path,
    version=None,
    *,
    adapters=None,
    route=False,
    capacity=None,
    max_rank=None,
    generate=False,
    stop_token_ids="auto",
    preprocess=False,
    samples=None,
    input_signature=None,
    tolerance=None,
    baseline=True,
    timeout=1800,
    verbose=True,
):
    """Writes a SavedModel for TF Serving, with a report on its parity.

    The SavedModel goes to `path/VERSION`, in the folder that TF Serving
    watches. It contains the merged model, with the operations of the model
    before it was adapted; the model in memory does not change. The SavedModel
    is loaded again and compared: if its outputs are not those of the model,
    it is deleted and an error reports the difference.

    On JAX and PyTorch a separate process writes it, in which Keras runs on
    TensorFlow, which has to be installed. From every backend, batches and
    sequences of any length can be served.

    Args:
        model: Built `keras.Model`, adapted, merged, or without any adapter.
        path: String or path of the folder of the model.
        version: Int of at least 1, or `None` for the next free one. An
            existing version is never overwritten.
        adapters: List of names, or `"all"`. Each adapter gets a signature
            with its name; all share one copy of the pretrained weights. The
            active one is also the default signature. Defaults to `None`: the
            active adapter alone, merged.
        route: Bool, whether the rows of a batch have an adapter each. The
            signature then has another input, `adapter`: strings of shape
            `(batch,)`, one of `adapters` (by default all) or `""` for the
            base. Another name is an error. Defaults to `False`.
        capacity: Int or `None`, with `route`: for how many adapters there are
            places, see `add_to_export`. Defaults to the number of `adapters`.
        max_rank: Int or `None`, with `route`: the largest rank of an adapter
            that may come later. Defaults to the largest in each layer.
        generate: Bool, for a `CausalLM` of KerasHub: whether to add a
            signature `"generate"`, which generates tokens by the sampler of
            `model.compile(sampler=...)`. It takes the inputs of the model,
            `token_ids` and `padding_mask`, filled up to the length that is
            wanted, and returns both. With `preprocess=True` it takes `text`,
            generates up to the `sequence_length` of the preprocessor, and
            returns `text` as well. With `route=True` every row goes on by its
            adapter, if the sampler is greedy, random, top-k or top-p. Defaults
            to `False`.
        stop_token_ids: As in `CausalLM.generate`, with `generate`. Defaults to
            `"auto"`, the end tokens of the model's preprocessor.
        preprocess: Bool, whether to include the preprocessor of a KerasHub
            task in the graph, which then takes strings, `text`. The server
            needs the operations of tensorflow-text. Defaults to `False`.
        samples: Inputs to compare the outputs on, as for `model.predict`.
            Defaults to random ones of two sizes.
        input_signature: `keras.InputSpec`, or a list or dict of them, for a
            model without a graph. Defaults to `None`.
        tolerance: Float, the allowed difference of outputs, relative to the
            largest output (or to 1 if that is larger). Defaults to 1e-4, and
            to 0.02 for models that compute in less than float32. Quantized
            layers that round their inputs, as those of int8 do, turn the last
            bit of a number into a step of the rounding, so by default outputs
            may also differ by twice as much as they move if all weights change
            by 1e-6.
        baseline: Bool, whether to export the model without adapters as well,
            to compare operations, size and latency. It is deleted afterwards.
            Defaults to `True`.
        timeout: Float, seconds after which a separate process is stopped.
            Defaults to 1800.
        verbose: Bool, whether to print progress and the report.

    Returns:
        The report, a dict; also in `path/VERSION/geolora_report.json`. It
        has the keys `path`, `version`, `model`, `backend`, `versions`,
        `form` (`"merged"`, `"beside the kernels"` for several adapters and for
        quantized kernels, `"by row"` with `route`, or `"none"` without
        adapters), `bytes`,
        `signatures` (by name: `adapter`, `inputs`, `outputs`, `operations`,
        `milliseconds`, `max_difference`, `allowed_difference`, and
        `rounding`, how far outputs move as under `tolerance`, or 0;
        `"generate"` has `different_tokens`, and `ties`, rows in which two
        tokens were too close for a comparison; with `route`, tokens are
        compared with the logits of the SavedModel), `base`
        (`operations`, `bytes`, `milliseconds`) and `same_operations`.

    Raises:
        TypeError: If `model` is not a `keras.Model`.
        ValueError: If an argument does not fit the model.
        FileExistsError: If the version exists.
        ImportError: If TensorFlow is not installed.
        ExportError: If the model cannot be exported, or outputs differ. Then
            nothing new is left at `path`.

    Example:

    ```python
    import tempfile

    import keras
    import keras_geolora

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.enable_geolora(rank=2)
    with tempfile.TemporaryDirectory() as folder:
        report = keras_geolora.export(model, folder)
    assert report["version"] == 1 and report["same_operations"]
    ```
    """
    check_model(model)
    if not model.built:
        raise ValueError(
            "Only a built model can be exported. Call it on a batch of data "
            f"first. Received: model '{model.name}', which is not built"
        )
    check_not_suspended(adaptations_of(model))
    check_layers(layers_with_adapters(model).values(), "Nothing was exported.")
    path = pathlib.Path(path)
    check_version(path, version)
    asked = "all" if route and not adapters else adapters
    names = []
    if asked is not None:
        names = chosen_adapters(model, asked, geolora_adapters(model))
    signature = Signature.of(model, input_signature)
    check_strings(model, signature)
    check_route(model, signature, names, route, capacity, max_rank)
    check_generate(model, names, route, generate, stop_token_ids)
    text = preprocess or needs_tokens(samples, signature)
    if text and getattr(model, "preprocessor", None) is None:
        raise ValueError(
            "String inputs need a KerasHub task, whose preprocessor tokenizes "
            "them; with `preprocess=True` this happens inside the graph. "
            f"Received: preprocess={preprocess}, samples={samples!r} for "
            f"model '{model.name}' without a preprocessor"
        )
    if importlib.util.find_spec("tensorflow") is None:
        raise ImportError(
            "SavedModels are written by TensorFlow, even on other backends. "
            "Run: `python -m pip install tensorflow`. Received: TensorFlow is "
            "not installed"
        )
    rounds = tolerance is None and rounds_inputs(model)
    if tolerance is None:
        tolerance = TOLERANCES.get(model.compute_dtype, LOW_PRECISION)
    path.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that one rename publishes the result. Servers
    # ignore names that are not numbers.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path) as folder:
        folder = pathlib.Path(folder)
        progress = print if verbose else lambda line: None
        progress(f"Exporting '{model.name}' to {path}")
        rounding = save_samples(
            model, folder, signature, samples, preprocess, names, route, rounds
        )
        if generate:
            generation = described_generation(model, stop_token_ids)
            if not route:  # then tokens are compared with the logits
                save_generated(model, folder, signature, generation)
        save_whole(model, folder / "model.keras")
        job = {
            "adapters": names,
            "route": {"capacity": capacity, "max_rank": max_rank}
            if route
            else None,
            "baseline": bool(baseline and layers_with_adapters(model)),
            "generate": generation if generate else None,
            "preprocess": preprocess,
            "signature": vars(signature),
            "tolerance": tolerance,
            "rounding": rounding,
            "floatx": keras.config.floatx(),
            "image_data_format": keras.config.image_data_format(),
            "modules": custom_modules(model),
            "input_quantizers": input_quantizers(model),
        }
        (folder / "job.json").write_text(json.dumps(job))
        if keras.backend.backend() == "tensorflow":
            write_here(folder, progress)
        else:
            run_writer(folder, progress, timeout)
        report = finished_report(model, folder)
        check_parity(report)
        version = publish(folder / "saved_model", path, version, report)
    if verbose:
        for line in table(report):
            print(line)
    return report


def check_version(path, version):
    """Refuses an invalid version, or one that exists."""
    if version is None:
        return
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(
            "`version` names a folder that TF Serving watches, so it must be "
            "an integer of at least 1, or `None` for the next free one. "
            f"Received: version={version!r}"
        )
    if (path / str(version)).exists():
        raise FileExistsError(
            errno.EEXIST,
            "An existing version is never overwritten. Leave `version` out "
            f"for the next free one. Received: version={version}",
            str(path / str(version)),
        )


def check_route(model, signature, names, route, capacity, max_rank):
    """Refuses what does not fit rows with an adapter each."""
    if not route:
        if capacity is not None or max_rank is not None:
            raise ValueError(
                "`capacity` and `max_rank` make places for adapters that come "
                "later, which only an export with `route=True` has. Received: "
                f"route={route!r}, capacity={capacity!r}, "
                f"max_rank={max_rank!r}"
            )
        return
    if ADAPTER in [x["name"] for x in signature.specs]:
        raise ValueError(
            f"With `route=True` an input '{ADAPTER}' is added, so no input of "
            f"the model may have this name. Received: model '{model.name}' "
            f"with inputs {[x['name'] for x in signature.specs]}"
        )
    # Raises now what would be raised in the process that writes.
    plan_route(model, names, capacity, max_rank)


def save_samples(
    model,
    folder,
    signature,
    samples,
    preprocess,
    names,
    route=False,
    rounds=False,
):
    """Writes samples and the model's outputs for them, with every adapter.

    Returns:
        Dict from the name of a signature to the distance by which the outputs
        of a model that rounds move, if its weights hardly do; empty otherwise.
    """
    if samples is not None:
        batches = [samples]
    elif preprocess:
        batches = [SENTENCES, SENTENCES[:1]]
    else:
        backbone = getattr(model, "backbone", model)
        batches = signature.draw(getattr(backbone, "vocabulary_size", None))
    arrays, asked, moved = {}, [], {}
    for i, batch in enumerate(batches):
        text = batch
        if preprocess or needs_tokens(batch, signature):
            batch = tokenized(model, batch)
        batch = signature.named(batch)
        asked.append(batch)
        given = batch
        if preprocess:
            given = {"text": np.char.encode(np.array(text), "utf-8")}
        arrays.update((f"inputs/{i}/{n}", x) for n, x in given.items())

    def ask(name):
        for i, batch in enumerate(asked):
            found = answers(model, signature, batch)
            arrays.update((f"{name}/{i}/{n}", x) for n, x in found.items())
            if rounds:
                far = distance_when_shaken(model, signature, batch, found)
                moved[name] = max(moved.get(name, 0.0), far)

    ask("serving_default")
    if names:
        with restored_adapter(model):
            for name in names:
                activate_geolora(model, name)
                ask(name)
    if route:
        with geolora_disabled(model):
            ask(BASE_ANSWERS)
    np.savez(folder / "samples.npz", **arrays)
    return moved


def save_whole(model, path):
    """Saves a model, with what the configurations of KerasHub forget."""
    if layers_with_adapters(model):
        model.save(path)  # and knows what they forget
        return
    check_tokenizer(model)
    with complete_configs(model):
        model.save(path)


def check_strings(model, signature):
    """Refuses strings on backends on which Keras does not support them."""
    if signature.takes_strings() and keras.backend.backend() != "tensorflow":
        raise ValueError(
            "Keras supports string inputs only on TensorFlow, and an export "
            "is compared with the outputs of the model. Save the model with "
            "`model.save('model.keras')`, then load and export it with "
            f"`KERAS_BACKEND=tensorflow`. Received: model '{model.name}', "
            f"which takes strings, on {keras.backend.backend()}"
        )


def rounds_inputs(model):
    """Returns whether a layer rounds its inputs, as quantized ones do."""
    return any(getattr(x, "inputs_quantizer", None) for x in inside(model))


def distance_when_shaken(model, signature, batch, outputs, times=4):
    """Returns how far outputs move if all weights change by `SHAKE`.

    Args:
        model: `keras.Model`.
        signature: Its `Signature`.
        batch: Dict of inputs.
        outputs: Dict of arrays, its outputs for them.
        times: Int, how often to try. Defaults to 4.
    """
    rng, far = np.random.default_rng(0), 0.0
    for _ in range(times):
        values = [
            (
                v,
                v.value
                * ops.cast(1 + SHAKE * rng.normal(size=v.shape), v.dtype),
            )
            for v in model.variables
            if keras.backend.is_float_dtype(v.dtype)
        ]
        with keras.StatelessScope(state_mapping=values):
            found = answers(model, signature, batch)
        for name, array in outputs.items():
            far = max(far, float(np.abs(found[name] - array).max(initial=0)))
    return far


def needs_tokens(samples, signature):
    """Returns whether samples are strings for a model that takes tokens."""
    return is_text(samples) and not signature.takes_strings()


@contextlib.contextmanager
def restored_adapter(model):
    """Activates the active adapter again at the end of a `with` block."""
    active = geolora_adapters(model)[0]
    try:
        yield
    finally:
        activate_geolora(model, active)


def custom_modules(model):
    """Returns the modules that a process must import to load the model."""
    classes = {type(layer) for layer in (model, *inside(model))}
    known = [*classes, *keras.saving.get_custom_objects().values()]
    names = {getattr(x, "__module__", None) for x in known} - {None}
    return sorted(n for n in names if n.split(".")[0] not in AT_HOME)


def write_here(folder, progress):
    """Writes the SavedModel in this process."""
    from keras_geolora.serving import saved_model

    try:
        saved_model.write(folder, progress)
    except Exception as error:
        raise ExportError(
            f"The SavedModel could not be written: {error}"
        ) from error


def run_writer(folder, progress, timeout):
    """Writes the SavedModel in a process where Keras runs on TensorFlow."""
    job = json.loads((folder / "job.json").read_text())
    if "__main__" in job["modules"]:
        raise ExportError(
            "The SavedModel is written in a separate process, which cannot "
            "see the classes and functions of a script or notebook. Move "
            "them to a module and import it. Received: a model with custom "
            f"objects of '__main__', exported on {keras.backend.backend()}"
        )
    environment = dict(
        os.environ,
        KERAS_BACKEND="tensorflow",
        TF_CPP_MIN_LOG_LEVEL="3",
        CUDA_VISIBLE_DEVICES="-1",  # the caller uses them
        PYTHONPATH=os.pathsep.join(filter(None, sys.path)),
    )
    log = folder / "log.txt"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "keras_geolora.serving.saved_model",
                str(folder),
            ],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # to kill its child processes, too
        )
    reader = threading.Thread(target=forward, args=(process.stdout, progress))
    reader.start()
    try:
        status = process.wait(timeout)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise ExportError(
                "The process that writes the SavedModel did not finish in "
                "time. Allow more seconds with `timeout=...`. Received: "
                f"timeout={timeout}"
            ) from error
        raise
    finally:
        reader.join()
        process.stdout.close()
    if status:
        last = log.read_text(errors="replace").splitlines()[-15:]
        raise ExportError(
            "The process that writes the SavedModel failed with status "
            f"{status}. Its last output:\n" + "\n".join(last)
        )


def forward(lines, progress):
    """Passes on the lines of a process as they arrive."""
    for line in lines:
        progress(line.rstrip("\n"))


def finished_report(model, folder):
    """Completes the report that the writer left."""
    written = json.loads((folder / "report.json").read_text())
    base = written.get("base")
    served = written["signatures"]["serving_default"]["operations"]
    plain = getattr(model, "plain_class", type(model))
    return {
        "model": plain.__name__,
        "backend": keras.backend.backend(),
        "versions": {
            "keras": keras.__version__,
            "keras_geolora": __version__,
            "tensorflow": written.pop("tensorflow"),
        },
        "same_operations": base and base["operations"] == served,
        **written,
    }


def check_parity(report):
    """Refuses a SavedModel whose outputs are not those of the model."""
    for name, found in report["signatures"].items():
        if found.get("different_tokens"):
            raise ExportError(
                "The SavedModel generates other tokens than the model, so it "
                "was deleted. Received: "
                f"{found['different_tokens']} different tokens for the samples"
            )
        if "max_difference" not in found:
            continue
        far, allowed = found["max_difference"], found["allowed_difference"]
        if not far <= allowed:
            how = f"{far:.2g}" if math.isfinite(far) else "inf (not finite)"
            raise ExportError(
                "The outputs of the SavedModel differ from those of the "
                "model, so it was deleted. If you know why, allow more with "
                f"`tolerance=...`. Received: a difference of {how} in "
                f"signature '{name}', where {allowed:.2g} is allowed"
            )


def publish(folder, path, version, report):
    """Moves a SavedModel to its place atomically; returns the version."""
    while True:
        number = next_version(path) if version is None else version
        target = path / str(number)
        report.update(path=str(target), version=number)
        write_whole(folder / REPORT, json.dumps(report, indent=2).encode())
        check_version(path, version)
        try:
            os.rename(folder, target)
        except OSError as error:
            taken = error.errno in (errno.EEXIST, errno.ENOTEMPTY)
            if taken and version is None:
                continue  # another process was faster
            raise
        return number


def next_version(path):
    """Returns the version after the last one in a folder."""
    numbers = [int(x.name) for x in path.iterdir() if x.name.isdecimal()]
    return max(numbers, default=0) + 1


def table(report):
    """Yields the lines of a readable report."""
    form = report["form"]
    adapters = "no adapters" if form == "none" else f"adapters {form}"
    yield (
        f"Version {report['version']} of {report['model']}, "
        f"{report['bytes'] / 1e6:.1f} MB, {adapters}: {report['path']}"
    )
    rows = dict(report["signatures"])
    if report.get("base"):
        rows["(without adapters)"] = report["base"]
    width = max(map(len, rows))
    yield (
        f"{'signature':{width}}  {'difference':>10}  {'allowed':>8}  "
        f"{'operations':>10}  {'MatMuls':>7}  {'latency':>9}"
    )
    for name, row in rows.items():
        far, allowed = (
            f"{row[key]:.1e}" if key in row else ""
            for key in ("max_difference", "allowed_difference")
        )
        if "different_tokens" in row:
            far = f"{row['different_tokens']} tokens"
        products = sum(
            number
            for operation, number in row["operations"].items()
            if operation in ("MatMul", "BatchMatMulV2", "Einsum")
        )
        yield (
            f"{name:{width}}  {far:>10}  {allowed:>8}  "
            f"{sum(row['operations'].values()):>10}  {products:>7}  "
            f"{row['milliseconds']:>6.1f} ms"
        )
    far = max(row.get("rounding", 0.0) for row in report["signatures"].values())
    if far:
        yield (
            "Quantized layers round their inputs: weights that change by "
            f"{SHAKE:.0e} move the outputs by {far:.1e}. Twice that is allowed."
        )
