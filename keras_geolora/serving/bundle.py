"""The weights of a SavedModel in two files: those of the base, and adapters.

TensorFlow's format for weights, a "tensor bundle", is an index and any number
of files with data. With the adapters in one of their own, a new version needs
to write that and the index only, and shares the other by a hard link. Servers
read such versions as any other.

Runs on TensorFlow only, but uses no Keras.
"""

import contextlib
import os
import pathlib
import shutil
import tempfile

import tensorflow as tf

# How TensorFlow names the variables in `root.bank`, see `saved_model.save`.
KEY = "bank/{}/.ATTRIBUTES/VARIABLE_VALUE"
VARIABLES = "variables/variables"
# A folder that servers and TensorFlow leave alone. The index in it is that of
# the base's file alone.
OURS = "assets.extra"
BASE_INDEX = f"{OURS}/geolora_base.index"
# A fingerprint is that of one version; TensorFlow can do without.
WRITTEN_ANEW = ("geolora_report.json", "geolora_places.json", "fingerprint.pb")
BASE_DATA = f"{VARIABLES}.data-00000-of-00002"


def split_off_adapters(folder, number):
    """Moves the weights of adapters to a file of their own.

    Args:
        folder: Path of a SavedModel.
        number: Int, how many variables hold them.
    """
    prefix = str(folder / VARIABLES)
    keys = [KEY.format(i) for i in range(number)]
    dtypes = tf.train.load_checkpoint(prefix).get_variable_to_dtype_map()
    others = sorted(set(dtypes) - set(keys))
    with tempfile.TemporaryDirectory(dir=folder) as stage:
        stage = pathlib.Path(stage)
        for name, part in {"base": others, "bank": keys}.items():
            save(stage / name, part, restore(prefix, part, dtypes))
        for path in (folder / "variables").iterdir():
            path.unlink()
        (folder / OURS).mkdir(exist_ok=True)
        shutil.copy2(stage / "base.index", folder / BASE_INDEX)
        merge(stage, folder)


def read_adapters(folder, number):
    """Returns the arrays that hold the adapters of a SavedModel, in order."""
    prefix = str(folder / VARIABLES)
    keys = [KEY.format(i) for i in range(number)]
    dtypes = tf.train.load_checkpoint(prefix).get_variable_to_dtype_map()
    return [x.numpy() for x in restore(prefix, keys, dtypes)]


def write_sibling(folder, new, arrays):
    """Writes a SavedModel that differs from another in its adapters only.

    Args:
        folder: Path of the SavedModel.
        new: Path of a folder that does not exist.
        arrays: List as of `read_adapters`, with the same dtypes and shapes.
    """
    apart = {"variables", *WRITTEN_ANEW}
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        if path.is_dir():
            (new / place).mkdir(parents=True, exist_ok=True)
        elif place.parts[0] not in apart:
            link(path, new / place)
    (new / "variables").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=new) as stage:
        stage = pathlib.Path(stage)
        link(folder / BASE_DATA, stage / "base.data-00000-of-00001")
        shutil.copy2(folder / BASE_INDEX, stage / "base.index")
        keys = [KEY.format(i) for i in range(len(arrays))]
        save(stage / "bank", keys, [tf.constant(x) for x in arrays])
        merge(stage, new)


def restore(prefix, keys, dtypes):
    """Returns the tensors of a bundle."""
    return tf.raw_ops.RestoreV2(
        prefix=prefix,
        tensor_names=keys,
        shape_and_slices=[""] * len(keys),
        dtypes=[dtypes[key] for key in keys],
    )


def save(prefix, keys, tensors):
    """Writes a bundle with one file of data."""
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=keys,
        shape_and_slices=[""] * len(keys),
        tensors=tensors,
    )


def merge(stage, folder):
    """Makes the bundles `base` and `bank` one; their data only moves."""
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=[str(stage / "base"), str(stage / "bank")],
        destination_prefix=str(folder / VARIABLES),
        delete_old_dirs=False,
    )


def link(path, other):
    """Gives a file a second name, or copies it where that is not possible."""
    with contextlib.suppress(OSError):
        os.link(path, other)
        return
    shutil.copy2(path, other)
