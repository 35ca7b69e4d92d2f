"""Tasks of KerasHub: classifiers, language models, generation."""

import families
import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

from keras_geolora import GeoLoRA
from keras_geolora.layers.factor import factor_of
from keras_geolora.layers.tree import adapted_layers

models = keras_hub.models
RNG = np.random.default_rng(0)
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def build(name, **changes):
    """A backbone of one layer, all of whose kernels have the same shape."""
    return families.build(f"{name}Backbone", num_layers=1, **changes)


def text_classifier():
    backbone, inputs = build("Bert", intermediate_dim=16)
    task = models.BertTextClassifier(
        backbone, num_classes=2, preprocessor=None, dropout=0.0
    )
    return task, inputs, np.array([0, 1])


def image_classifier():
    backbone, inputs = build("ViT", mlp_dim=16, image_shape=(8, 8, 1))
    task = models.ViTImageClassifier(backbone, num_classes=3, preprocessor=None)
    return task, inputs, np.array([0, 2])


def causal_lm(name="GPT2"):
    same = {"GPT2": {"intermediate_dim": 16}, "Gemma": {}}
    backbone, inputs = build(name, **same[name])
    task = getattr(models, f"{name}CausalLM")(backbone, preprocessor=None)
    return task, inputs, inputs["token_ids"]


def masked_lm():
    backbone, inputs = build("Bert", intermediate_dim=16)
    task = models.BertMaskedLM(backbone, preprocessor=None)
    inputs["mask_positions"] = np.array([[1, 3], [2, 4]], "int32")
    return task, inputs, np.array([[3, 4], [5, 6]])


def predict(task, inputs):
    return np.array(task.predict(inputs, verbose=0))


def fit(task, inputs, labels):
    task.compile(
        optimizer=GeoLoRA(keras.optimizers.Adam(1e-2), max_update_ratio=0.02),
        loss=CROSS_ENTROPY,
    )
    task.fit(inputs, labels, batch_size=2, epochs=6, verbose=0)


# The masked language model does not use the pooler, as both say.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Gradients do not exist"),
    pytest.mark.filterwarnings("ignore:.*adapters have not moved"),
]

TASKS = [text_classifier, image_classifier, causal_lm, masked_lm]


@pytest.mark.parametrize("create", TASKS)
def test_a_task_trains_its_adapters_and_its_head(create):
    keras.utils.set_random_seed(0)
    task, inputs, labels = create()
    before = predict(task, inputs)
    head = [
        v.path
        for v in task.trainable_variables
        if id(v) not in {id(w) for w in task.backbone.weights}
    ]
    task.enable_geolora(rank=2, seed=0)
    assert len(adapted_layers(task)) == len(adapted_layers(task.backbone)) > 5
    np.testing.assert_array_equal(predict(task, inputs), before)
    trainable = [
        v.path for v in task.trainable_variables if factor_of(v) is None
    ]
    assert trainable == head
    fit(task, inputs, labels)
    after = predict(task, inputs)
    assert CROSS_ENTROPY(labels, after) < CROSS_ENTROPY(labels, before)
    with task.geolora_disabled():
        np.testing.assert_array_equal(predict(task, inputs), before)
    task.merge_geolora()
    assert type(task).__module__.startswith("keras_hub")
    np.testing.assert_allclose(predict(task, inputs), after, atol=1e-5)
    task.unmerge_geolora()
    np.testing.assert_array_equal(predict(task, inputs), after)
    task.remove_geolora()
    np.testing.assert_array_equal(predict(task, inputs), before)


@pytest.mark.parametrize("create", [text_classifier, causal_lm])
def test_a_task_that_rested_trains_what_it_trained(create, tmp_path):
    task, *_ = create()
    task.enable_geolora(rank=2)
    before = [v.path for v in task.trainable_variables]
    for part in (task, task.backbone):
        part.trainable = False
        assert not part.trainable_variables
        part.trainable = True
        assert [v.path for v in task.trainable_variables] == before
    task.backbone.trainable = task.trainable = False
    task.save(tmp_path / "task.keras")
    loaded = keras.saving.load_model(tmp_path / "task.keras")
    for each in (task, loaded):
        assert not any(v.trainable for v in each.weights)
        each.trainable = True
        assert [v.path for v in each.trainable_variables] == before


@pytest.mark.slow("sixty epochs, and generation in six states")
@pytest.mark.parametrize("name", ["GPT2", "Gemma"])
def test_generation_goes_on_from_adapters_to_merged_kernels(name):
    keras.utils.set_random_seed(0)
    task, inputs, _ = causal_lm(name)
    prompt = {
        "token_ids": inputs["token_ids"],
        "padding_mask": np.tile(np.arange(8) < 3, (2, 1)).astype("int32"),
    }

    def generate():
        output = task.generate(prompt, stop_token_ids=None)
        return np.array(ops.convert_to_numpy(output["token_ids"]))

    task.compile(sampler="greedy")
    before = generate()
    task.enable_geolora(rank=4, targets=["all-linear", ".*embedding"], seed=0)
    np.testing.assert_array_equal(generate(), before)
    # Teach it to say 7, and to go on saying it.
    inputs["token_ids"][:, 3:] = 7
    labels = np.full(inputs["token_ids"].shape, 7)
    task.compile(
        optimizer=GeoLoRA(keras.optimizers.Adam(3e-2), max_update_ratio=None),
        loss=CROSS_ENTROPY,
        sampler="greedy",
    )
    task.fit(inputs, labels, batch_size=2, epochs=60, verbose=0)
    after = generate()
    assert (after[:, 3:] == 7).all()
    with task.geolora_disabled():
        np.testing.assert_array_equal(generate(), before)
    np.testing.assert_array_equal(generate(), after)
    task.merge_geolora()
    np.testing.assert_array_equal(generate(), after)


def test_a_preset_gives_plain_tasks_also_after_one_was_adapted(tmp_path):
    task, _, _ = text_classifier()
    task.backbone.save_to_preset(tmp_path)
    for _ in range(2):
        task = models.TextClassifier.from_preset(
            str(tmp_path), num_classes=2, preprocessor=None
        )
        assert type(task) is models.BertTextClassifier
        task.enable_geolora(rank=2)
