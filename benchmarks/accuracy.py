"""Accuracy of GeoLoRA, LoRA and AdaLoRA over learning rates and sizes.

    python benchmarks/accuracy.py run --tasks movies --methods geolora \\
        --ranks 4 8 16
    python benchmarks/accuracy.py run --tasks trec --schedule constant \\
        --ranks 8 --rates 1e-4 3e-4 1e-3 3e-3 1e-2 3e-2 1e-1
    python benchmarks/accuracy.py table
    python benchmarks/accuracy.py plot

One protocol for the methods of `contenders.py` on the tasks of `tasks.py`: the
same pretrained weights, token ids, split, order of batches, first weights of
the head, number of steps, and AdamW, whose rate falls linearly to zero, or is
constant. Methods of Keras run on `--backend`, those of PEFT on torch. Every run
adds one line to `benchmarks/results/accuracy.jsonl`; runs that are there are
skipped, so that a sweep can be stopped and go on, and several processes can
share the work.

`table` and `plot` answer two questions. How wide is the band of constant rates
in which a method works? And how many parameters does it need for an accuracy,
with a rate that falls, each size at its best rate? That is chosen on other
examples (`validation`) than those that are reported, among the rates with the
most seeds. A run is lost if its output is not finite, or it
is no better than to answer the most frequent class every time.
"""

import argparse
import itertools
import json
import math
import os
import pathlib
import statistics
import time
import warnings

import measuring

RESULT = "accuracy"
PLOTS = pathlib.Path("docs/images")
TASKS = ("movies", "trec", "sms", "fashion")
METHODS = ("geolora", "plain_lora", "keras_lora", "peft_lora", "peft_adalora")
RANKS, RATES, SEEDS = (2, 4, 8, 16, 32), (3e-4, 1e-3, 3e-3), (0, 1, 2)
SCHEDULES = ("linear", "constant")
KEY = ("task", "method", "rank", "options", "rate", "schedule", "seed")
KEY += ("train", "held_out")
# So many rates are a band that is worth a map.
BAND = 5
# The bound of steps that was the default in version 0.1.0.
RATIO = measuring.BOUND
# It still is for up to so many adapters, and for not many fewer.
DEEP = 62
# Options of runs in words, for tables.
OPTIONS_IN_WORDS = {
    "room 1": "no budget",
    "interval auto": "retractions now and then",
    "cut 100": "cuts every 100 steps",
    "moments columns": "second moments follow",
}
# How the runs with the defaults of today are labelled, and of those before.
TODAY = "geolora, interval auto, cut 100, moments columns"
BEFORE = "geolora, interval auto, cut 100"
# A run is lost where it is less than this above the most frequent class.
MARGIN = 0.01


def main():
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--tasks", choices=TASKS, nargs="+", default=TASKS)
    run.add_argument("--methods", choices=METHODS, nargs="+", default=METHODS)
    run.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    run.add_argument("--rates", type=float, nargs="+", default=RATES)
    run.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="linear",
        help="whether rates fall to zero or stay",
    )
    run.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    run.add_argument(
        "--tolerances",
        type=float,
        nargs="+",
        default=[0.1],
        help="of GeoLoRA: share of the norm that a cut may discard",
    )
    run.add_argument(
        "--room",
        type=int,
        default=2,
        help="of GeoLoRA: buffers of so many times the rank; 1: no budget",
    )
    run.add_argument(
        "--falling",
        type=float,
        default=0.0,
        help="of GeoLoRA: share of the steps in which the budget falls from "
        "`room` times that of LoRA; 0: it is constant",
    )
    run.add_argument(
        "--ratios",
        type=lambda text: text if text == "auto" else float(text),
        nargs="+",
        default=["auto"],
        help="of GeoLoRA: `max_update_ratio`, the bound of a step",
    )
    run.add_argument(
        "--interval",
        type=lambda text: int(text) if text.isdecimal() else text,
        default="auto",
        help="of GeoLoRA: steps between two retractions",
    )
    run.add_argument(
        "--cut",
        type=int,
        default=100,
        help="of GeoLoRA: steps between two cuts",
    )
    run.add_argument(
        "--scales",
        type=float,
        nargs="+",
        default=[1.0],
        help="of PEFT: strength of the adapters, `lora_alpha / r`",
    )
    run.add_argument("--backend", choices=measuring.BACKENDS)
    run.add_argument("--threads", type=int, default=0)
    run.add_argument("--train", type=int, help="examples, to try the script")
    run.add_argument("--held-out", type=int, help="examples, likewise")
    commands.add_parser("table")
    plot = commands.add_parser("plot")
    plot.add_argument("folder", nargs="?", type=pathlib.Path, default=PLOTS)
    args = parser.parse_args()
    if args.command == "run" and args.falling:
        if args.room == 1 or args.schedule != "linear":
            parser.error("`--falling` needs a budget and the linear schedule")
    if args.command == "table":
        print_tables()
    elif args.command == "plot":
        args.folder.mkdir(parents=True, exist_ok=True)
        draw_rates(args.folder / "accuracy_rates.png")
        draw_parameters(args.folder / "accuracy_parameters.png")
    else:
        args.backend = args.backend or "tensorflow"
        os.environ["KERAS_BACKEND"] = args.backend
        measure(args)


def options_of(method, args):
    """Returns a list of the options with which a method is run."""
    if method == "geolora":
        fixed = {"room": args.room, "interval": args.interval, "cut": args.cut}
        # No option but the version: rows without it averaged second moments.
        if args.interval != 1:
            fixed["moments"] = "columns"
        if args.falling:
            fixed["falling"] = args.falling
        return [
            {"tolerance": tolerance, "ratio": ratio, **fixed}
            for tolerance in args.tolerances
            for ratio in args.ratios
        ]
    if method.startswith("peft"):
        return [{"scale": scale} for scale in args.scales]
    return [{}]


def plan(args):
    """Returns what is to run, by task and contender, that is not there yet."""
    import tasks

    there = {key_of(row) for row in measured()}
    groups = {}
    for name, method, rank in itertools.product(
        args.tasks, args.methods, args.ranks
    ):
        task = tasks.TASKS[name]
        for options in options_of(method, args):
            for rate, seed in itertools.product(args.rates, args.seeds):
                row = {
                    "task": name,
                    "method": method,
                    "rank": rank,
                    "options": options,
                    "rate": rate,
                    "schedule": args.schedule,
                    "seed": seed,
                    "train": args.train or task.examples,
                    "held_out": args.held_out or task.held_out,
                }
                if key_of(row) not in there:
                    group = (name, method, rank, json.dumps(options))
                    groups.setdefault(group, []).append(row)
    return groups


def key_of(row):
    """Returns what two rows of the same run have in common."""
    return json.dumps([row[key] for key in KEY], sort_keys=True)


def measured():
    """Returns the rows there are."""
    if not (measuring.RESULTS / f"{RESULT}.jsonl").exists():
        return []
    return measuring.rows(RESULT)


def measure(args):
    """Trains once for every setting, learning rate and seed."""
    limit_threads(args)
    groups = plan(args)
    total = sum(map(len, groups.values()))
    print(f"{total} runs to do", flush=True)
    import contenders
    import tasks

    warnings.simplefilter("ignore")
    data, done, start = {}, 0, time.perf_counter()
    for (name, method, rank, _), rows in groups.items():
        task = tasks.TASKS[name]
        if name not in data:
            data = {name: task.load()}  # pictures are large
        orders = task.epochs * [range(rows[0]["train"])]
        steps = tasks.count_steps(orders) if args.schedule == "linear" else 0
        options = dict(rows[0]["options"])
        options.pop("moments", None)
        made = contenders.CONTENDERS[method](task, rank, steps, **options)
        on = "torch" if method.startswith("peft") else args.backend
        for row in rows:
            found = run_once(task, made, *data[name], row)
            row |= found | measuring.environment(on)
            measuring.append(RESULT, row)
            done += 1
            each = (time.perf_counter() - start) / done
            left = each * (total - done)
            print(
                f"{done} of {total}, {each:.0f} s a run, {left:.0f} s left",
                flush=True,
            )


def limit_threads(args):
    """Lets processes share a machine."""
    if not args.threads:
        return
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    if args.backend == "tensorflow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(args.threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)


def run_once(task, made, x, y, row):
    """Returns what one training came to."""
    import numpy as np
    import tasks

    seed = row["seed"]
    train, validation, held_out = tasks.split(
        task, len(y), seed, row["train"], row["held_out"]
    )
    orders = tasks.epochs(task, train, seed)
    seconds, losses = measuring.seconds(
        lambda: made.train(x, y, orders, row["rate"], seed)
    )
    chosen = np.concatenate([validation, held_out])
    logits = made.logits({name: column[chosen] for name, column in x.items()})
    right = logits.argmax(-1) == y[chosen]
    frequent = np.bincount(y[train]).argmax()
    return {
        "accuracy": float(right[len(validation) :].mean()),
        "validation": float(right[: len(validation)].mean()),
        "most_frequent": float((y[held_out] == frequent).mean()),
        "finite": bool(np.isfinite(logits).all()),
        "loss": [loss if math.isfinite(loss) else None for loss in losses],
        "steps": tasks.count_steps(orders),
        "ranks": made.ranks(),
        "parameters": made.parameters(),
        "effective": made.effective(),
        "seconds": round(seconds, 1),
    }


def lost(row):
    """Says whether a run is no better than a constant answer."""
    return not row["finite"] or row["accuracy"] < row["most_frequent"] + MARGIN


def settings(schedule):
    """Returns the complete runs: task, method with options, rank, rate."""
    found = {}
    for row in complete_rows():
        if row["schedule"] != schedule:
            continue
        if row["options"].get("ratio", RATIO) not in usual_bounds(row):
            continue  # a candidate, see `print_bounds`
        task = found.setdefault(row["task"], {})
        method = task.setdefault(label(row), {})
        rates = method.setdefault(row["rank"], {})
        rates.setdefault(row["rate"], []).append(row)
    return {name: dict(sorted(found[name].items())) for name in sorted(found)}


def usual_bounds(row):
    """Returns what may stand for the default bound at the time of a run."""
    today = row["options"].get("interval") == "auto"
    if today and len(row["ranks"]) > DEEP:
        return ("auto",)
    return RATIO, "auto"


def complete_rows():
    """Returns the rows with the full number of examples, no trial runs."""
    rows, sizes = measured(), {}
    for row in rows:
        sizes[row["task"]] = max(sizes.get(row["task"], 0), row["train"])
    return [row for row in rows if row["train"] == sizes[row["task"]]]


def label(row):
    """Returns the name of a method with the options that are not usual."""
    usual = {"tolerance": 0.1, "room": 2, "scale": 1.0}
    usual |= {"interval": 1, "cut": 20}
    # With as many adapters as these models have, "auto" is about this bound.
    usual["ratio"] = RATIO if row["options"].get("ratio") == RATIO else "auto"
    options = [
        f"{name} {value}" if isinstance(value, str) else f"{name} {value:g}"
        for name, value in row["options"].items()
        if value != usual.get(name)
    ]
    return ", ".join([row["method"], *options])


def in_words(name):
    """Returns the name of a method with its options for a table."""
    method, *options = name.split(", ")
    words = [IN_WORDS[method]]
    for option in options:
        words.append(OPTIONS_IN_WORDS.get(option, option))
    return ", ".join(words)


def mean(rows, name="accuracy"):
    """Returns the mean of a number over rows."""
    return statistics.mean(row[name] for row in rows)


def spread(rows):
    """Returns half the range of the accuracies."""
    found = [row["accuracy"] for row in rows]
    return (max(found) - min(found)) / 2


def best_rate(rates):
    """Returns the rate with the best mean on the validation examples."""
    most = max(map(len, rates.values()))
    near = sorted(rate for rate, rows in rates.items() if len(rows) == most)
    return max(near, key=lambda rate: mean(rates[rate], "validation"))


def print_tables():
    """Prints accuracy over rates, and over parameters."""
    for task, methods in settings("constant").items():
        print(f"\n**{task}**, held-out accuracy over constant rates\n")
        print(rates_table(methods))
    for task, methods in settings("linear").items():
        wide = with_bands(methods)
        if wide:
            print(f"\n**{task}**, held-out accuracy over rates that fall\n")
            print(rates_table(wide))
        print(f"\n**{task}**, every size at its best rate\n")
        header = ["method", "rank", "rate", "trainable", "effective"]
        header += ["layer ranks", "accuracy", "runs"]
        lines = [
            size_line(method, rank, found)
            for method, ranks in methods.items()
            for rank, found in sorted(ranks.items())
        ]
        print(measuring.markdown(header, lines))
        print(f"\n**{task}**, the smallest within 0.01 of the best of all\n")
        print(measuring.markdown(["method", "effective"], smallest(methods)))
        header = ["method", "rank", "differences", "mean, standard error"]
        for ours in ("geolora", BEFORE, TODAY):
            if ours not in methods:
                continue
            print(f"\n**{task}**, {in_words(ours)} less the others, by seed\n")
            print(measuring.markdown(header, differences(methods, ours)))
    print_bounds()


def rates_table(methods):
    """Returns a table of accuracies: a line a size, a column a rate."""
    rates = rates_of(methods)
    header = ["method", "rank", *(f"{rate:.0e}" for rate in rates)]
    header += ["within 0.02 of its best", "lost"]
    lines = [
        [in_words(method), rank, *(cell(found.get(rate)) for rate in rates)]
        + [band(found, rates), lost_of(found)]
        for method, ranks in methods.items()
        for rank, found in sorted(ranks.items())
    ]
    return measuring.markdown(header, lines)


def with_bands(methods):
    """Returns the sizes that ran at a band of rates, by method."""
    wide = {
        method: {rank: r for rank, r in ranks.items() if len(r) >= BAND}
        for method, ranks in methods.items()
    }
    return {method: ranks for method, ranks in wide.items() if ranks}


def differences(methods, name):
    """Compares a method with those of the same rank, at their best rates."""
    ours, lines = methods[name], []
    for method, ranks in methods.items():
        for rank in sorted({*ranks} & {*ours} if method != name else ()):
            ahead, behind = (
                {row["seed"]: row["accuracy"] for row in r[best_rate(r)]}
                for r in (ours[rank], ranks[rank])
            )
            seeds = sorted({*ahead} & {*behind})
            gains = [ahead[seed] - behind[seed] for seed in seeds]
            text = ", ".join(f"{gain:+.3f}" for gain in gains)
            lines.append([in_words(method), rank, text, mean_and_error(gains)])
    return lines


def mean_and_error(numbers):
    """Formats a mean and its standard error, which needs two numbers."""
    text = f"{statistics.mean(numbers):+.3f}"
    if len(numbers) > 1:
        error = statistics.stdev(numbers) / math.sqrt(len(numbers))
        text += f" ± {error:.3f}"
    return text


def print_bounds():
    """Prints what other bounds of steps came to, where several ran."""
    found = {}
    for row in complete_rows():
        options = row["options"]
        numbers = options.get("ratio") != "auto"
        if numbers and options.get("room", 1) > 1 and "falling" not in options:
            name = [row[key] for key in ("task", "rank", "schedule")]
            name = (*name, f"{row['rate']:.0e}")
            ratios = found.setdefault(name, {})
            ratios.setdefault(options["ratio"], []).append(row)
    found = {name: r for name, r in sorted(found.items()) if len(r) > 1}
    ratios = sorted({ratio for r in found.values() for ratio in r})
    lines = [
        [*name, *(cell(r.get(ratio)) for ratio in ratios)]
        for name, r in found.items()
    ]
    print("\n**Bounds of steps**, held-out accuracy\n")
    header = ["task", "rank", "schedule", "rate"]
    header += ["none" if ratio == 1 else str(ratio) for ratio in ratios]
    print(measuring.markdown(header, lines))


def rates_of(methods):
    """Returns all rates at which any of some methods ran."""
    return sorted(
        {
            rate
            for ranks in methods.values()
            for r in ranks.values()
            for rate in r
        }
    )


def cell(rows):
    """Formats mean, half range, and the number of lost runs."""
    if not rows:
        return "-"
    text = f"{mean(rows):.3f} ± {spread(rows):.3f}"
    count = sum(map(lost, rows))
    return text + (f", {count} of {len(rows)} lost" if count else "")


def band(found, rates):
    """Formats at how many of its rates a method is near its own best."""
    means = [mean(found[rate]) for rate in rates if rate in found]
    near = sum(value >= max(means) - 0.02 for value in means)
    return f"{near} of {len(means)}"


def lost_of(found):
    """Formats how many runs are lost at all rates."""
    rows = [row for rows in found.values() for row in rows]
    return f"{sum(map(lost, rows))} of {len(rows)}"


def size_line(method, rank, found):
    """Returns a line of the table of sizes."""
    rate = best_rate(found)
    rows = found[rate]
    ranks = [rank for row in rows for rank in row["ranks"]]
    return [
        in_words(method),
        rank,
        f"{rate:.0e}",
        f"{mean(rows, 'parameters'):,.0f}",
        f"{mean(rows, 'effective'):,.0f}",
        f"{min(ranks)} to {max(ranks)}" if min(ranks) < max(ranks) else rank,
        cell(rows),
        len(rows),
    ]


def smallest(methods):
    """Returns the smallest size of each method that is nearly the best."""
    points = {method: sorted(curve(ranks)) for method, ranks in methods.items()}
    best = max(y for found in points.values() for _, y, *_ in found)
    lines = []
    for method, found in points.items():
        near = [x for x, y, *_ in found if y >= best - 0.01]
        lines.append([in_words(method), f"{near[0]:,.0f}" if near else "none"])
    return lines


def curve(ranks):
    """Returns effective parameters, mean, smallest and largest accuracy."""
    points = []
    for found in ranks.values():
        rows = found[best_rate(found)]
        accuracies = [row["accuracy"] for row in rows]
        points.append(
            (
                mean(rows, "effective"),
                mean(rows),
                min(accuracies),
                max(accuracies),
            )
        )
    return sorted(points)


def draw_rates(file):
    """Draws accuracy over rates and ranks: a row a task, a column a method.

    Only sizes that ran at a band of constant rates.
    """
    found = {
        task: with_bands(methods)
        for task, methods in settings("constant").items()
    }
    found = {task: methods for task, methods in found.items() if methods}
    if not found:
        print("No method ran at enough rates for a map.")
        return
    names = sorted({name for methods in found.values() for name in methods})
    heights = [
        max(map(len, methods.values())) + 0.5 for methods in found.values()
    ]
    figure, axes = measuring.figure(
        len(found),
        len(names),
        width=3.6 * len(names),
        height=0.75 * sum(heights) / len(found),
        height_ratios=heights,
    )
    for row, (task, methods) in enumerate(found.items()):
        rates = rates_of(methods)
        means = [
            mean(rows)
            for ranks in methods.values()
            for r in ranks.values()
            for rows in r.values()
        ]
        limits = min(means), max(means) + 1e-6
        for axis, name in zip(axes[row], names, strict=True):
            if name not in methods:
                axis.remove()
                continue
            draw_map(axis, methods[name], rates, limits)
            title = (
                f"{first_words(TASK_NAMES[task])}: {first_words(NAMES[name])}"
            )
            axis.set_title(title, fontsize=10)
    figure.supxlabel(
        "learning rate, constant; the number is the held-out accuracy, the "
        "lighter the higher\n×: so many runs are no better than to answer the "
        "most frequent class every time",
        fontsize=9,
    )
    figure.savefig(file, dpi=110)


def first_words(name):
    """Returns a name without what follows a comma."""
    return name.split(",")[0]


def draw_map(axis, ranks, rates, limits):
    """Draws one map: the numbers are written, the colours say the same."""
    import numpy as np

    low, high = limits
    order = sorted(ranks)
    values = np.full((len(order), len(rates)), np.nan)
    for (i, rank), (j, rate) in itertools.product(
        enumerate(order), enumerate(rates)
    ):
        rows = ranks[rank].get(rate)
        if not rows:
            continue
        values[i, j] = mean(rows)
        count = sum(map(lost, rows))
        dark = values[i, j] < low + 0.5 * (high - low)
        axis.text(
            j,
            i,
            f"{values[i, j]:.2f}".removeprefix("0")
            + (f"\n×{count}" if count else ""),
            ha="center",
            va="center",
            fontsize=8,
            linespacing=0.9,
            color="white" if dark else "black",
        )
    axis.imshow(values, cmap="cividis", vmin=low, vmax=high, aspect="auto")
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axis.set_yticks(range(len(order)), order)
    axis.tick_params(length=0, labelsize=8)
    axis.set_ylabel("rank", fontsize=9)


TASK_NAMES = {
    "movies": "movies, sentiment",
    "trec": "TREC, topics of questions",
    "sms": "SMS, spam or not",
    "fashion": "Fashion-MNIST, pictures",
}
IN_WORDS = {
    "geolora": "GeoLoRA",
    "peft_lora": "LoRA of PEFT",
    "peft_adalora": "AdaLoRA of PEFT",
    "keras_lora": "LoRA of Keras",
}
# Runs without a budget are one line: their tolerance varies, not their rank.
FREE = "geolora, room 1"
NAMES = {
    "geolora": "GeoLoRA, parameters of LoRA",
    FREE: "GeoLoRA, no budget: tolerance 0.3, 0.2, 0.1",
    "geolora, falling 0.6": "GeoLoRA, a budget that falls",
    "plain_lora": "LoRA, plain products",
    "keras_lora": "LoRA of Keras",
    "peft_lora": "LoRA of PEFT",
    "peft_adalora": "AdaLoRA of PEFT",
}
OPEN = dict(color=measuring.BLUE, markerfacecolor="white")
STYLES = {
    "geolora": dict(color=measuring.BLUE, linestyle="-", marker="o"),
    FREE: dict(linestyle=(0, (1, 1)), marker="s", **OPEN),
    "geolora, falling 0.6": dict(linestyle="", marker="v", **OPEN),
    "plain_lora": dict(color="black", linestyle="--", marker="s"),
    "keras_lora": dict(color=measuring.GREEN, linestyle=":", marker="^"),
    "peft_lora": dict(color=measuring.VERMILION, linestyle="-.", marker="D"),
    "peft_adalora": dict(color=measuring.PURPLE, linestyle="--", marker="X"),
}


# What is written at the axis of parameters.
SIZES = {1e5: "100,000", 3e5: "300,000", 1e6: "1 million", 3e6: "3 million"}


def draw_parameters(file):
    """Draws accuracy over effective parameters, a panel a task."""
    found = settings("linear")
    columns = min(2, len(found))
    figure, axes = measuring.figure(
        -(-len(found) // columns), columns, width=5.2 * columns
    )
    for axis in list(axes.flat)[len(found) :]:
        axis.remove()
    lines = {}
    for axis, (task, methods) in zip(axes.flat, found.items(), strict=False):
        for index, (name, points) in enumerate(drawn(methods).items()):
            x, y, low, high = zip(*points, strict=True)
            lines[NAMES[name]] = axis.errorbar(
                # Apart by a little, so that bars do not hide each other.
                [value * 1.02 ** (index - 2) for value in x],
                y,
                yerr=[
                    [m - a for m, a in zip(y, low, strict=True)],
                    [b - m for m, b in zip(y, high, strict=True)],
                ],
                markersize=6,
                linewidth=1.4,
                elinewidth=0.7,
                capsize=2,
                **STYLES[name],
            )
        axis.set(xscale="log")
        axis.set_xticks(list(SIZES), SIZES.values())
        axis.xaxis.set_minor_formatter("")
        axis.set_title(TASK_NAMES[task], fontsize=10)
    for row in axes:
        row[0].set_ylabel("held-out accuracy")
    for axis in axes[-1]:
        axis.set_xlabel("parameters in use at the end of training")
    figure.legend(
        lines.values(),
        lines,
        loc="outside lower center",
        ncols=3,
        fontsize=9,
        title="Points from left to right: ranks 2, 8 and 32, but for runs "
        "without a budget. Bars: smallest and largest of the seeds.",
        title_fontsize=9,
    )
    figure.savefig(file, dpi=110)


def drawn(methods):
    """Returns the points of every line."""
    lines = {}
    for name, ranks in methods.items():
        line = FREE if name.endswith("room 1") else name
        lines.setdefault(line, []).extend(curve(ranks))
    order = list(NAMES)
    return {name: sorted(lines[name]) for name in order if name in lines}


if __name__ == "__main__":
    main()
