"""A pretrained classifier and movie reviews, where they are installed."""

import json
import pathlib
import sys

import keras
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
import assets

SENTENCES = 96


def load():
    """Returns a preset, sentences and labels, or skips the test."""
    try:
        preset, (texts, liked) = assets.minilm_folder(), load_sentences()
    except (FileNotFoundError, ModuleNotFoundError) as error:
        pytest.skip(f"real weights and data are not installed: {error}")
    return preset, np.array(texts), liked


def cut(preset, folder, layers):
    """Makes a preset of the first layers of another, in a new folder.

    On torch it has them all. Other backends compile each of them, and six take
    a minute where what is done to one layer is done to all.
    """
    if keras.backend.backend() == "torch":
        folder.symlink_to(preset)
        return str(folder)
    folder.mkdir()
    for file in pathlib.Path(preset).iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").unlink()
    config = json.dumps(config | {"num_hidden_layers": layers})
    (folder / "config.json").write_text(config, "utf-8")
    return str(folder)


def load_sentences():
    texts, liked = assets.movie_sentences(seed=0)
    return texts[:SENTENCES], liked[:SENTENCES]


def create(preset):
    import keras_hub

    return keras_hub.models.TextClassifier.from_preset(
        preset,
        num_classes=2,
        preprocessor=keras_hub.models.BertTextClassifierPreprocessor(
            keras_hub.tokenizers.BertTokenizer.from_preset(preset),
            sequence_length=16,
        ),
    )
