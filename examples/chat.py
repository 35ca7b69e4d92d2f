"""Teach a language model a task, with ranks it finds itself.

    pip install --no-deps -r examples/requirements.txt
    python examples/chat.py --backend torch

The model is SmolLM2-135M-Instruct. Asked for the topic of a question, it
answers the question instead, and mostly wrongly; after some minutes on two CPU
cores it names the topic. The adapter then goes to Hugging Face's PEFT, and into
the weights. More `--examples` and `--epochs` teach more.
"""

import argparse
import os
import pathlib

import assets
import instructions
import numpy as np

BATCH = 4
INSTRUCTION = "Topic of the question?\n"
# The classes of `assets.trec_questions`.
TOPICS = ("abbreviation", "description", "thing", "person", "place", "number")
ROOM = 16  # tokens for an answer


def main(args):
    """Load, ask, adapt, train, look, ask, share, merge."""
    # Keras reads its backend once, when it is imported.
    if args.backend:
        os.environ["KERAS_BACKEND"] = args.backend

    import keras

    import keras_geolora  # also adds methods to `keras.Model`
    from keras_geolora import GeoLoRA

    keras.utils.set_random_seed(args.seed)
    print(f"Keras runs on {keras.backend.backend()}.")

    model, tokenizer = instructions.load(assets.smollm2_folder())
    asked, topics = choose_questions(tokenizer, args)
    held_out = asked[: args.held_out], topics[: args.held_out]
    x, labels, on_answers = instructions.encode(
        tokenizer,
        *(asked[args.held_out :], topics[args.held_out :]),
        length=args.length,
    )

    def ask():
        """Shows some answers and tells how many of all are right."""
        replies = instructions.reply(
            model, tokenizer, held_out[0], length=args.length + ROOM
        )
        for instruction, reply in zip(held_out[0][:6], replies, strict=False):
            print(f"  {instruction.removeprefix(INSTRUCTION)}\n    -> {reply}")
        right = np.mean(np.array(replies) == held_out[1])
        print(f"  Right: {right:.0%} of {len(replies)}.")

    print(f"The topics, which it is not told: {', '.join(TOPICS)}.")
    print(f"\n{INSTRUCTION.strip()}")
    model.compile(sampler="greedy")
    ask()

    model.enable_geolora(rank=args.rank)
    # A rate that falls to zero: the last batches shall not decide.
    steps = args.epochs * -(-len(labels) // BATCH)
    rate = keras.optimizers.schedules.PolynomialDecay(
        args.learning_rate, steps, end_learning_rate=0.0
    )
    model.compile(
        optimizer=GeoLoRA(keras.optimizers.AdamW(rate)),
        loss=keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        weighted_metrics=[],
        sampler="greedy",
    )
    print(f"\nTraining on {len(labels)} questions:")
    model.fit(
        x,
        labels,
        sample_weight=on_answers,
        epochs=args.epochs,
        batch_size=BATCH,
        shuffle=False,  # They are shuffled, and KerasHub keeps their order.
    )
    ask()

    print("\nWhich rank did each layer need?")
    model.geolora_summary()

    folder = pathlib.Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_geolora(folder / "topics.safetensors")
    keras_geolora.export_peft(model, folder / "peft")
    print(f"\nWrote {folder}/topics.safetensors, and {folder}/peft for PEFT.")

    # The update moves into the kernels: a plain KerasHub model is left.
    few = {name: rows[:BATCH] for name, rows in x.items()}
    adapted = model.predict(few, verbose=0)
    model.merge_geolora()
    difference = np.max(np.abs(model.predict(few, verbose=0) - adapted))
    print(f"Merging moved the logits by at most {difference:.1e}.")


def choose_questions(tokenizer, args):
    """Returns instructions and answers, none longer than `args.length`."""
    questions, labels, _ = assets.trec_questions(seed=args.seed)
    pairs = []
    for question, label in zip(questions, labels, strict=True):
        pair = INSTRUCTION + question, TOPICS[label]
        prompt, answer = instructions.tokens(tokenizer, *pair)
        if len(prompt) + len(answer) <= args.length:
            pairs.append(pair)
    asked, topics = zip(*pairs[: args.held_out + args.examples], strict=True)
    return asked, topics


def parse_args():
    """Read the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["tensorflow", "jax", "torch"])
    parser.add_argument("--examples", type=int, default=192)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument(
        "--length", type=int, default=36, help="of rows, tokens"
    )
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--folder", default="topics-adapter")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
