"""The main job on real weights and real sentences, in small."""

import numpy as np
import pytest
import real_sentences
from real_sentences import create

import keras_geolora
from keras_geolora import GeoLoRA
from keras_geolora.layers.factor import TRAINED_ROLES

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.fixture(scope="module")
def data():
    return real_sentences.load()


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
    assert names == {*TRAINED_ROLES, "kernel", "bias"}  # the head trains

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


@pytest.mark.slow("trains, saves and loads the real model")
# PEFT asks transformers by an old name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_save_share_and_resume_a_pretrained_classifier(data, tmp_path):
    import keras
    import peft
    import torch
    import transformers

    preset, texts, liked = data
    keras.utils.set_random_seed(0)
    classifier = create(preset)
    classifier.enable_geolora(rank=4, exclude="pooled_dense")
    classifier.compile(
        optimizer=GeoLoRA(keras.optimizers.AdamW(1e-3), cut_interval=2),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    classifier.fit(texts, liked, batch_size=32, verbose=0)
    expected = classifier.predict(texts[:8], verbose=0)

    # The whole run, with its optimizer and tokenizer, in one file.
    classifier.save(tmp_path / "run.keras")
    resumed = keras.saving.load_model(tmp_path / "run.keras")
    np.testing.assert_array_equal(
        resumed.predict(texts[:8], verbose=0), expected
    )
    pairs = zip(
        resumed.optimizer.variables, classifier.optimizer.variables, strict=True
    )
    for one, other in pairs:
        np.testing.assert_array_equal(
            *map(keras.ops.convert_to_numpy, (one, other))
        )

    # The adapter alone.
    classifier.save_geolora(tmp_path / "mine.safetensors")
    assert (tmp_path / "mine.safetensors").stat().st_size < 3_000_000
    fresh = create(preset).load_geolora(tmp_path / "mine.safetensors")
    np.testing.assert_allclose(
        fresh.predict(texts[:8], verbose=0), expected, atol=1e-5
    )

    # In PEFT, on the model as transformers loads it.
    with pytest.warns(UserWarning, match="head:logits"):
        keras_geolora.export_peft(classifier, tmp_path / "peft", prefix="")
    # KerasHub approximates GELU by tanh; so must the other side to compare.
    base = transformers.AutoModel.from_pretrained(preset, hidden_act="gelu_new")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    tokens = classifier.preprocessor(texts[:8])
    ours = classifier.backbone.predict(tokens, verbose=0)["sequence_output"]
    ids, mask = (
        torch.tensor(np.array(keras.ops.convert_to_numpy(tokens[key]))).long()
        for key in ("token_ids", "padding_mask")
    )
    with torch.no_grad():
        theirs = adapted(input_ids=ids, attention_mask=mask).last_hidden_state
    mask = mask.numpy().astype(bool)
    np.testing.assert_allclose(ours[mask], theirs.numpy()[mask], atol=1e-4)
