"""The picture of the start page: two results of other scripts, in short.

    python benchmarks/start_page.py

On the left a task of `starting_rank.py` whose answer is known: the teacher
differs from the model by matrices of rank 2, 4 and 8. On the right the tasks
of `accuracy.py` with the parameters of LoRA of rank 8, each method at the rate
that is best on other examples. It reads `benchmarks/results` and measures
nothing.
"""

import argparse
import pathlib
import statistics

import accuracy
import measuring
import starting_rank

PLOT = "docs/images/start_page.png"
TEACHER = ("teacher", 0.1)
# What a rank costs in a layer of 64 x 64: a column of U and of V, and sigma.
ANSWER = (2 + 4 + 8) * (64 + 64 + 1)
RANK = 8
METHODS = ("geolora", "peft_lora", "peft_adalora", "keras_lora")
TASKS = {
    "trec": "TREC\n6 topics",
    "movies": "movies\nsentiment",
    "sms": "SMS\nspam",
    "fashion": "Fashion-\nMNIST",
}


def main():
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=pathlib.Path, default=PLOT)
    draw(parser.parse_args().file)


def draw(file):
    """Draws both panels."""
    figure, axes = measuring.figure(1, 2, width=10.5, height=4.2)
    figure.get_layout_engine().set(wspace=0.06)
    draw_ranks(axes[0, 0])
    draw_accuracy(axes[0, 1])
    figure.savefig(file, dpi=130)


def draw_ranks(axis):
    """Draws the size over the training, from every starting rank."""
    lines = starting_rank.draw_setting(axis, starting_rank.found()[TEACHER])
    lines["what the answer needs"] = axis.axhline(
        ANSWER, color="black", linestyle=(0, (1, 2)), linewidth=1
    )
    axis.set_ylabel("parameters of the adapters")
    axis.set_title("It finds its ranks, wherever it starts")
    axis.legend(lines.values(), lines, fontsize=9)


def draw_accuracy(axis):
    """Draws mean and range of the seeds, a group of points for a task."""
    settings = accuracy.settings("linear")
    for at, method in enumerate(METHODS):
        places = [task + 0.16 * (at - 1.5) for task in range(len(TASKS))]
        found = [settings[task][method][RANK] for task in TASKS]
        rows = [rates[accuracy.best_rate(rates)] for rates in found]
        values = [[row["accuracy"] for row in runs] for runs in rows]
        means = [statistics.mean(of_task) for of_task in values]
        pairs = list(zip(means, values, strict=True))
        style = accuracy.STYLES[method] | {"linestyle": ""}
        axis.errorbar(
            places,
            means,
            yerr=[
                [m - min(of_task) for m, of_task in pairs],
                [max(of_task) - m for m, of_task in pairs],
            ],
            label=accuracy.first_words(accuracy.NAMES[method]),
            markersize=7,
            elinewidth=1,
            capsize=3,
            **style,
        )
    axis.set_xticks(range(len(TASKS)), TASKS.values())
    axis.set_ylabel("held-out accuracy, five seeds")
    axis.set_title(f"Accuracy beside LoRA of rank {RANK}")
    axis.legend(fontsize=9, loc="upper left")


if __name__ == "__main__":
    main()
