"""Ways to adapt a language model, compared on tasks that can be checked.

    python benchmarks/language.py run --backend torch --tasks topics
    python benchmarks/language.py table

SmolLM2-135M-Instruct learns to answer instructions (`language_tasks.py`): 100
steps of 8, the loss on the answers only, by each method of
`language_contenders.py`. Reported are the loss on held-out answers, the share
of answers that are right to the last token (greedy decoding would write
them), and what is forgotten: the change of the loss on other text. The rate is
chosen by the loss on further examples. Rows are added to
`benchmarks/results/language.jsonl`; settings that are there are not run again.
"""

import argparse
import json
import statistics

import measuring

RESULT = "language"
RATES = (3e-4, 1e-3, 3e-3)
STEPS, BATCH = 100, 8
KEY = ("task", "method", "rank", "rate", "seed", "steps")
# What tables call the methods, in their order; others stand as they are.
# Second moments were averaged over the columns in earlier versions, in all
# rows of the method of that name and of those with options.
LABELS = {
    "untrained": "untrained",
    "geolora": "GeoLoRA",
    "geolora, averaged": "GeoLoRA, averaged second moments",
    "geolora, every step": "GeoLoRA, every step",
    "geolora, no bound": "GeoLoRA, no bound",
    "geolora, bound 0.008": "GeoLoRA, bound 0.008",
    "geolora, falling budget": "GeoLoRA, falling budget",
    "geolora, falling budget, bound 0.008": (
        "GeoLoRA, falling budget, bound 0.008"
    ),
    "peft_lora": "PEFT LoRA",
    "peft_rslora": "PEFT rank-stabilised LoRA",
    "peft_dora": "PEFT DoRA",
    "peft_adalora": "PEFT AdaLoRA",
    "peft_cut": "PEFT LoRA, cut",
    "keras_lora": "Keras `enable_lora`",
    "full": "full fine-tuning",
}
TASKS = ("topics", "sentiment", "arithmetic")


def main():
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--backend", choices=measuring.BACKENDS, required=True)
    run.add_argument("--tasks", nargs="+", default=["topics"])
    run.add_argument("--methods", nargs="+")
    run.add_argument("--ranks", nargs="+", type=int, default=[4])
    run.add_argument("--rates", nargs="+", type=float, default=RATES)
    run.add_argument("--seeds", nargs="+", type=int, default=[0])
    run.add_argument("--steps", type=int, default=STEPS)
    run.add_argument("--threads", type=int, default=0)
    run.add_argument("--held-out", type=int, help="to try the script")
    commands.add_parser("table")
    args = parser.parse_args()
    measuring.run_or_print(args, measure, print_table)


def measure(args):
    """Runs what is asked for and not there yet."""
    import language_contenders
    import language_tasks

    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    folder = language_tasks.assets.smollm2_folder()
    there = {key_of(row) for row in measured()}
    sizes = (
        language_tasks.TRAIN,
        language_tasks.VALIDATION,
        (args.held_out or language_tasks.HELD_OUT),
    )
    general = language_tasks.general_text()
    for method in args.methods or language_contenders.METHODS:
        make, options = language_contenders.METHODS[method]
        for rank in args.ranks:
            rows = [
                dict(zip(KEY, key, strict=True))
                for task in args.tasks
                for rate in args.rates
                for seed in args.seeds
                if (key := (task, method, rank, rate, seed, args.steps))
                and json.dumps(key) not in there
            ]
            if not rows:
                continue
            contender = make(folder, rank, args.steps, **options)
            for row in rows:
                parts = language_tasks.split(row["task"], row["seed"], sizes)
                row |= run_once(contender, parts, general, row)
                backend = "torch" if "peft" in method else args.backend
                measuring.append(RESULT, row | measuring.environment(backend))


def measured():
    """Returns the rows there are."""
    if not (measuring.RESULTS / f"{RESULT}.jsonl").exists():
        return []
    return measuring.rows(RESULT)


def key_of(row):
    """Returns what two rows of the same run have in common."""
    return json.dumps([row[key] for key in KEY])


def run_once(contender, parts, general, row):
    """Returns what one training came to."""
    import numpy as np

    train, validation, held_out = parts
    rng = np.random.default_rng(5000 + row["seed"])
    order = np.concatenate(
        [
            rng.permutation(len(train[1]))
            for _ in range(1 + row["steps"] * BATCH // len(train[1]))
        ]
    )
    batches = [order[i * BATCH : (i + 1) * BATCH] for i in range(row["steps"])]
    measuring.forget_peak()
    before = measuring.resident_kib("VmRSS")
    seconds, losses = measuring.seconds(
        lambda: contender.train(train, batches, row["rate"], row["seed"])
    )
    peak = measuring.resident_kib("VmHWM") - before
    loss, right = judged(contender, held_out)
    return {
        "loss": loss,
        "right": right,
        "validation": judged(contender, validation)[0],
        "general": judged(contender, general)[0],
        "train_loss": statistics.mean(losses[-10:]) if losses else None,
        "ranks": contender.ranks(),
        "parameters": contender.parameters(),
        "effective": contender.effective(),
        "seconds": round(seconds, 1),
        "peak_mib": round(peak / 1024),
    }


def judged(contender, rows):
    """Returns the mean loss of answers, and the share that is right."""
    import numpy as np
    from language_contenders import AT_ONCE

    x, labels, weights = rows
    total, right = 0.0, 0
    for start in range(0, len(labels), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        logits = contender.logits({k: v[part] for k, v in x.items()})
        chosen = weights[part] > 0
        found, wanted = logits[chosen].astype("float64"), labels[part][chosen]
        found -= found.max(axis=-1, keepdims=True)
        sums = np.log(np.exp(found).sum(axis=-1))
        total += float((sums - found[np.arange(len(wanted)), wanted]).sum())
        wrong = logits.argmax(axis=-1) != labels[part]
        right += int((~(wrong & chosen).any(axis=-1)).sum())
    return total / float((weights > 0).sum()), right / len(labels)


def print_table():
    """Prints the results at every rate, a table for each rank and length.

    The best rate of a method has a star where there are several. Seconds and
    memory are in the rows only, because runs may share a machine.
    """
    tables = {}
    for row in measured():
        by_method = tables.setdefault((row["rank"], row["steps"]), {})
        by_rate = by_method.setdefault((row["task"], row["method"]), {})
        by_rate.setdefault(row["rate"], []).append(row)
    header = ["task", "method", "rate", "loss", "right", "other text"]
    header += ["parameters", "seeds"]
    for (rank, steps), by_method in sorted(tables.items()):
        lines = []
        for task, method in sorted(by_method, key=in_order):
            by_rate = by_method[task, method]
            best = best_rate(by_rate)
            for rate, rows in sorted(by_rate.items()):
                star = "*" if rate == best and len(by_rate) > 1 else ""
                rate = f"{rate:.0e}".replace("e-0", "e-") if rate else ""
                label = LABELS.get(method, method)
                lines.append([task, label, rate + star, *in_numbers(rows)])
        print(f"Rank {rank}, {steps} steps\n")
        print(measuring.markdown(header, lines))
        print()


def best_rate(by_rate):
    """Returns the rate with the lowest loss on the examples to choose by.

    Only seeds that all rates have count, where there are such.
    """
    shared = set.intersection(
        *({row["seed"] for row in rows} for rows in by_rate.values())
    )

    def loss(rate):
        rows = [row for row in by_rate[rate] if row["seed"] in shared]
        return mean(rows or by_rate[rate], "validation")

    return min(by_rate, key=loss)


def in_order(setting):
    """Returns what to sort tasks and methods by."""
    task, method = setting
    methods = list(LABELS)
    place = methods.index(method) if method in methods else len(methods)
    return TASKS.index(task), place, method


def in_numbers(rows):
    """Returns the means over the seeds of a setting, as strings."""
    return [
        f"{mean(rows, 'loss'):.3f}",
        f"{mean(rows, 'right'):.3f}",
        f"{mean(rows, 'general'):.2f}",
        f"{mean(rows, 'effective') / 1e3:,.0f} k",
        len(rows),
    ]


def mean(rows, key):
    """Returns the mean of a number over rows."""
    return statistics.mean(row[key] for row in rows)


if __name__ == "__main__":
    main()
