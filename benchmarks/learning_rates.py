"""Accuracy over a band of learning rates: GeoLoRA and LoRA on real tasks.

    python benchmarks/learning_rates.py run --task trec --method geolora
    python benchmarks/learning_rates.py run --task trec --method lora
    python benchmarks/learning_rates.py table

A pretrained MiniLM learns to classify movie sentences by sentiment, or TREC
questions by topic: 1,600 examples, 2 epochs, batch 32, AdamW at a constant
rate, all linear layers of the backbone adapted. Every run adds one line to
`benchmarks/results/learning_rates.jsonl`; `table` prints Markdown tables.
LoRA is plain `x @ A @ B` on the same matrices (`plain_lora.py`), of the rank
that gives it as many trainable parameters as the buffers of GeoLoRA have.
`--moments`, `--interval`, `--tolerance` and `--ratio` change the method, to
compare candidates.
"""

import argparse
import functools
import os

import measuring
from contenders import draw_weights
from tasks import TASKS

RESULT = "learning_rates"
TRAIN, VALIDATION, BATCH, EPOCHS = 1600, 3000, 32, 2
RANK, MAX_RANK = 8, 16
# The tag of the rows that are compared with LoRA: the default of its day.
SHOWN = "bound 0.001"


def main():
    """Parses the command line."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--task", choices=["movies", "trec"], required=True)
    run.add_argument("--method", choices=["geolora", "lora"], required=True)
    run.add_argument(
        "--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
    )
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    run.add_argument("--interval", type=int, default=20)
    run.add_argument("--tolerance", type=float, default=0.1)
    run.add_argument("--ratio", type=float, default=None, help="0: no bound")
    run.add_argument("--moments", choices=["untouched", "rotated"])
    run.add_argument("--tag", help="name of the rows, the method if not given")
    run.add_argument("--backend", default="tensorflow")
    run.add_argument("--threads", type=int, default=0)
    commands.add_parser("table")
    args = parser.parse_args()
    if args.command == "table":
        print_tables()
    else:
        os.environ["KERAS_BACKEND"] = args.backend
        measure(args)


def measure(args):
    """Trains once for every seed and learning rate."""
    if args.threads and args.backend == "tensorflow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(args.threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    import keras
    import numpy as np

    import keras_geolora

    if args.moments == "untouched":
        use_untouched_slots()
    elif args.moments == "rotated":
        use_rotated_moments()
    x, y = TASKS[args.task].load()
    model, layers = build(args.method, TASKS[args.task])
    initial = model.get_weights()
    inner = keras.optimizers.AdamW(1e-3)
    if args.method == "lora":
        optimizer = inner
    else:
        ratio = "auto" if args.ratio is None else args.ratio or None
        optimizer = keras_geolora.GeoLoRA(
            inner,
            args.tolerance,
            cut_interval=args.interval,
            retraction_interval=1,
            max_update_ratio=ratio,
        )
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    optimizer.build(model.trainable_variables)
    state = measuring.remember(optimizer.variables)
    for seed in args.seeds:
        order = np.random.default_rng(100 + seed).permutation(len(y))
        train, held_out = order[:TRAIN], order[-VALIDATION:]
        for rate in args.rates:
            # One compilation serves all runs: everything starts anew.
            keras.utils.set_random_seed(seed)
            model.set_weights(initial)
            draw_weights(model, seed, RANK)
            measuring.restore(state)
            optimizer.learning_rate = rate
            seconds, history = measuring.seconds(
                functools.partial(
                    model.fit,
                    {name: column[train] for name, column in x.items()},
                    y[train],
                    batch_size=BATCH,
                    epochs=EPOCHS,
                    verbose=0,
                )
            )
            logits = model.predict(
                {name: column[held_out] for name, column in x.items()},
                batch_size=125,
                verbose=0,
            )
            ranks, parameters = size_of_adapters(layers)
            row = {
                "tag": args.tag or args.method,
                "task": args.task,
                "rate": rate,
                "seed": seed,
                "accuracy": float((logits.argmax(-1) == y[held_out]).mean()),
                "held_out": VALIDATION,
                "finite": bool(np.isfinite(logits).all()),
                "loss": history.history["loss"],
                "mean_rank": float(np.mean(ranks)),
                "parameters": parameters,
                "seconds": round(seconds, 1),
                "backend": args.backend,
                "keras": keras.__version__,
            }
            measuring.append(RESULT, row)


def build(method, task):
    """Returns a MiniLM classifier of tokens, and its adapted layers."""
    from keras_geolora.layers.tree import adapted_layers

    model = task.keras_model()
    if method == "lora":
        from plain_lora import enable_plain_lora

        return model, enable_plain_lora(model, MAX_RANK)
    model.enable_geolora(rank=RANK, max_rank=MAX_RANK, seed=0)
    return model, adapted_layers(model)


def size_of_adapters(layers):
    """Returns the ranks of all adapters and their parameters at them."""
    ranks, parameters = [], 0
    for layer in layers.values():
        if hasattr(layer, "adapter"):
            rank, sides = layer.rank, layer.kernel_view.matrix_shape
        else:
            rank, sides = MAX_RANK, layer.view.matrix_shape
        ranks.append(rank)
        parameters += rank * sum(sides)
    return ranks, parameters


def use_untouched_slots():
    """Leaves the slots of the inner optimizer where they are, to compare."""
    from keras_geolora.geometry import transport

    for kind in transport.MOVES:
        transport.MOVES[kind] = lambda slots, move: slots


def use_rotated_moments():
    """Rotates first moments with the bases, to compare."""
    from keras_geolora.geometry import transport

    transport.MOVES["linear"] = rotate


def rotate(moments, move):
    """Expresses moments in the new bases, as far as these overlap the old."""
    from keras_geolora.geometry.integrator import T, Unknowns

    m_K, m_S, m_L = moments
    A, B = move.A, move.B
    return Unknowns(m_K @ B, T(A) @ m_S @ B, m_L @ A)


def print_tables():
    """Prints GeoLoRA and LoRA, then all candidates, on the seeds there are."""
    rows = measuring.rows(RESULT)
    for task in sorted({row["task"] for row in rows}):
        mine = [row for row in rows if row["task"] == task]
        rates = sorted({row["rate"] for row in mine})
        print(f"\n**{task}**, held-out accuracy\n")
        print_table(mine, (SHOWN, "lora"), rates)
        print_best(mine, rates)
        print(f"\n**{task}**, the candidates, seeds 0 to 2\n")
        three = [row for row in mine if row["seed"] < 3]
        found = sorted({row["tag"] for row in three} - {SHOWN, "lora"})
        print_table(three, [SHOWN, "lora", *found], rates)


def print_table(rows, tags, rates):
    """Prints mean accuracy (spread over seeds) and parameters."""
    print("| method | " + " | ".join(f"{rate:.0e}" for rate in rates) + " |")
    print("|---" * (len(rates) + 1) + "|")
    for tag in tags:
        cells = [cell(select(rows, tag, rate)) for rate in rates]
        print(f"| {tag} | " + " | ".join(cells) + " |")


def select(rows, tag, rate):
    """Returns the rows of one method at one rate."""
    return [r for r in rows if r["tag"] == tag and r["rate"] == rate]


def print_best(rows, rates):
    """Compares GeoLoRA and LoRA at their best rates, seed by seed."""
    accuracies, names = [], []
    for tag in (SHOWN, "lora"):
        measured = [rate for rate in rates if select(rows, tag, rate)]
        best = max(measured, key=lambda rate: mean_accuracy(rows, tag, rate))
        names.append(f"{tag} at {best:.0e}")
        accuracies.append(
            {r["seed"]: r["accuracy"] for r in select(rows, tag, best)}
        )
    ours, theirs = accuracies
    gains = [ours[seed] - theirs[seed] for seed in sorted({*ours} & {*theirs})]
    print(f"\nThe best of the band, {names[0]} less {names[1]}, by seed:")
    print(", ".join(f"{gain:+.3f}" for gain in gains), end="; ")
    print(f"mean {sum(gains) / len(gains):+.3f}")


def mean_accuracy(rows, tag, rate):
    """Returns the mean accuracy of one method at one rate."""
    found = [row["accuracy"] for row in select(rows, tag, rate)]
    return sum(found) / len(found)


def cell(rows):
    """One cell: mean and spread over seeds, parameters at the ranks."""
    if not rows:
        return "-"
    accuracy = [row["accuracy"] for row in rows]
    mean = sum(accuracy) / len(accuracy)
    spread = (max(accuracy) - min(accuracy)) / 2
    parameters = sum(row["parameters"] for row in rows) / len(rows)
    lost = sum(not row["finite"] for row in rows)
    text = f"{mean:.3f}"
    if len(rows) > 1:
        text += f" ± {spread:.3f}"
    text += f" ({parameters / 1e3:.0f} k)"
    return text + (f", {lost} lost" if lost else "")


if __name__ == "__main__":
    main()
