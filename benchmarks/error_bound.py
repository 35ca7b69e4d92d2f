"""How far GeoLoRA is from full fine-tuning, and whether its loss ever rises.

    python benchmarks/error_bound.py run --backend jax
    python benchmarks/error_bound.py table
    python benchmarks/error_bound.py plot

The paper bounds the distance to the gradient flow of the full matrix, at a
fixed time, by `c1 * epsilon + c2 * step + c3 * theta / step`: `epsilon` is the
part of the gradient that no matrix of the rank can follow, `theta` what a cut
may discard, and no constant depends on singular values. The loss of `toys.py`,
`regression`, is quadratic, so the flow is known in closed form, and each term
can be varied alone, at time 2, with plain gradient descent:

- `zero`: from zero, so that all directions grow together; no cut, or cuts of
  several tolerances in every step;
- `late`: from a matrix of rank 3 with singular values 1, 0.7 and 0.5, beside
  which the directions that are missing are small; no cut or cuts, in every
  step or, as was the default of version 0.1.0, in every 20th;
- `epsilon`: from zero, with a full-rank matrix added to the one asked for,
  rank 6 at most;
- `small`: from a matrix of rank 6 whose smallest singular value
  is small. `euler` solves the differential equations of the three factors,
  with the inverse of `S`, by steps of the same length;
- `descent`: 400 steps of rank 6 at most, with 0.1 for `epsilon`; the largest
  rise of the loss in a step;
- `network`: the same for 100 steps of the three layers of `starting_rank.py`
  and 1,024 inputs, all in one batch, from rank 4, 8 at most.

Each with the float64 reference of the test suite and with the library, in
float32, three seeds; `network` with the library. Rows are added to
`benchmarks/results/error_bound.jsonl`. Takes 10 minutes on one core.
"""

import functools
import pathlib
import statistics
import sys
import warnings

import measuring

RESULT = "error_bound"
PLOT = "docs/images/error_bound.png"
TIME, SEEDS = 2.0, (0, 1, 2)
STEPS = [4, 8, 16, 32, 64, 128, 256, 512, 1024]
CUTS = {
    "zero": ["0 every 1", "0.001 every 1", "0.01 every 1", "0.1 every 1"],
    "late": ["0 every 1", "0.001 every 1", "0.01 every 1", "0.01 every 20"],
}
STARTS = {"zero": [0.0] * 6, "late": [1.0, 0.7, 0.5]}
EPSILONS = [0.0, 1e-3, 1e-2, 1e-1]
SMALLEST = [1e-1, 1e-3, 1e-6]
RATES = [0.03, 0.1, 0.3, 1.0, 1.9, 2.1]
NETWORK_RATES = [0.3, 1.0, 3.0, 10.0]
DESCENT_CUTS = ["0 every 1", "0.1 every 1", "0.1 every 20"]
DESCENT_STEPS, NETWORK_STEPS, MAX_RANK = 400, 100, 16


def main():
    """Parses the command line."""
    parser, commands, run = measuring.command_line(__doc__)
    experiments = {
        "zero": functools.partial(vary_step, experiment="zero"),
        "late": functools.partial(vary_step, experiment="late"),
        "epsilon": vary_epsilon,
        "small": vary_smallest,
        "descent": descend,
        "network": descend_in_network,
    }
    run.add_argument("--experiments", nargs="+", default=list(experiments))
    measuring.plot_command(commands, PLOT)
    args = parser.parse_args()

    def measure(args):
        # Keras' generator of batches has no length; one rate diverges.
        warnings.simplefilter("ignore")
        for name in args.experiments:
            experiments[name](args)

    measuring.run_or_print(args, measure, print_tables, draw)


def vary_step(args, experiment):
    """Distances over steps and tolerances."""
    for cut in CUTS[experiment]:
        tolerance, interval = split(cut)
        ways = {"float64": Reference, "library": Library}
        for name, way in ways.items():
            run = way(tolerance, interval, start=STARTS[experiment])
            add_distances(args, experiment, name, run, cut=cut)


def split(cut):
    """Returns the tolerance and the interval of a cut."""
    tolerance, interval = cut.split(" every ")
    return float(tolerance), int(interval)


def vary_epsilon(args):
    """Distances over steps and the part of no rank."""
    for epsilon in EPSILONS:
        ways = {"float64": Reference, "library": Library}
        for name, way in ways.items():
            run = way(epsilon=epsilon, max_rank=6)
            add_distances(args, "epsilon", name, run, epsilon=epsilon)


def vary_smallest(args):
    """Distances over steps and the smallest singular value at the start."""
    for smallest in SMALLEST:
        ways = {"float64": Reference, "library": Library, "euler": Euler}
        for name, way in ways.items():
            start = [smallest ** (i / 5) for i in range(6)]
            run = way(start=start, same_side=True, max_rank=6)
            add_distances(args, "small", name, run, smallest=smallest)


def add_distances(args, experiment, way, run, **setting):
    """Adds a row with the distance for every number of steps and seed."""
    distances = {
        steps: [run.distance(seed, steps) for seed in SEEDS] for steps in STEPS
    }
    row = {"experiment": experiment, "way": way, **setting}
    row |= {"distances": distances, **measuring.environment(args.backend)}
    measuring.append(RESULT, row)


class Flow:
    """The problem, its flow, and descent with the float64 reference.

    Args:
        tolerance: Float, of a cut.
        interval: Int, number of steps between two cuts.
        epsilon: Float, norm of what is added to the matrix asked for,
            relative to it.
        start: List of the singular values at the start.
        same_side: Bool, whether the start has the output side of the matrix
            asked for, so that the flow keeps its rank.
        max_rank: Int.
    """

    def __init__(
        self,
        tolerance=0.0,
        interval=1,
        epsilon=0.0,
        start=(0.0,) * 6,
        same_side=False,
        max_rank=MAX_RANK,
    ):
        self.tolerance, self.interval = tolerance, interval
        self.epsilon, self.start, self.same_side = epsilon, start, same_side
        self.max_rank = max_rank

    def setting(self, seed):
        """Returns the Hessian, the matrix asked for, and the start."""
        import numpy as np
        import toys

        problem = toys.Problem("regression", seed)
        rng = np.random.default_rng(100 + seed)
        x = problem.x.astype("float64")
        target = problem.target
        more = rng.normal(size=target.shape)
        size = self.epsilon * np.linalg.norm(target) / np.linalg.norm(more)
        U, S, V = reference().random_factors(rng, *target.shape, self.start)
        if self.same_side:
            side = np.linalg.svd(target)[2][: len(S)].T
            V = side @ np.linalg.qr(rng.normal(size=S.shape))[0]
        return x.T @ x / len(x), target + size * more, (U, S, V)

    def distance(self, seed, steps):
        """Returns how far the end is from the flow, relative to its end."""
        import numpy as np

        H, target, start = self.setting(seed)
        rates, Q = np.linalg.eigh(H)
        left = Q * np.exp(-rates * TIME) @ Q.T
        U, S, V = start
        flow = target + left @ (U @ S @ V.T - target)
        delta = self.end(seed, H, target, start, steps)
        distance = np.linalg.norm(delta - flow) / np.linalg.norm(flow)
        return float(f"{distance:.3g}") if distance < 1e12 else None


class Reference(Flow):
    """Descent by the reference of the test suite, in float64."""

    def end(self, seed, H, target, start, steps):
        U, S, V = start
        for step in range(1, steps + 1):
            U, S, V = self.step(U, S, V, H, target, TIME / steps, step)
        return U @ S @ V.T

    def step(self, U, S, V, H, target, rate, step):
        G = H @ (U @ S @ V.T - target)
        cuts = step % self.interval == 0
        return reference().sgd_step(
            *(U, S, V, G, rate),
            tolerance=self.tolerance if cuts else 0.0,
            max_rank=self.max_rank,
        )

    def losses(self, seed, rate):
        """Returns the loss before and after every step."""
        import numpy as np

        H, target, (U, S, V) = self.setting(seed)
        losses = []
        for step in range(1, DESCENT_STEPS + 2):
            D = U @ S @ V.T - target
            losses.append(0.5 * np.sum(D * (H @ D)))
            U, S, V = self.step(U, S, V, H, target, rate, step)
        return losses


class Euler(Flow):
    """Euler's method for the differential equations of the factors."""

    def end(self, seed, H, target, start, steps):
        import numpy as np

        U, S, V = start
        rate = TIME / steps
        for _ in range(steps):
            G = H @ (U @ S @ V.T - target)
            inverse = np.linalg.pinv(S)
            GV, GU = G @ V, G.T @ U
            dU = (GV - U @ (U.T @ GV)) @ inverse
            dV = (GU - V @ (V.T @ GU)) @ inverse.T
            S = S - rate * U.T @ GV
            U = np.linalg.qr(U - rate * dU)
            V = np.linalg.qr(V - rate * dV)
            S = U[1] @ S @ V[1].T
            U, V = U[0], V[0]
            if not np.isfinite(S).all():
                break
        return U @ S @ V.T


class Library(Flow):
    """Descent by the library, in float32, from the start of the reference."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        import keras
        import toys

        from keras_geolora import GeoLoRA

        def layer(seed):
            return toys.adapted(64, len(self.start), self.max_rank, seed)

        optimizer = GeoLoRA(
            keras.optimizers.SGD(0.1),
            tolerance=self.tolerance,
            cut_interval=self.interval,
            retraction_interval=1,
            max_update_ratio=None,
        )
        self.trainer = toys.Trainer((96, 64), layer, optimizer)

    def problem(self, seed, target):
        import numpy as np
        import toys

        problem = toys.Problem("regression", seed)
        y = problem.x.astype("float64") @ target
        problem.y = np.stack([y, np.ones_like(y)], axis=-1).astype("float32")
        return problem

    def end(self, seed, H, target, start, steps):
        problem = self.problem(seed, target)
        rate = TIME / steps
        run = self.trainer.train(problem, rate, seed, 1, steps, start)
        return list(run)[-1]

    def losses(self, seed, rate):
        _, target, start = self.setting(seed)
        problem = self.problem(seed, target)
        run = self.trainer.train(problem, rate, seed, DESCENT_STEPS, 1, start)
        return [problem.loss(delta) for delta in run]


def descend(args):
    """Rises of the loss over learning rates and cuts."""
    for cut in DESCENT_CUTS:
        for name, way in {"float64": Reference, "library": Library}.items():
            run = way(*split(cut), epsilon=0.1, max_rank=6)
            for rate in RATES:
                rises = [rise(run.losses(seed, rate)) for seed in SEEDS]
                add_rises(args, "quadratic", name, cut, rate, rises)


def descend_in_network(args):
    """The same for a network."""
    for cut in DESCENT_CUTS:
        for rate in NETWORK_RATES:
            rises = [
                rise(network_losses(seed, rate, *split(cut))) for seed in SEEDS
            ]
            add_rises(args, "network", "library", cut, rate, rises)


def add_rises(args, problem, way, cut, rate, rises):
    """Adds a row."""
    row = {"experiment": "descent", "problem": problem, "way": way}
    row |= {"cut": cut, "rate": rate, "rises": rises}
    measuring.append(RESULT, row | measuring.environment(args.backend))


def network_losses(seed, rate, tolerance, interval):
    """Returns the losses of a network before every step."""
    import keras
    import starting_rank

    import keras_geolora

    task = starting_rank.Teacher(seed)
    model = task.model()
    keras_geolora.enable_geolora(model, rank=4, max_rank=8, seed=seed)
    optimizer = keras_geolora.GeoLoRA(
        keras.optimizers.SGD(rate),
        tolerance,
        cut_interval=interval,
        retraction_interval=1,
    )
    model.compile(optimizer, loss=task.loss)
    data = task.x[0][:1024], task.y[0][:1024]
    return [
        float(model.train_on_batch(*data)) for _ in range(NETWORK_STEPS + 1)
    ]


def rise(losses):
    """Returns how often and how far the loss rises, and its end.

    A rise is relative to the loss at the start. The gradient is what is left
    to gain, so rises of rounding are told from others by their size.
    """
    steps = list(zip(losses[:-1], losses[1:], strict=True))
    rises = [after - before for before, after in steps if after > before]
    return {
        "count": len(rises),
        "largest": float(f"{max(rises, default=0) / losses[0]:.2g}"),
        "end": float(f"{losses[-1] / losses[0]:.3g}"),
    }


def reference():
    """Returns the reference of the test suite."""
    folder = str(pathlib.Path(__file__).parents[1] / "tests")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import reference

    return reference


def lines_of(experiment, what):
    """Returns steps and median distances, by value and way."""
    found = {}
    for row in measuring.rows(RESULT):
        if row["experiment"] == experiment:
            found[row[what], row["way"]] = {
                int(steps): statistics.median(map(finite, distances))
                for steps, distances in row["distances"].items()
            }
    return found


def finite(number):
    """Returns a number, infinite where it could not be written."""
    return float("inf") if number is None else number


def slope(distances):
    """Returns the least-squares slope of the logarithms, for short steps."""
    import numpy as np

    short = {n: d for n, d in distances.items() if n >= 64}
    x = np.log([TIME / n for n in short])
    return np.polyfit(x, np.log(list(short.values())), 1)[0]


EXPERIMENTS = {
    "zero": "cut",
    "late": "cut",
    "epsilon": "epsilon",
    "small": "smallest",
}


def print_tables():
    """Prints the distances, and the rises."""
    for experiment, what in EXPERIMENTS.items():
        shown = STEPS[::4]
        header = [what, "way", *(f"step {TIME / n:.2g}" for n in shown)]
        lines = [
            [show(value), way, *(f"{d[n]:.1e}" for n in shown), slope_of(d)]
            for (value, way), d in lines_of(experiment, what).items()
        ]
        print(f"\nDistance to the flow, {TITLES[experiment]}\n")
        print(measuring.markdown([*header, "slope"], lines))
    header = ["rate", *DESCENT_CUTS]
    for problem, way in DESCENTS:
        print(f"\nRises of the loss, {problem}, {way}: how many, the largest\n")
        rises = rises_of(problem, way)
        lines = [
            [
                f"{rate:g}",
                *(cell(rises.get((cut, rate), [])) for cut in DESCENT_CUTS),
            ]
            for rate in sorted({rate for _, rate in rises})
        ]
        print(measuring.markdown(header, lines))


DESCENTS = [
    ("quadratic", "float64"),
    ("quadratic", "library"),
    ("network", "library"),
]


def rises_of(problem, way):
    """Returns the rises of every seed, by cut and rate."""
    return {
        (row["cut"], row["rate"]): row["rises"]
        for row in measuring.rows(RESULT)
        if row["experiment"] == "descent"
        and (row["problem"], row["way"]) == (problem, way)
    }


def cell(rises):
    """Formats how often the loss rose, and how far at most."""
    counts = ", ".join(str(one["count"]) for one in rises)
    largest = max((one["largest"] for one in rises), default=0)
    return f"{counts}; {largest:.0e}" if largest else counts


def show(value):
    """Formats what was varied."""
    return value if isinstance(value, str) else f"{value:g}"


def slope_of(distances):
    """Formats the slope, which says nothing where distances overflow."""
    value = slope(distances)
    return f"{value:.2f}" if abs(value) < 100 else "-"


WAYS = {
    "float64": dict(linestyle="-", markerfacecolor="white"),
    "library": dict(linestyle="", markersize=3.5),
    "euler": dict(linestyle="--", markerfacecolor="white"),
}
SHADES = [
    measuring.BLUE,
    measuring.GREEN,
    measuring.ORANGE,
    measuring.VERMILION,
]
MARKERS = "osv^"
TITLES = {
    "zero": "from zero: tolerance and interval of cuts",
    "late": "directions that join late",
    "epsilon": "a part of the gradient that no matrix follows",
    "small": "a small singular value at the start",
}


def draw(file):
    """Draws the distance over the step, for all experiments."""
    figure, axes = measuring.figure(
        2, 2, width=11, height=3.6, sharex=True, sharey=True
    )
    for axis, experiment in zip(axes.flat, EXPERIMENTS, strict=True):
        draw_experiment(axis, experiment)
    for axis in axes[:, 0]:
        axis.set_ylabel("distance to the flow, relative")
    for axis in axes[-1]:
        axis.set_xlabel("length of a step: shorter to the right")
    draw_legend(figure)
    figure.savefig(file, dpi=110)


def draw_legend(figure):
    """Says what lines and points are."""
    from matplotlib.lines import Line2D

    names = {
        "float64": "GeoLoRA in NumPy, float64",
        "library": "this library, float32",
        "euler": "Euler steps of the three factors, float64",
    }
    style = dict(color="black", marker="o", markersize=6)
    handles = [Line2D([], [], **style | WAYS[way]) for way in names]
    figure.legend(
        handles,
        names.values(),
        loc="outside lower center",
        ncols=len(names),
        fontsize=9,
    )


def draw_experiment(axis, experiment):
    """Draws one panel: lines are float64, points without a line the library."""
    lines = []
    found = lines_of(experiment, EXPERIMENTS[experiment])
    order = list(dict.fromkeys(value for value, _ in found))
    for (value, way), distances in found.items():
        at = order.index(value)
        (line,) = axis.plot(
            [TIME / steps for steps in distances],
            [min(d, 1e3) for d in distances.values()],
            color=SHADES[at],
            marker=MARKERS[at],
            linewidth=1.2,
            **{"markersize": 6} | WAYS[way],
        )
        if way != "library":
            lines.append((name_of(experiment, value, way), line))
    axis.set(xscale="log", yscale="log", xlim=(0.7, 1.6e-3), ylim=(2e-4, 20))
    axis.set_title(TITLES[experiment], fontsize=10)
    measuring.label_lines(axis, lines)


def name_of(experiment, value, way):
    """Returns what is written beside a line."""
    if experiment == "epsilon":
        return f"epsilon {value:g}"
    if experiment == "small":
        name = f"smallest {value:g}"
        return f"Euler, {name}" if way == "euler" else name
    tolerance, interval = value.split(" every ")
    if tolerance == "0":
        return "no cut"
    often = "every step" if interval == "1" else f"every {interval} steps"
    return f"tolerance {tolerance}, {often}"


if __name__ == "__main__":
    main()
