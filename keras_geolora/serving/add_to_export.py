"""Adds adapters to a model that is exported, without exporting it again."""

import importlib.util
import json
import pathlib
import tempfile

import numpy as np

from keras_geolora.files.adapter_format import read_adapter
from keras_geolora.model.checks import check_name
from keras_geolora.serving.export import REPORT, publish
from keras_geolora.serving.places import (
    FREE,
    PLACES,
    Content,
    Places,
    with_values,
)
from keras_geolora.whole_files import only_writer

# What a report says of a comparison and a measurement that are not repeated.
NOT_REPEATED = (
    "max_difference",
    "allowed_difference",
    "milliseconds",
    "different_tokens",
    "ties",
)


def add_to_export(path, adapters=None, *, remove=(), verbose=True):
    """Writes the next version of an exported model, with other adapters.

    For a model of `export(..., route=True)`. Neither the base model nor Keras'
    weights are needed: the new version consists of the graph and the base's
    weights of the latest version, by hard links where the file system has
    them, and one small file with all adapters. It gets its number when it is
    complete, so a server takes it up as it does any other version, and after a
    restart it is still there. Delete old versions as you like.

    Args:
        path: String or path of the folder of the model, as of `export`.
        adapters: Dict from name to the path of an adapter file of
            `save_geolora`. An adapter of a known name is replaced. Defaults to
            `None`.
        remove: Names of adapters to remove, whose places become free. Defaults
            to `()`.
        verbose: Bool, whether to print a line. Defaults to `True`.

    Returns:
        The report, that of the version before with `path`, `version`,
        `from_version`, `new_bytes` (what the new version adds on disk), and the
        names of the `adapters` in its signature. It has no differences and
        latencies, which are not measured again.

    Raises:
        FileNotFoundError: If there is no version with places for adapters, or
            no such adapter file.
        AdapterFileError: If an adapter file is damaged.
        ValueError: If an adapter does not fit, or no place is free. Nothing is
            written then.
        ImportError: If TensorFlow is not installed.

    Example:

    ```python
    import pathlib
    import tempfile

    import keras
    import keras_geolora

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.enable_geolora(rank=2, name="french")
    with tempfile.TemporaryDirectory() as folder:
        keras_geolora.export(model, folder, route=True, capacity=8)
        file = pathlib.Path(folder) / "german.safetensors"
        model.save_geolora(file)
        report = keras_geolora.add_to_export(folder, {"german": file})
    assert report["version"] == 2
    ```
    """
    path, adapters = pathlib.Path(path), adapters or {}
    if not isinstance(adapters, dict) or not (adapters or remove):
        raise ValueError(
            "`adapters` must be a dict from names to adapter files, for "
            "example `{'german': 'german.safetensors'}`, unless there is "
            f"something to `remove`. Received: adapters={adapters!r}"
        )
    for name in adapters:
        check_name(name)
    if importlib.util.find_spec("tensorflow") is None:
        raise ImportError(
            "SavedModels are written by TensorFlow, even on other backends. "
            "Run: `python -m pip install tensorflow`. Received: TensorFlow is "
            "not installed"
        )
    contents = {
        name: Content.of_file(*read_adapter(file))
        for name, file in adapters.items()
    }
    # Of two writers at once, the second starts from what the first has written.
    with only_writer(path):
        report = write_next(path, contents, remove)
    if verbose:
        print(
            f"Version {report['version']} of {report['model']}, "
            f"{report['new_bytes'] / 1e6:.1f} MB more: {report['path']}"
        )
    return report


def write_next(path, contents, remove):
    """Writes the version after the latest one and returns its report.

    Args:
        path: Path of the folder of the model.
        contents: Dict from name to `Content`.
        remove: Names of adapters.
    """
    from keras_geolora.serving import bundle

    latest = latest_version(path)
    description = json.loads((latest / PLACES).read_text())
    keys = description.pop("keys")
    places = Places(**description)
    for name in remove:
        places.names[places.place_of(name)] = FREE
    places.names, values = places.taken_by(contents)
    names, *arrays = bundle.read_adapters(latest, 1 + len(keys))
    names[:] = [name.encode() for name in places.names]
    arrays = [
        with_values(array, values.get(key, []))
        for key, array in zip(keys, arrays, strict=True)
    ]
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path) as folder:
        new = pathlib.Path(folder) / "saved_model"
        bundle.write_sibling(latest, new, [names, *arrays])
        check_written(bundle, new, [names, *arrays])
        described = {**vars(places), "keys": keys}
        (new / PLACES).write_text(json.dumps(described, indent=1))
        report = next_report(latest, new, places)
        publish(new, path, None, report)
    return report


def latest_version(path):
    """Returns the folder of the latest version, which must have places."""
    numbers = [int(x.name) for x in path.iterdir() if x.name.isdecimal()]
    latest = path / str(max(numbers, default=0))
    if not (latest / PLACES).exists():
        raise FileNotFoundError(
            "Adapters can be added to a model of `export(model, path, "
            "route=True, capacity=...)`. Received: a folder whose latest "
            f"version, '{latest}', has no places for adapters"
        )
    return latest


def check_written(bundle, folder, arrays):
    """Reads adapters again and compares them."""
    found = bundle.read_adapters(folder, len(arrays))
    for array, other in zip(arrays, found, strict=True):
        if not np.array_equal(array, other):
            raise OSError(
                f"What was written to '{folder}' is not what is there."
            )


def next_report(latest, new, places):
    """Returns the report of a version that differs in its adapters."""
    report = json.loads((latest / REPORT).read_text())
    for signature in report["signatures"].values():
        for key in NOT_REPEATED:
            signature.pop(key, None)
        signature["adapters"] = places.adapters
    files = [x for x in new.rglob("*") if x.is_file()]
    report.update(
        from_version=int(latest.name),
        bytes=sum(x.stat().st_size for x in files),
        new_bytes=sum(
            x.stat().st_size for x in files if x.stat().st_nlink == 1
        ),
    )
    return report
