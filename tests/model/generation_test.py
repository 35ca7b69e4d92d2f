"""Generation with adapters, which prepares what every token needs."""

import keras_hub
import numpy as np
import pytest
from keras import ops
from moving import move
from small_models import llama

from keras_geolora import LowRankAdapter
from keras_geolora.layers.prepared import prepared_products
from keras_geolora.layers.tree import adapted_layers

VOCABULARY, LENGTH, PROMPT = 32, 12, 4


def adapted(**options):
    model = llama(**options)
    model.enable_geolora(rank=2, seed=0)
    move(model)
    return model


def tokens():
    rng = np.random.default_rng(0)
    return rng.integers(VOCABULARY, size=(2, LENGTH)).astype("int32")


class LastBits(keras_hub.samplers.Sampler):
    """Chooses a token by some bits of a probability, by default the last."""

    def __init__(self, bits=28):
        super().__init__()
        self.bits = bits

    def get_next_token(self, probabilities):
        bits = ops.cast(probabilities[:, 0] * 2**self.bits, "int32")
        return ops.mod(bits, VOCABULARY)


def generate(model):
    ids = tokens()
    mask = np.zeros_like(ids)
    mask[:, :PROMPT] = 1
    prompt = {"token_ids": ids, "padding_mask": mask}
    return np.array(model.generate(prompt, stop_token_ids=None)["token_ids"])


def logits_of_the_last_token(model, at_rest=False):
    """As generation computes them, one token after the others."""
    with prepared_products(adapted_layers(model).values(), at_rest):
        ids = ops.convert_to_tensor(tokens())
        _, cache = model._build_cache(ids)
        logits, *_ = model.call_with_cache(ids[:, -1:], cache, LENGTH - 1)
    return ops.convert_to_numpy(logits)[:, 0].astype("float32")


def logits_of_a_call(model):
    x = {"token_ids": tokens(), "padding_mask": np.ones((2, LENGTH), "int32")}
    logits = model(x, training=False)[:, -1]
    return ops.convert_to_numpy(ops.cast(logits, "float32"))


def leave_rest(model):
    """As between two retractions."""
    rng = np.random.default_rng(1)
    for layer in adapted_layers(model).values():
        for factor in (layer.adapter.P, layer.adapter.Q):
            noise = rng.normal(size=factor.shape, scale=0.05)
            factor.assign(noise.astype("float32"))


def return_to_rest(model):
    for layer in adapted_layers(model).values():
        for factor in (layer.adapter.P, layer.adapter.Q):
            factor.assign(np.zeros(factor.shape, "float32"))


def test_a_fresh_adapter_changes_no_bit():
    model = llama()
    model.compile(sampler=LastBits())
    before = generate(model)
    assert len(np.unique(before[:, PROMPT:])) > 5
    model.enable_geolora(rank=2, seed=0)
    np.testing.assert_array_equal(generate(model), before)
    move(model)
    assert not np.array_equal(generate(model), before)


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize(
    "dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.006)]
)
def test_prepared_products_are_those_of_a_call(dtype, tolerance, moving):
    model = adapted(dtype=dtype)
    if moving:
        leave_rest(model)
    found = logits_of_the_last_token(model, at_rest=not moving)
    expected = logits_of_a_call(model)
    np.testing.assert_allclose(found, expected, atol=tolerance)
    with model.geolora_disabled():
        plain = logits_of_a_call(model)
        found = logits_of_the_last_token(model)
    np.testing.assert_allclose(found, plain, atol=tolerance)
    assert np.abs(plain - expected).max() > 3 * tolerance


def test_no_update_is_formed_for_every_token(monkeypatch):
    def delta(self):
        raise AssertionError("an update was formed")

    model, merged = adapted(), adapted()
    merged.merge_geolora()
    for one in (model, merged):
        one.compile(sampler="greedy")
    expected = generate(merged)
    monkeypatch.setattr(LowRankAdapter, "delta", delta)
    np.testing.assert_array_equal(generate(model), expected)


def test_generation_goes_with_a_training_that_goes_on():
    model = adapted()
    model.compile(sampler=LastBits())
    before = generate(model)
    leave_rest(model)
    moving = generate(model)
    assert not np.array_equal(moving, before)
    np.testing.assert_array_equal(generate(model), moving)
    return_to_rest(model)
    np.testing.assert_array_equal(generate(model), before)


def test_a_quantized_model_generates_with_its_adapter():
    model = llama()
    model.quantize("int8")
    model.enable_geolora(rank=2, seed=0)
    move(model)
    np.testing.assert_allclose(
        logits_of_the_last_token(model), logits_of_a_call(model), atol=0.1
    )


def test_a_merged_model_remembers_nothing_of_it():
    model = adapted()
    model.compile(sampler="greedy")
    generate(model)
    model.merge_geolora()
    assert not hasattr(model, "geolora_adaptation")


def test_a_function_that_is_kept_goes_with_a_training_that_goes_on():
    model, ids = adapted(), tokens()
    # The last ones differ where one function is compiled and another is not.
    model.compile(sampler=LastBits(12))
    mask = np.zeros_like(ids)
    mask[:, :PROMPT] = 1
    prompt = {"token_ids": ids, "padding_mask": mask}
    kept = model.make_generate_function()

    def check(function):
        found = ops.convert_to_numpy(function(prompt, None)["token_ids"])
        np.testing.assert_array_equal(found, generate(model))
        return found

    before = check(kept)
    np.testing.assert_array_equal(check(model.generate_step), before)
    leave_rest(model)
    assert not np.array_equal(check(kept), before)
    # Nobody has looked at `P` and `Q` here.
    np.testing.assert_array_equal(check(model.generate_step), check(kept))
    return_to_rest(model)
    model.merge_geolora()
    check(kept)
