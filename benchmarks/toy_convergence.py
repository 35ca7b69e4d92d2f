"""Descent where the answer is known: GeoLoRA and all factors at once.

    python benchmarks/toy_convergence.py run --backend jax
    python benchmarks/toy_convergence.py table
    python benchmarks/toy_convergence.py plot

Full-batch SGD and Adam at constant rates on the problems of `toys.py`, 2,000
steps, three seeds, through `fit`. `geolora` is the library with 2 ranks to
begin with, 16 at most and a tolerance of 0.005, which is below the smallest
singular value; `geolora-6` is told the rank and never cuts. The others move
all their factors at once by the plain optimizer: three (`usv`, started as the
adapter is) or two (`lora`), of rank 16 or told the rank 6. No step is bounded.

    python benchmarks/toy_convergence.py run --backend jax --inner sgd \
        --steps 40000 --problems regression --rates 0.03 0.3 0.6 1 \
        --methods usv-6 lora-6 usv-16 lora-16

asks whether what has stalled stands still. Rows are added to
`benchmarks/results/toy_convergence.jsonl`; `plot` writes two figures, the
loss over steps and, beside it with `_rates` in its name, over learning rates.
On one core of a server the first command takes 10 minutes, the second 15.
"""

import statistics
import warnings

import measuring

RESULT = "toy_convergence"
PLOT = "docs/images/toy_convergence.png"
PROBLEMS = ("regression", "stiff regression", "completion")
RATES = {
    "sgd": [0.003, 0.01, 0.03, 0.1, 0.3, 0.6, 1.0, 1.5],
    "adam": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
}
SAME_RATE = {"sgd": 0.3, "adam": 3e-3}
METHODS = ("geolora", "geolora-6", "usv-6", "lora-6", "usv-16", "lora-16")
STEPS, POINTS, SEEDS = 2000, 25, (0, 1, 2)
TOLERANCE, START, LARGEST = 0.005, 2, 16
SOLVED = 1e-6  # of the loss at the start


def main():
    """Parses the command line."""
    parser, commands, run = measuring.command_line(__doc__)
    run.add_argument("--problems", nargs="+", default=PROBLEMS)
    run.add_argument("--inner", nargs="+", default=list(RATES))
    run.add_argument("--methods", nargs="+", default=METHODS)
    run.add_argument("--rates", nargs="+", type=float)
    run.add_argument("--steps", type=int, default=STEPS)
    measuring.plot_command(commands, PLOT)
    args = parser.parse_args()
    measuring.run_or_print(args, measure, print_tables, draw)


def measure(args):
    """Trains with every problem, optimizer and method; adds their rows."""
    # Keras' generator of batches has no length; losses overflow at last.
    warnings.simplefilter("ignore")
    for problem in args.problems:
        for inner in args.inner:
            rates = args.rates or RATES[inner]
            for method in args.methods:
                measure_method(args, problem, inner, method, rates)


def measure_method(args, name, inner, method, rates):
    """Trains at every rate, once for every seed; adds a row for each rate."""
    import toys

    problems = {seed: toys.Problem(name, seed) for seed in SEEDS}
    trainer = new_trainer(toys.PROBLEMS[name][0], inner, method)
    for rate in rates:
        runs = {
            seed: train(trainer, problem, rate, seed, args.steps)
            for seed, problem in problems.items()
        }
        setting = {"problem": name, "inner": inner, "method": method}
        setting |= {"rate": rate, "steps": args.steps, "seeds": runs}
        environment = measuring.environment(args.backend)
        measuring.append(RESULT, setting | environment)


def new_trainer(shape, inner, method):
    """Returns a `Trainer` of a method."""
    import keras
    import toys

    from keras_geolora import GeoLoRA

    kind, _, rank = method.partition("-")
    rank = int(rank or 0)
    optimizer = keras.optimizers.get(inner)
    if kind != "geolora":

        def factors(seed):
            return toys.Factors(shape[1], rank, kind == "usv", seed)

        return toys.Trainer(shape, factors, optimizer)

    def adapted(seed):
        return toys.adapted(shape[1], rank or START, rank or LARGEST, seed)

    tolerance = 0.0 if rank else TOLERANCE
    optimizer = GeoLoRA(
        optimizer, tolerance, max_update_ratio=None, **measuring.PAPER
    )
    return toys.Trainer(shape, adapted, optimizer)


def train(trainer, problem, rate, seed, steps):
    """Returns what became of the loss, and the matrix at the end.

    `loss` is relative to that at the start, `error` to the norm of the matrix
    asked for; `descent_left` is the gradient among matrices of the true rank,
    relative to the gradient at zero.
    """
    import numpy as np
    import toys

    deltas = trainer.train(problem, rate, seed, POINTS, steps // POINTS)
    start, losses = None, []
    for delta in deltas:
        loss = problem.loss(delta)
        start = start or loss
        losses.append(loss / start)
    finite = np.isfinite(losses[-1])
    sigma = np.linalg.svd(delta, compute_uv=False) if finite else [0.0]
    return {
        "loss": [rounded(loss) for loss in losses],
        "error": rounded(problem.error(delta)),
        "descent_left": (
            rounded(problem.descent_left(delta, toys.TRUE_RANK))
            if finite
            else None
        ),
        "rank": int(np.sum(np.asarray(sigma) > 1e-4 * sigma[0])),
    }


def rounded(number):
    """Returns two digits of a number, `None` if it is none or huge."""
    return float(f"{number:.2g}") if abs(number) < 1e12 else None


def medians(row):
    """Returns the median over seeds of every point of the loss."""
    curves = [run["loss"] for run in row["seeds"].values()]
    points = zip(*curves, strict=True)
    return [statistics.median(lost(loss) for loss in p) for p in points]


def lost(loss):
    """Returns a loss, infinite where training went wrong."""
    return float("inf") if loss is None else loss


def final(row):
    """Returns median, smallest and largest loss at the end."""
    ends = [lost(run["loss"][-1]) for run in row["seeds"].values()]
    return statistics.median(ends), min(ends), max(ends)


def table_rows(steps=STEPS):
    """Returns the last row of every setting, in order of rates."""
    found = {}
    for row in measuring.rows(RESULT):
        if row["steps"] == steps:
            keys = ("problem", "inner", "method", "rate")
            found[tuple(row[key] for key in keys)] = row
    return dict(sorted(found.items(), key=lambda item: item[0][-1]))


def of_method(rows, problem, inner, method):
    """Returns the rows of a method by rate."""
    wanted = problem, inner, method
    return {key[-1]: row for key, row in rows.items() if key[:3] == wanted}


def best(by_rate):
    """Returns the rate with the smallest median loss at the end."""
    return min(by_rate, key=lambda rate: final(by_rate[rate])[0])


def print_tables():
    """Prints what was reached at the best rate, at the same, and later."""
    rows = table_rows()
    cells = {
        "Loss at the end (best rate; steps to 1e-6; rates that got there)": (
            best_cell
        ),
        "Loss at the end, at the same rate for all": same_cell,
        "The matrix at the best rate: error; ranks": matrix_cell,
        "Gradient that is left among matrices of rank 6": left_cell,
    }
    for title, cell in cells.items():
        for inner in RATES:
            lines = [
                [
                    NAMES[method],
                    *(
                        cell(of_method(rows, p, inner, method))
                        for p in PROBLEMS
                    ),
                ]
                for method in METHODS
            ]
            print(f"\n{title}, {INNER_NAMES[inner]}\n")
            print(measuring.markdown(["method", *PROBLEMS], lines))
    lines = [long_line(key, row) for key, row in long_rows().items()]
    print("\nLonger, at the best rate of those tried\n")
    header = ["problem", "method", "rate", "steps", "loss", "gradient left"]
    print(measuring.markdown(header, lines))


def best_cell(by_rate):
    """Formats the loss at the best rate, and how many rates are good."""
    rate = best(by_rate)
    solved = [r for r, row in by_rate.items() if final(row)[2] < SOLVED]
    return (
        f"{final(by_rate[rate])[0]:.0e} ({rate:g}; "
        f"{steps_to_solve(by_rate[rate])}; {len(solved)} of {len(by_rate)})"
    )


def same_cell(by_rate):
    """Formats the loss at the rate that all methods share."""
    inner = next(iter(by_rate.values()))["inner"]
    rate = SAME_RATE[inner]
    loss = final(by_rate[rate])[0]
    return f"{loss:.0e} ({rate:g})" if loss < 1e12 else f"diverged ({rate:g})"


def matrix_cell(by_rate):
    """Formats the error and the ranks of all seeds, at the best rate."""
    row = by_rate[best(by_rate)]
    ranks = ", ".join(str(run["rank"]) for run in row["seeds"].values())
    return f"{values(row, 'error')[0]:.0e}; {ranks}"


def left_cell(by_rate):
    """Formats the projected gradient, relative to the start."""
    return span(values(by_rate[best(by_rate)], "descent_left"))


def values(row, what):
    """Returns median, smallest and largest over seeds."""
    found = [lost(run[what]) for run in row["seeds"].values()]
    return statistics.median(found), min(found), max(found)


def span(numbers):
    """Formats median, smallest and largest."""
    middle, low, high = (f"{number:.0e}" for number in numbers)
    return f"{middle} ({low} to {high})"


def steps_to_solve(row):
    """Returns the steps until the median loss is small, rounded up."""
    for point, loss in enumerate(medians(row)):
        if loss < SOLVED:
            return point * row["steps"] // POINTS
    return "-"


def long_rows():
    """Returns the best row of every method that was trained for longer."""
    found = {}
    for row in measuring.rows(RESULT):
        if row["steps"] > STEPS:
            key = row["problem"], row["method"]
            other = found.get(key, row)
            found[key] = min(row, other, key=lambda r: final(r)[0])
    return found


def long_line(key, row):
    """Formats one method that was trained for longer."""
    left = span(values(row, "descent_left"))
    return [*key, f"{row['rate']:g}", row["steps"], span(final(row)), left]


STYLES = {
    "geolora": dict(color=measuring.BLUE, linestyle="-", marker="o"),
    "geolora-6": dict(color=measuring.SKY, linestyle="--", marker="s"),
    "usv-6": dict(color=measuring.VERMILION, linestyle="-", marker="^"),
    "usv-16": dict(color=measuring.PURPLE, linestyle=":", marker="^"),
    "lora-6": dict(color=measuring.GREEN, linestyle="-", marker="v"),
    "lora-16": dict(color=measuring.ORANGE, linestyle=":", marker="v"),
}
NAMES = {
    "geolora": "GeoLoRA that finds its rank, at most 16",
    "geolora-6": "GeoLoRA that is told rank 6",
    "usv-6": "three factors by plain descent, rank 6",
    "usv-16": "three factors by plain descent, rank 16",
    "lora-6": "LoRA, rank 6",
    "lora-16": "LoRA, rank 16",
}


def draw(file):
    """Draws the loss over steps, and over learning rates."""
    rows = table_rows()
    draw_grid(rows, file, curve, "step", "linear")
    rates = file.with_stem(file.stem + "_rates")
    draw_grid(rows, rates, over_rates, "learning rate", "log")


def draw_grid(rows, file, points, xlabel, xscale):
    """Draws a panel for every problem and inner optimizer."""
    figure, axes = measuring.figure(2, 3, width=11.5, sharey=True)
    drawn = {}
    for row, inner in zip(axes, RATES, strict=True):
        for axis, problem in zip(row, PROBLEMS, strict=True):
            ends = []
            for method, style in STYLES.items():
                by_rate = of_method(rows, problem, inner, method)
                x, y, label = points(by_rate)
                (line,) = axis.plot(
                    x,
                    [min(max(loss, 1e-12), 30) for loss in y],
                    markersize=4,
                    markevery=max(1, len(x) // 8),
                    linewidth=1.4,
                    **style,
                )
                drawn[NAMES[method]] = line
                ends.append((label, line))
            axis.set(yscale="log", ylim=(1e-12, 30), xscale=xscale)
            axis.set_title(f"{problem}, {INNER_NAMES[inner]}", fontsize=11)
            if any(label for label, _ in ends):
                measuring.label_lines(axis, ends)
        row[0].set_ylabel("loss divided by the first")
    for axis in axes[-1]:
        axis.set_xlabel(xlabel)
    figure.legend(
        drawn.values(), drawn, loc="outside lower center", ncols=3, fontsize=9
    )
    figure.savefig(file, dpi=110)


INNER_NAMES = {"sgd": "SGD", "adam": "Adam"}


def curve(by_rate):
    """Returns the steps and the loss at the best rate, and that rate."""
    rate = best(by_rate)
    loss = medians(by_rate[rate])
    steps = by_rate[rate]["steps"] // POINTS
    return [i * steps for i in range(len(loss))], loss, f"rate {rate:g}"


def over_rates(by_rate):
    """Returns the rates and the loss at the end, and no label."""
    return list(by_rate), [final(row)[0] for row in by_rate.values()], ""


if __name__ == "__main__":
    main()
