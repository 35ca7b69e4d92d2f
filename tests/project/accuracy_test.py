"""The comparison of `benchmarks/accuracy.py` counts and begins as it says."""

import functools
import pathlib
import sys

import keras
import numpy as np
import pytest

# At the end: `families` is the one of the tests.
sys.path.append(str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import contenders
import tasks

WIDTH, LAYERS, HEADS, LENGTH = 16, 1, 4, 6
# Every shape takes a second or two to compile, so that it is the same there.
INNER = 32 if keras.backend.backend() == "torch" else WIDTH
RANK = 2
STEPS = 4  # until the rate is zero
# Query, key, value and output; the two of the feed-forward part; the pooler.
SIDES = LAYERS * [*4 * [(WIDTH, WIDTH)], *2 * [(WIDTH, INNER)]]
SIDES = [*SIDES, (WIDTH, WIDTH)]
LORA = RANK * sum(map(sum, SIDES))
OPTIONS = {
    "geolora": {"tolerance": 0.1, "room": 2},
    "peft_lora": {"scale": 1.0},
    "peft_adalora": {"scale": 1.0},
}
of_peft = pytest.mark.backend_independent("PEFT runs on torch in any case")
of_counts = pytest.mark.backend_independent("it counts parameters")


def contenders_of(*methods):
    return [
        pytest.param(x, marks=of_peft if x.startswith("peft") else ())
        for x in methods
    ]


class Tiny(tasks.Sentences):
    """Random tokens, and a random BERT in place of a pretrained one."""

    examples, validation, held_out, epochs = 64, 8, 32, 2
    classes, dropout = 3, 0.1

    def __init__(self):
        pass

    def load(self):
        rng = np.random.default_rng(0)
        shape = (self.examples + 40, LENGTH)
        x = {
            "token_ids": rng.integers(50, size=shape).astype("int32"),
            "segment_ids": np.zeros(shape, "int32"),
            "padding_mask": np.ones(shape, "int32"),
        }
        return x, rng.integers(self.classes, size=len(x["token_ids"]))

    def keras_model(self):
        import keras_hub

        backbone = keras_hub.models.BertBackbone(
            vocabulary_size=50,
            num_layers=LAYERS,
            num_heads=HEADS,
            hidden_dim=WIDTH,
            intermediate_dim=INNER,
            max_sequence_length=LENGTH,
        )
        return keras_hub.models.BertTextClassifier(
            backbone, num_classes=self.classes, preprocessor=None
        )

    def torch_backbone(self):
        import transformers

        return transformers.BertModel(
            transformers.BertConfig(
                vocab_size=50,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                hidden_size=WIDTH,
                intermediate_size=INNER,
                max_position_embeddings=LENGTH,
            )
        )


@functools.cache  # every run begins anew, as the first test says
def made(method, steps=STEPS):
    pytest.importorskip("keras_hub")
    if method.startswith("peft"):
        pytest.importorskip("peft")
        pytest.importorskip("transformers")
    options = OPTIONS.get(method, {})
    return contenders.CONTENDERS[method](Tiny(), RANK, steps, **options)


def train(contender, seed):
    task = contender.task
    x, y = task.load()
    rows = tasks.split(task, len(y), seed)[0]
    return contender.train(x, y, [rows, rows], 1e-2, seed)


@pytest.mark.parametrize("method", contenders_of(*contenders.CONTENDERS))
def test_every_run_of_a_contender_begins_anew(method):
    contender = made(method)
    first = train(contender, 0)
    other = train(contender, 1)
    again = train(contender, 0)
    assert first != other
    np.testing.assert_allclose(again, first, rtol=1e-5)


@pytest.mark.parametrize(
    "method", contenders_of("geolora", "plain_lora", "peft_lora")
)
def test_a_rate_falls_to_zero(method, monkeypatch):
    rates = rates_of_steps(made(method), monkeypatch)
    np.testing.assert_allclose(rates, [0.01, 0.0075, 0.005, 0.0025], rtol=1e-5)


def rates_of_steps(contender, monkeypatch):
    """Trains until the rate is zero, and returns the rate of each step."""
    found = []
    if isinstance(contender, contenders.OnPEFT):
        import torch

        step = torch.optim.AdamW.step

        def record(optimizer, *args, **kwargs):
            found.append(optimizer.param_groups[0]["lr"])
            return step(optimizer, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", record)
    else:
        fit = contender.fit

        def record(*args):
            # Compiling has taken a step, which beginning takes back.
            if contender.compiled:
                found.append(float(contender.optimizer.learning_rate))
            return fit(*args)

        monkeypatch.setattr(contender, "fit", record)
    x, y = contender.task.load()
    batches = np.split(np.arange(STEPS * tasks.BATCH) % len(y), STEPS)
    contender.train(x, y, batches, 1e-2, 0)
    return found


@of_counts
@pytest.mark.parametrize("method", ["plain_lora", "peft_lora"])
def test_lora_has_the_parameters_of_its_rank(method):
    contender = made(method)
    train(contender, 0)
    assert contender.parameters() == contender.effective() == LORA
    assert contender.ranks() == [RANK] * len(SIDES)


@of_counts
def test_keras_lora_factors_the_last_axis_of_the_kernels_of_heads():
    contender = made("keras_lora")
    # Query, key and value have (width, heads, size of a head).
    of_heads = RANK * (WIDTH * HEADS + WIDTH // HEADS)
    expected = LORA + 3 * LAYERS * (of_heads - RANK * 2 * WIDTH)
    assert contender.effective() == contender.parameters() == expected


def test_geolora_stays_within_the_parameters_of_lora():
    contender = made("geolora")
    train(contender, 0)
    ranks = contender.ranks()
    assert contender.effective() == sum(
        rank * (sum(sides) + 1)
        for rank, sides in zip(ranks, in_order_of(contender), strict=True)
    )
    assert max(ranks) > 1
    assert contender.effective() <= LORA


def test_a_falling_budget_begins_with_room_and_ends_with_that_of_lora():
    pytest.importorskip("keras_hub")
    contender = contenders.CONTENDERS["geolora"](
        Tiny(), RANK, 8, tolerance=0.0, room=2, falling=0.5
    )
    budgets = [contender.optimizer.parameter_budget(step) for step in (0, 4, 8)]
    assert list(map(int, budgets)) == [2 * LORA, LORA, LORA]
    x, y = contender.task.load()
    two_steps = np.arange(2 * tasks.BATCH)
    contender.train(x, y, [two_steps], 1e-2, 0)
    assert LORA < contender.effective() < 2 * LORA
    contender.train(x, y, 4 * [two_steps], 1e-2, 0)
    assert contender.effective() <= LORA


def in_order_of(contender):
    return [
        layer.kernel_view.matrix_shape for layer in contender.layers.values()
    ]


@of_peft
def test_adalora_ends_with_its_target_on_average():
    contender = made("peft_adalora", steps=0)
    x, y = contender.task.load()
    contender.train(x, y, [np.arange(32)] * 20, 1e-2, 0)
    ranks = contender.ranks()
    assert len(ranks) == len(SIDES)
    assert max(ranks) <= 1.5 * RANK
    assert sum(ranks) == RANK * len(SIDES)
    assert contender.effective() == sum(
        rank * (A.shape[1] + B.shape[0] + 1)
        for rank, A, B in zip(
            ranks,
            contender.factors("A"),
            contender.factors("B"),
            strict=True,
        )
    )
    assert contender.effective() < contender.parameters()


@pytest.mark.backend_independent("it divides numbers")
def test_a_split_has_no_example_twice():
    task = Tiny()
    train, validation, held_out = tasks.split(task, 104, seed=3)
    assert list(map(len, (train, validation, held_out))) == [64, 8, 32]
    assert len({*train, *validation, *held_out}) == 104
