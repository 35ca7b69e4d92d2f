"""The main job on real weights and real sentences, in small."""

import pathlib
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
import assets

import keras_geolora  # noqa: F401  adds the methods to `keras.Model`
from keras_geolora import GeoLoRA

SENTENCES = 96


@pytest.fixture(scope="module")
def data():
    try:
        preset, (texts, liked) = assets.minilm_folder(), load_sentences()
    except (FileNotFoundError, ModuleNotFoundError) as error:
        pytest.skip(f"real weights and data are not installed: {error}")
    return preset, np.array(texts), liked


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


def test_adapt_train_look_and_merge_a_pretrained_classifier(data):
    import keras
    import keras_hub

    preset, texts, liked = data
    keras.utils.set_random_seed(0)
    classifier = create(preset)
    pretrained = classifier.predict(texts[:8], verbose=0)
    classifier.enable_geolora(rank=4)
    fresh = classifier.predict(texts[:8], verbose=0)
    np.testing.assert_array_equal(fresh, pretrained)
    assert isinstance(classifier, keras_hub.models.BertTextClassifier)
    names = {v.name for v in classifier.trainable_variables}
    assert names == {"U", "S", "V", "kernel", "bias"}  # the head trains

    classifier.compile(
        optimizer=GeoLoRA(keras.optimizers.AdamW(1e-3)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = classifier.fit(
        texts,
        liked,
        validation_split=0.25,
        epochs=2,
        batch_size=16,
        shuffle=False,
        verbose=0,
    ).history
    assert history["loss"][1] < history["loss"][0]
    assert history["skipped_steps"] == [0, 0]
    rows = classifier.geolora_summary(print_fn=None)
    assert len(rows) == 37
    assert max(row["orthogonality_error"] for row in rows) < 1e-5
    ranks = [row["rank"] for row in rows]
    assert history["mean_rank"][-1] == np.mean(ranks)

    adapted = classifier.predict(texts[:8], verbose=0)
    assert np.abs(adapted - pretrained).max() > 1e-3
    classifier.merge_geolora()
    merged = classifier.predict(texts[:8], verbose=0)
    difference = np.linalg.norm(merged - adapted)
    assert difference < 1e-5 * np.linalg.norm(adapted)
    assert type(classifier) is keras_hub.models.BertTextClassifier
