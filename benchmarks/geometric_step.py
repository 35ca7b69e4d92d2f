"""The geometric step alone: its time over layers, width and rank.

    python benchmarks/geometric_step.py run --backend jax
    python benchmarks/geometric_step.py table
    python benchmarks/geometric_step.py plot

Times `optimizer.apply` of `GeoLoRA(AdamW)` on adapters of random matrices,
compiled as a train step would be, and that of `AdamW` on variables of the same
shapes, in turn; the geometric step is the difference of the means. The timed
steps are those after 1,000, when retractions are as rare as they get; their
number should be a multiple of 20. Older rows, with a retraction in every step,
have the difference of medians. BERT-base has 48 kernels of 768 x 768, 12 of
768 x 3072 and 12 of 3072 x 768; the other settings vary one thing in 48 layers
of 768 x 768 at `max_rank=8`. Rows are added to
`benchmarks/results/geometric_step.jsonl`.
"""

import statistics

import measuring

BERT_BASE = [(768, 768)] * 48 + [(768, 3072)] * 12 + [(3072, 768)] * 12
SETTINGS = {
    "bert_base": (BERT_BASE, 8),
    "bert_base, max_rank 16": (BERT_BASE, 16),
    "bert_base, max_rank 64": (BERT_BASE, 64),
    "bert_base, max_rank 128": (BERT_BASE, 128),
    **{f"layers {n}": ([(768, 768)] * n, 8) for n in (12, 24, 48, 96)},
    **{f"width {n}": ([(n, n)] * 48, 8) for n in (256, 512, 1024, 2048, 4096)},
    **{f"rank {r}": ([(768, 768)] * 48, r) for r in (4, 8, 16, 32, 64)},
}
RESULT, STARTED = "geometric_step", 1000
PLOT = "docs/images/geometric_step.png"


def main():
    """Parses the command line."""
    parser, commands, run = measuring.command_line(__doc__)
    run.add_argument("--settings", nargs="+", default=list(SETTINGS))
    run.add_argument("--rounds", type=int, default=40)
    run.add_argument("--interval", choices=["auto", "1"], default="auto")
    measuring.plot_command(commands, PLOT)
    args = parser.parse_args()
    measuring.run_or_print(args, measure, print_table, draw)


def measure(args):
    """Times the settings asked for."""
    for setting in args.settings:
        measure_setting(args, setting)


def measure_setting(args, setting):
    """Times one setting, and adds a row."""
    shapes, max_rank = SETTINGS[setting]
    interval = "auto" if args.interval == "auto" else 1
    steps = {
        "geolora": compiled(*adapters(shapes, max_rank, interval)),
        "adamw": compiled(*plain_variables(shapes, max_rank)),
    }
    first = {name: measuring.seconds(step)[0] for name, step in steps.items()}
    measuring.interleaved(steps, 3)  # warm up
    times = measuring.interleaved(steps, args.rounds)
    spreads = {name: measuring.spread(t) for name, t in times.items()}
    measuring.append(
        RESULT,
        {
            "setting": setting,
            "max_rank": max_rank,
            "interval": interval,
            **measuring.environment(args.backend),
            "first": first,
            **spreads,
            "between": spreads["geolora"]["median"]
            - spreads["adamw"]["median"],
            "geometric": statistics.mean(times["geolora"])
            - statistics.mean(times["adamw"]),
        },
    )


def adapters(shapes, max_rank, interval="auto"):
    """Returns a GeoLoRA, and the variables of adapters."""
    import keras

    import keras_geolora

    keras.utils.set_random_seed(0)
    made = [
        keras_geolora.LowRankAdapter(*shape, rank=max_rank, max_rank=max_rank)
        for shape in shapes
    ]
    variables = [v for a in made for v in a.factors]
    optimizer = keras_geolora.GeoLoRA(
        keras.optimizers.AdamW(1e-3), retraction_interval=interval
    )
    optimizer.build(variables)
    optimizer.iterations.assign(STARTED)
    return optimizer, variables


def plain_variables(shapes, max_rank):
    """Returns an AdamW, and variables of the shapes that adapters have."""
    import keras

    sides = [
        shape
        for rows, columns in shapes
        for shape in (
            (rows, max_rank),
            (max_rank, max_rank),
            (columns, max_rank),
        )
    ]
    variables = [
        keras.Variable(keras.random.normal(shape, seed=0)) for shape in sides
    ]
    return keras.optimizers.AdamW(1e-3), variables


def compiled(optimizer, variables):
    """Returns a step that waits for its result, compiled as in training."""
    import keras

    optimizer.build(variables)
    gradients = [
        keras.random.normal(v.shape, seed=1 + i)
        for i, v in enumerate(variables)
    ]
    return WAYS[keras.backend.backend()](optimizer, variables, gradients)


def on_tensorflow(optimizer, variables, gradients):
    """A graph without XLA, as `compile` of an adapted model chooses."""
    import tensorflow as tf

    @tf.function
    def apply(gradients):
        optimizer.apply(gradients, variables)
        return optimizer.iterations + 0

    return lambda: apply(gradients).numpy()


def on_jax(optimizer, variables, gradients):
    """A jitted function that gives its state away."""
    import jax

    state = [
        [v.value for v in variables],
        [v.value for v in optimizer.variables],
    ]

    def apply(state, gradients):
        values, slots = state
        return optimizer.stateless_apply(slots, gradients, values)

    apply = jax.jit(apply, donate_argnums=0)

    def step():
        state[:] = jax.block_until_ready(apply(state, gradients))

    return step


def on_torch(optimizer, variables, gradients):
    """Eager, as `fit` on torch is."""
    import torch

    on_gpu = torch.cuda.is_available()

    def step():
        with torch.no_grad():
            optimizer.apply(gradients, variables)
        if on_gpu:
            torch.cuda.synchronize()

    return step


WAYS = {"tensorflow": on_tensorflow, "jax": on_jax, "torch": on_torch}


def latest(interval):
    """Returns the last row of every backend and setting."""
    last = {}
    for row in measuring.rows(RESULT):
        if row.get("interval", 1) == interval:
            last[row["backend"], row["setting"]] = row
    return last


def print_table():
    """Prints milliseconds of the geometric step and of AdamW."""
    print("Geometric step, ms (AdamW: median; both: smallest to largest)\n")
    print("A retraction now and then\n")
    print_rows("auto")
    print("\nA retraction in every step\n")
    print_rows(1)


def print_rows(interval):
    """Prints a table of the rows with one interval of retractions."""
    last = latest(interval)
    lines = []
    for setting in SETTINGS:
        line = [setting]
        for backend in measuring.BACKENDS:
            row = last.get((backend, setting))
            line.append("-" if row is None else cell(row))
        if any(text != "-" for text in line[1:]):
            lines.append(line)
    print(measuring.markdown(["setting", *measuring.BACKENDS], lines))


def cell(row):
    """Formats one timing."""
    inner, whole = row["adamw"], row["geolora"]
    return (
        f"{1e3 * row['geometric']:.1f} "
        f"({1e3 * inner['median']:.1f}; both "
        f"{1e3 * whole['min']:.1f} to {1e3 * whole['max']:.1f})"
    )


# What is varied, and how it is called in the figure.
VARIED = {
    "layers": "adapted layers of 768 x 768, rank 8",
    "width": "width of 48 layers, rank 8",
    "rank": "rank of 48 layers of 768 x 768",
}
STYLES = {
    "tensorflow": dict(color=measuring.VERMILION, linestyle="-", marker="o"),
    "jax": dict(color=measuring.BLUE, linestyle="--", marker="s"),
    "torch": dict(color=measuring.GREEN, linestyle=":", marker="^"),
}


def draw(file):
    """Draws the time over layers, width and rank, of the paper's method."""
    last = latest(1)
    figure, axes = measuring.figure(1, 3, 10.0, 3.4, sharey=True)
    for axis, (what, label) in zip(axes[0], VARIED.items(), strict=True):
        ticks = [
            int(setting.split()[1])
            for setting in SETTINGS
            if setting.startswith(f"{what} ")
        ]
        for backend, style in STYLES.items():
            points = [
                (n, 1e3 * last[backend, f"{what} {n}"]["geometric"])
                for n in ticks
                if (backend, f"{what} {n}") in last
            ]
            if points:
                name = measuring.BACKEND_NAMES[backend]
                axis.plot(*zip(*points, strict=True), label=name, **style)
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.set_xticks(ticks, labels=ticks)
        axis.minorticks_off()
        axis.set_yticks(
            [1, 3, 10, 30, 100], labels=["1", "3", "10", "30", "100"]
        )
    axes[0, 0].set_ylabel("time of the geometric step, ms")
    axes[0, 0].legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
