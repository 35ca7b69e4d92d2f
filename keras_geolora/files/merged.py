"""Merged models as Hugging Face folders: the base plus the updates."""

import dataclasses
import json
import pathlib

import numpy as np

from keras_geolora.files.adapter_format import (
    CONTRADICTIONS,
    AdapterFileError,
    some,
)
from keras_geolora.files.base_weights import HEAD
from keras_geolora.files.exported import exported
from keras_geolora.files.family_names import LM_HEAD
from keras_geolora.files.merged_names import (
    TOKEN_HEADS,
    names_of_experts,
    names_on_disk,
)
from keras_geolora.files.peft_copies import copies_of
from keras_geolora.files.peft_names import (
    is_transposed,
    module_names,
    rows_of_part,
    split_name,
)
from keras_geolora.files.safetensors_folder import INDEX, SafetensorsFolder
from keras_geolora.model.checks import check_model
from keras_geolora.whole_files import write_together

CONFIG = "config.json"
# Endings of files with weights. They are not copied: they are of the base.
OTHER_WEIGHTS = (
    ".bin",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ot",
    ".pt",
    ".pth",
    ".safetensors",
)


def export_merged_safetensors(model, folder, base, name=None, names=None):
    """Writes the merged model as a Hugging Face folder, from that of its base.

    `transformers.AutoModel.from_pretrained(folder)` reads it, and every server
    of such models. The files of the base are copied. Adapted weights become
    `base + scale * U S V.T`, and what trained beside them is replaced. Tensors
    keep their names, shapes and dtypes, and are read and written one by one.
    The model itself is not merged.

    The families are those of `export_peft`; pass `names` for others. All files
    of an earlier export are replaced at once.

    Args:
        model: `keras.Model` on which `enable_geolora` was called.
        folder: String or path, created if it does not exist.
        base: String or path, the folder from which the base was loaded, with
            `config.json` and `model.safetensors`, or several such files and
            their index.
        name: String, the adapter. Defaults to the active one.
        names: As in `export_peft`.

    Returns:
        Dict: `changed`, the number of changed tensors; `added`, the names of
        those that the base does not have, such as a new head;
        `rounding_error`, the largest over all updated tensors of the error of
        rounding to the dtype of the base, relative to the update, in the
        Frobenius norm.

    Raises:
        TypeError: If `model` is not a `keras.Model`.
        ValueError: If there is no such adapter, its bases are not orthonormal,
            a layer has no name, or the base has no tensor of its name, shape or
            kind.
        OSError: If a file is missing or cannot be written.

    Example:

    ```python
    import json
    import tempfile

    import keras
    import numpy as np
    import safetensors.numpy
    import keras_geolora

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.enable_geolora(rank=2)
    with tempfile.TemporaryDirectory() as base:
        with open(f"{base}/config.json", "w") as file:
            json.dump({}, file)
        kernel = keras.ops.convert_to_numpy(model.layers[0].kernel)
        tensors = {"score.weight": np.ascontiguousarray(kernel.T)}
        safetensors.numpy.save_file(tensors, f"{base}/model.safetensors")
        report = keras_geolora.export_merged_safetensors(
            model, f"{base}/merged", base, names={"dense": "score"}
        )
    assert report["changed"] == 1
    ```
    """
    check_model(model)
    adapter = exported(model, folder, name)
    return write_merged(folder, adapter, base, names)


def write_merged(folder, adapter, base, names):
    """Writes the folder of `export_merged_safetensors`; returns its report.

    Args:
        folder: String or path.
        adapter: `Exported`.
        base: String or path.
        names: As in `export_peft`.
    """
    folder, base = pathlib.Path(folder), pathlib.Path(base)
    if not (base / CONFIG).is_file():
        raise FileNotFoundError(
            f"There is no file '{base / CONFIG}'. The base must be the folder "
            "from which the model was loaded."
        )
    weights = SafetensorsFolder(base)
    merge = Merge(adapter, weights, names)
    config = config_with_labels(base / CONFIG, merge.added)
    files = {
        path.name: [path.read_bytes()]
        for path in sorted(base.iterdir())
        if path.is_file()
        and path.suffix not in OTHER_WEIGHTS
        and path.name not in (CONFIG, INDEX)
        and not path.name.startswith(".")
    }
    files |= weights.files(merge.value, merge.added)
    check_target(folder, base, files)
    folder.mkdir(parents=True, exist_ok=True)
    write_together(folder, {**files, CONFIG: [config]})
    return {
        "changed": len(merge.updates) + len(merge.copies),
        "added": sorted(merge.added),
        "rounding_error": merge.rounding_error,
    }


@dataclasses.dataclass
class Update:
    """What is added to a part of a tensor, `left @ right`.

    Attributes:
        left: Array of shape `(..., output_dim, rank)`.
        right: Array of shape `(..., rank, input_dim)`.
        part: Int, which part of the rows of the tensor.
        count: Int, the number of parts.
        transposed: Bool, whether the tensor has rows and columns exchanged.
    """

    left: np.ndarray
    right: np.ndarray
    part: int = 0
    count: int = 1
    transposed: bool = False

    def shape(self, of):
        """Returns the shape of a tensor that takes the update.

        Args:
            of: Tuple of ints, the shape of a tensor. The window of a
                convolution is taken from it.
        """
        rows = self.count * self.left.shape[-2]
        columns = self.right.shape[-1]
        if self.left.ndim == 3:
            return len(self.left), rows, columns
        if self.transposed:
            return columns, rows
        if len(of) > 2:
            window = of[2:]
            return rows, columns // max(int(np.prod(window)), 1), *window
        return rows, columns

    def add_to(self, tensor):
        """Adds the update to a tensor, in place."""
        delta = self.left @ self.right
        if self.transposed:
            tensor = tensor.T
        if self.left.ndim == 2 and tensor.ndim > 2:
            _, channels, *window = tensor.shape
            delta = delta.reshape(len(delta), *window, channels)
            delta = np.moveaxis(delta, -1, 1)
            rows = rows_of_part(len(tensor), self.part, self.count)
            tensor[rows] += delta
        else:
            rows = rows_of_part(tensor.shape[-2], self.part, self.count)
            tensor[..., rows, :] += delta


class Merge:
    """Which tensors of a base an adapter changes, and how.

    Args:
        adapter: `Exported`.
        weights: `SafetensorsFolder`.
        names: As in `export_peft`.

    Attributes:
        updates: Dict from the name of a tensor to a list of `Update`.
        copies: Dict from the name of a tensor to array, its new value.
        added: Dict from name to array, of tensors that the base does not have.
        rounding_error: Float, the largest of the tensors that were written.
    """

    def __init__(self, adapter, weights, names):
        self.adapter, self.weights = adapter, weights
        others = {*adapter.beside, *adapter.biases} - set(adapter.updates)
        self.named = module_names(
            adapter.family, adapter.updates, names, others=others
        )
        self.updates, self.copies, self.added = {}, {}, {}
        self.rounding_error = 0.0
        for path, (U, S, V, scale) in adapter.updates.items():
            self._place_update(path, U, V @ (S.swapaxes(-1, -2) * scale))
        self._place_copies(copies_of(adapter, self.named, ""))

    def value(self, key):
        """Returns the new value of a tensor, or `None` if it stays."""
        if key in self.copies:
            return self.copies[key].astype(self.weights.dtype(key))
        if key not in self.updates:
            return None
        base = self.weights.read(key)
        wide = "float64" if base.dtype == "float64" else "float32"
        whole = base.astype(wide)
        for update in self.updates[key]:
            update.add_to(whole)
        with np.errstate(over="ignore"):
            merged = whole.astype(base.dtype)
        if base.dtype != wide:
            self._measure(key, base.astype(wide), whole, merged.astype(wide))
        return merged

    def _measure(self, key, base, whole, merged):
        """Takes in the rounding error of a tensor."""
        if not np.isfinite(merged).all():
            raise ValueError(
                "The base is in float16, which holds numbers up to 65504 only. "
                f"Received: a larger sum in '{key}'"
            )
        change = np.linalg.norm(whole - base)
        error = np.linalg.norm(merged - whole)
        relative = float(error / change) if change else 0.0
        self.rounding_error = max(self.rounding_error, relative)

    def _place_update(self, path, U, left):
        """Finds the tensors of the kernel of a layer."""
        module, part, count = split_name(self.named[path])
        right = U.swapaxes(-1, -2)
        name = self.adapter.classes[path]
        is_embedding = "Embedding" in name or path.endswith("/embeddings")
        if right.ndim == 3:
            self._place_experts(path, module, left, right, part, count)
            return
        if is_embedding:  # its rows are those of the tensor
            left, right = right.swapaxes(0, 1), left.swapaxes(0, 1)
        elif name == "AdaptedWeight":
            raise ValueError(
                "A weight that belongs to no layer of its own can only be "
                "merged if it is an expert or an embedding. Leave it out: "
                f"`enable_geolora(exclude=...)`. Received: '{path}'"
            )
        flip = is_transposed(self.adapter.family, module) and not is_embedding
        update = Update(left, right, part, count, flip)
        self._add(self._find(path, names_on_disk(module, "weight")), update)
        if is_embedding and "Reversible" in name:
            for head in TOKEN_HEADS:
                for key in self.weights.named(head):
                    self._add(key, update)

    def _place_experts(self, path, module, left, right, part, count):
        """Finds the tensors of experts, one or more for each."""
        found = self.weights.named(module)
        if found:
            self._add(found[0], Update(left, right, part, count))
            return
        for expert in range(len(left)):
            options = names_of_experts(module, expert)
            names = next(
                (x for x in options if self.weights.named(x[0])), options[0]
            )
            if count == len(names) > 1:  # the layer has one of these matrices
                names, share = names[part : part + 1], 1
            else:
                share = len(names)
            for number, name in enumerate(names):
                rows = rows_of_part(left.shape[-2], number, share)
                update = Update(left[expert, rows], right[expert])
                self._add(self._find(path, [name]), update)

    def _place_copies(self, copies):
        """Finds the tensors of what trained beside the factors."""
        if copies.nameless:
            raise ValueError(
                "A merged model must contain all that trained. Pass `names` "
                "for the layers of these variables. Received: "
                f"{some(copies.nameless)} without a name"
            )
        heads = {
            split_name(self.named[path])[0]
            for path in self.adapter.beside
            if path.startswith(HEAD) and path in self.named
        }
        saved = {m: {"bias": bias} for m, bias in copies.biases.items()}
        for module, values in [*saved.items(), *copies.saved.items()]:
            for parameter, value in values.items():
                names = names_on_disk(module, parameter)
                exists = any(map(self.weights.named, names))
                if exists or module not in (*heads, LM_HEAD):
                    key = self._find(module, names)
                    self._check(key, value.shape, module)
                    self.copies[key] = value
                elif module != LM_HEAD:  # a tied one is not in the file
                    self.added[names[0]] = value

    def _find(self, what, names):
        """Returns the one tensor that has one of several names."""
        found = [key for name in names for key in self.weights.named(name)]
        if len(found) != 1:
            what_is = f"{len(found)} tensors" if found else "no tensor"
            raise AdapterFileError(
                f"The base in '{self.weights.folder}' has {what_is} of the "
                f"name '{names[0]}', for '{what}'. It must be the folder from "
                "which the model was loaded; pass `names` if its modules are "
                "called otherwise."
            )
        return found[0]

    def _add(self, key, update):
        """Adds an update of a tensor."""
        self._check(key, update.shape(self.weights.shape(key)), key)
        self.updates.setdefault(key, []).append(update)

    def _check(self, key, shape, what):
        """Refuses a tensor of another shape, or one that is quantized."""
        if self.weights.shape(key) != tuple(shape):
            raise AdapterFileError(
                f"'{key}' in '{self.weights.folder}' has shape "
                f"{self.weights.shape(key)}, and the model has {tuple(shape)} "
                f"for '{what}'. The base must be the folder from which the "
                "model was loaded."
            )
        if self.weights.dtype(key) is None:
            raise AdapterFileError(
                "An update can be added to float32, float16, bfloat16 and "
                "float64 tensors. Use a base that is not quantized. Received: "
                f"'{key}' of type {self.weights.entries[key]['dtype']}"
            )


def config_with_labels(path, added):
    """Returns the bytes of a config that knows the labels of a new head.

    Args:
        path: Path of the config of the base.
        added: Dict from name to array, of tensors that the base does not have.
    """
    text = path.read_bytes()
    counts = [
        len(value)
        for key, value in added.items()
        if key in ("classifier.weight", "classifier.out_proj.weight")
    ]
    if not counts:
        return text
    try:
        config = json.loads(text)
        labels = config.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}
        if len(labels) != counts[0]:
            names = [f"LABEL_{i}" for i in range(counts[0])]
            config["id2label"] = dict(enumerate(names))
            config["label2id"] = {name: i for i, name in enumerate(names)}
    except CONTRADICTIONS as error:
        raise AdapterFileError(f"'{path}' is not a config: {error}.") from error
    return json.dumps(config, indent=2).encode()


def check_target(folder, base, files):
    """Refuses the folder of the base, and one with other weights in it."""
    if folder.exists() and folder.resolve() == base.resolve():
        raise ValueError(
            "The merged model needs a folder of its own. Received: the base, "
            f"'{folder}'"
        )
    others = [
        path.name
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.suffix in OTHER_WEIGHTS and path.name not in files
    ]
    if others:
        raise ValueError(
            "The folder has weights that readers would load instead. "
            f"Choose an empty one. Received: '{folder}' with {some(others)}"
        )
