"""SavedModels of mixtures of experts."""

import families
import keras
import keras_hub
import numpy as np
import pytest
import serving

import keras_geolora
from keras_geolora.layers.tree import adapted_layers

pytestmark = [
    pytest.mark.usefixtures("forked"),
    pytest.mark.filterwarnings("ignore"),  # those of KerasHub's own code
]
TASKS = {
    "MixtralBackbone": keras_hub.models.MixtralCausalLM,
    "QwenMoeBackbone": keras_hub.models.QwenMoeCausalLM,
}


def adapted(name, *adapters):
    keras.utils.set_random_seed(0)
    backbone, _ = families.build(name, num_layers=1)
    model = TASKS[name](backbone, preprocessor=None)
    rng = np.random.default_rng(0)
    for adapter in adapters:
        model.enable_geolora(
            1, max_rank=1, targets="experts", name=adapter, seed=0
        )
        for weight in adapted_layers(model).values():
            S = rng.uniform(1, 2, weight.adapter.S.shape)
            weight.adapter.S.assign(S.astype("float32"))
    return model


def tokens(rows=2, length=5):
    rng = np.random.default_rng(rows)
    return {
        "token_ids": rng.integers(16, size=(rows, length)).astype("int32"),
        "padding_mask": np.ones((rows, length), "int32"),
    }


@pytest.mark.parametrize("name", TASKS)
def test_experts_are_merged_into_a_savedmodel(name, tmp_path):
    model = adapted(name, "one")
    report = keras_geolora.export(model, tmp_path, verbose=False)
    assert report["form"] == "merged" and report["same_operations"]
    x = tokens()
    (found,) = serving.load(tmp_path / "1")(x).values()
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with model.geolora_disabled():
        assert np.abs(model.predict(x, verbose=0) - expected).max() > 1e-3


def test_a_mixture_generates_tokens(tmp_path):
    model = adapted("MixtralBackbone", "one")
    model.compile(sampler="greedy")
    report = keras_geolora.export(
        model,
        tmp_path,
        generate=True,
        stop_token_ids=None,
        baseline=False,
        verbose=False,
    )
    assert report["form"] == "merged"
    entry = report["signatures"]["generate"]
    assert entry["different_tokens"] == entry["ties"] == 0
    x = tokens(rows=1, length=6)
    x["padding_mask"][:, 2:] = x["token_ids"][:, 2:] = 0
    found = serving.load(tmp_path / "1", "generate")(x)["token_ids"]
    expected = model.generate(x, stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(found, expected)


def test_adapters_of_experts_share_one_copy_of_them(tmp_path):
    model = adapted("MixtralBackbone", "one", "two")
    report = keras_geolora.export(
        model, tmp_path, adapters="all", baseline=False, verbose=False
    )
    assert report["form"] == "beside the kernels"
    x, expected = tokens(), {}
    for name in ("one", "two"):
        model.activate_geolora(name)
        expected[name] = model.predict(x, verbose=0)
        (found,) = serving.load(tmp_path / "1", name)(x).values()
        np.testing.assert_allclose(found, expected[name], atol=1e-5)
    assert np.abs(expected["one"] - expected["two"]).max() > 1e-3
    values = serving.number_of_values(tmp_path / "1")
    model.remove_geolora()
    assert values < 1.9 * model.count_params()


def test_experts_for_every_row_of_a_batch_are_refused(tmp_path):
    model = adapted("MixtralBackbone", "one")
    with pytest.raises(
        ValueError, match=r"'.*experts/.*gate_dense', and it is"
    ):
        keras_geolora.export(model, tmp_path, route=True, verbose=False)
    assert not any(tmp_path.iterdir())
