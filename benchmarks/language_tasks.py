"""The tasks of `language.py`: instructions whose answers can be checked.

- `topics`: the class of a TREC question, in a word.
- `sentiment`: whether a sentence about a film is positive or negative.
- `arithmetic`: sums, differences and products of small numbers.

`general_text` is what a model may forget meanwhile: the documentation of
Python's standard library.
"""

import functools
import importlib
import inspect
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import assets
import instructions

TRAIN, VALIDATION, HELD_OUT, LENGTH = 400, 100, 400, 40
TOPICS = ("abbreviation", "description", "thing", "person", "place", "number")
MODULES = (
    "argparse",
    "collections",
    "csv",
    "datetime",
    "json",
    "logging",
    "pathlib",
    "random",
    "shutil",
    "statistics",
    "subprocess",
    "tempfile",
    "textwrap",
    "threading",
    "zipfile",
)


def topics(seed):
    """Returns instructions about TREC questions, and answers."""
    questions, labels, _ = assets.trec_questions(seed=seed)
    return (
        [f"Topic of the question?\n{question}" for question in questions],
        [TOPICS[label] for label in labels],
    )


def sentiment(seed):
    """Returns instructions about sentences on films, and answers."""
    sentences, labels = assets.movie_sentences(seed=seed)[:2]
    return (
        [f"Positive or negative?\n{sentence}" for sentence in sentences],
        [("negative", "positive")[label] for label in labels],
    )


def arithmetic(seed, count=3 * (TRAIN + VALIDATION + HELD_OUT)):
    """Returns questions with two numbers, all different, and answers."""
    rng = np.random.default_rng(seed)
    found = {}
    while len(found) < count:
        a, b = rng.integers(10, 100, 2).tolist()
        c = int(rng.integers(2, 10))
        kind = rng.integers(3)
        question, answer = (
            (f"What is {a} plus {b}?", a + b),
            (f"What is {max(a, b)} minus {min(a, b)}?", abs(a - b)),
            (f"What is {a} times {c}?", a * c),
        )[kind]
        found[question] = str(answer)
    return list(found), list(found.values())


TASKS = {"topics": topics, "sentiment": sentiment, "arithmetic": arithmetic}


@functools.cache
def tokenizer():
    """Returns the tokenizer of the model."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(f"{assets.smollm2_folder()}/tokenizer.json")


def split(name, seed, sizes=(TRAIN, VALIDATION, HELD_OUT)):
    """Returns the rows to train on, to choose by and to report.

    Each is a tuple of inputs, labels and weights, as
    `instructions.encode` makes them.
    """
    made = tokenizer()
    pairs = [
        pair
        for pair in zip(*TASKS[name](seed), strict=True)
        if sum(map(len, instructions.tokens(made, *pair))) <= LENGTH
    ]
    parts, start = [], 0
    for size in sizes:
        chosen = pairs[start : start + size]
        if len(chosen) < size:
            raise ValueError(f"'{name}' has {len(pairs)} short examples only.")
        asked, answers = zip(*chosen, strict=True)
        parts.append(instructions.encode(made, asked, answers, LENGTH))
        start += size
    return parts


def general_text(count=64):
    """Returns rows of documentation, with a loss on every token."""
    texts = []
    for name in MODULES:
        module = importlib.import_module(name)
        for _, thing in sorted(vars(module).items(), key=lambda pair: pair[0]):
            if inspect.isclass(thing) or inspect.isfunction(thing):
                text = inspect.getdoc(thing) or ""
                if thing.__module__ == name and len(text) > 200:
                    texts.append(text)
    rows = []
    for text in texts:
        ids = tokenizer().encode(text).ids[: LENGTH + 1]
        if len(ids) == LENGTH + 1:
            rows.append(ids)
    rows = np.array(rows[:count], "int32")
    x = {"token_ids": rows[:, :-1], "padding_mask": np.ones_like(rows[:, :-1])}
    return x, rows[:, 1:], np.ones(rows[:, 1:].shape, "float32")
