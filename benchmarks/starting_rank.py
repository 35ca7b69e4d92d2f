"""Does the number of parameters at the end depend on the rank at the start?

    python benchmarks/starting_rank.py run --backend jax --task teacher
    python benchmarks/starting_rank.py table
    python benchmarks/starting_rank.py plot

Trains every task from the ranks 2, 4, 8, 16 and 32, in buffers of 32, with the
defaults of the library around Adam, three seeds, at each of `--tolerances`:

- `regression` and `completion` of `toys.py`: one matrix of rank 6, full batch;
- `continued`: `regression` from an adapter that is not zero, as after training
  on something else: random, its singular values between 1 and 0.5;
- `teacher`: three layers of 64 x 64 with frozen random kernels learn from a
  network whose kernels differ by matrices of rank 2, 4 and 8 and half their
  norm; 4,096 inputs, batches of 64;
- `trec` and `movies` of `tasks.py`: all linear layers of MiniLM, 1,600 examples
  in batches of 32, six epochs.

Rows, with the number of parameters at the ranks after every epoch, are added to
`benchmarks/results/starting_rank.jsonl`. A toy takes 5 minutes on one core of a
server, a task with MiniLM half an hour.
"""

import statistics
import warnings

import measuring

RESULT = "starting_rank"
PLOT = "docs/images/starting_rank.png"
RANKS, MAX_RANK, SEEDS = (2, 4, 8, 16, 32), 32, (0, 1, 2)
TOLERANCES = (0.1,)


def main():
    """Parses the command line."""
    parser, commands, run = measuring.command_line(__doc__)
    run.add_argument("--task", choices=list(TASKS), required=True)
    run.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    run.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    run.add_argument("--tolerances", type=float, nargs="+", default=TOLERANCES)
    measuring.plot_command(commands, PLOT)
    args = parser.parse_args()
    measuring.run_or_print(args, measure, print_table, draw)


def measure(args):
    """Trains from every rank with every seed."""
    warnings.simplefilter("ignore")  # Keras' generator has no length
    for tolerance in args.tolerances:
        for rank in args.ranks:
            for seed in args.seeds:
                found = train(TASKS[args.task](seed), rank, seed, tolerance)
                row = {"task": args.task, "tolerance": tolerance}
                row |= {"rank": rank, "seed": seed, **found}
                row |= measuring.environment(args.backend)
                measuring.append(RESULT, row)


class Matrix:
    """A problem of one matrix, of `toys.py`.

    A task says how its model is made and trained: `rate`, `loss`, `epochs`
    and `steps` of an epoch, or `None` for all of the data; `model()` without
    adapters; `begin(model, seed)`, which may change the adapters; `data()` as
    `fit` takes it; and `quality(model)`, a dict of numbers.
    """

    rate, epochs, steps = 3e-3, 40, 100

    def __init__(self, name, seed):
        import toys

        self.problem = toys.Problem(name, seed)
        self.loss = toys.half_squared_error

    def model(self):
        import keras

        layer = keras.layers.Dense(
            self.problem.shape[1], use_bias=False, kernel_initializer="zeros"
        )
        inputs = keras.Input((self.problem.shape[0],))
        return keras.Sequential([inputs, layer])

    def begin(self, model, seed):
        """Leaves the adapter zero."""

    def data(self):
        return {"x": self.problem.batches()}

    def quality(self, model):
        from keras import ops

        delta = ops.convert_to_numpy(model.layers[0].delta())
        start = self.problem.loss(0 * delta)
        return {
            "loss": self.problem.loss(delta) / start,
            "error": self.problem.error(delta),
        }


class Continued(Matrix):
    """The same from an adapter that is not zero."""

    rate = 1e-3

    def begin(self, model, seed):
        import numpy as np
        import toys

        (adapter,) = adapters(model)
        rng = np.random.default_rng(seed)
        sigma = np.geomspace(1, 0.5, adapter.rank)
        start = toys.reference.random_factors(rng, *self.problem.shape, sigma)
        toys.assign(adapter, start)


class Teacher:
    """A network that learns from another of the same kernels, but for ranks."""

    rate, epochs, steps, loss = 1e-3, 50, None, "mse"
    width, ranks, inputs, batch = 64, (2, 4, 8), 4096, 64

    def __init__(self, seed):
        import keras
        import numpy as np
        import toys

        keras.utils.set_random_seed(seed)
        rng = np.random.default_rng(seed)
        teacher = self.network()
        self.kernels = teacher.get_weights()
        shifted = []
        for kernel, rank in zip(self.kernels, self.ranks, strict=True):
            sigma = np.full(rank, 0.5 * np.linalg.norm(kernel) / rank**0.5)
            U, S, V = toys.reference.random_factors(rng, *kernel.shape, sigma)
            shifted.append(kernel + U @ S @ V.T)
        teacher.set_weights(shifted)
        x = rng.normal(size=(2 * self.inputs, self.width)).astype("float32")
        self.x = x[: self.inputs], x[self.inputs :]
        self.y = [teacher.predict(x, verbose=0) for x in self.x]

    def network(self):
        from keras import Input, Sequential, layers

        made = [
            layers.Dense(self.width, use_bias=False, activation=activation)
            for activation in ("tanh", "tanh", None)
        ]
        return Sequential([Input((self.width,)), *made])

    def model(self):
        network = self.network()
        network.set_weights(self.kernels)
        return network

    def begin(self, model, seed):
        """Leaves the adapters zero."""

    def data(self):
        return {"x": self.x[0], "y": self.y[0], "batch_size": self.batch}

    def quality(self, model):
        import numpy as np

        x, y = self.x[1], self.y[1]
        before = np.mean((self.model().predict(x, verbose=0) - y) ** 2)
        after = np.mean((model.predict(x, verbose=0) - y) ** 2)
        return {"loss": float(after / before)}


class Sentences:
    """A task of `tasks.py`: MiniLM learns to sort sentences."""

    rate, epochs, steps = 1e-3, 6, None

    def __init__(self, name, seed):
        import keras
        import tasks

        self.task, self.batch = tasks.TASKS[name], tasks.BATCH
        x, y = self.task.load()
        train, _, held_out = tasks.split(self.task, len(y), seed)
        self.train, self.held_out = (
            ({name: column[part] for name, column in x.items()}, y[part])
            for part in (train, held_out)
        )
        self.loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def model(self):
        return self.task.keras_model()

    def begin(self, model, seed):
        """Leaves the adapters zero."""

    def data(self):
        x, y = self.train
        return {"x": x, "y": y, "batch_size": self.batch}

    def quality(self, model):
        import numpy as np

        x, y = self.held_out
        logits = model.predict(x, verbose=0)
        loss = float(self.loss(y, logits)) / np.log(self.task.classes)
        return {
            "loss": loss,
            "accuracy": float((logits.argmax(-1) == y).mean()),
        }


def trec(seed):
    """Topics of questions."""
    return Sentences("trec", seed)


def movies(seed):
    """Praise and blame."""
    return Sentences("movies", seed)


def regression(seed):
    """A matrix of rank 6, seen through inputs."""
    return Matrix("regression", seed)


def completion(seed):
    """A matrix of rank 6, of which 60 % are known."""
    return Matrix("completion", seed)


def continued(seed):
    """A matrix of rank 6, after another one."""
    return Continued("regression", seed)


TASKS = {
    "regression": regression,
    "completion": completion,
    "continued": continued,
    "teacher": Teacher,
    "trec": trec,
    "movies": movies,
}


def train(task, rank, seed, tolerance):
    """Returns the parameters after every epoch, and what is at the end."""
    import keras

    import keras_geolora

    keras.utils.set_random_seed(1000 + seed)
    model = task.model()
    keras_geolora.enable_geolora(
        model, rank=rank, max_rank=MAX_RANK, seed=1000 + seed
    )
    task.begin(model, seed)
    optimizer = keras.optimizers.Adam(task.rate)
    optimizer = keras_geolora.GeoLoRA(
        optimizer,
        tolerance,
        max_update_ratio=measuring.BOUND,
        **measuring.PAPER,
    )
    model.compile(optimizer, loss=task.loss)
    parameters = [count(model)]

    def note(epoch, logs):
        parameters.append(count(model))

    model.fit(
        **task.data(),
        epochs=task.epochs,
        steps_per_epoch=task.steps,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=note)],
        verbose=0,
    )
    return {
        "parameters": parameters,
        "ranks": [adapter.rank for adapter in adapters(model)],
        **task.quality(model),
    }


def adapters(model):
    """Returns the adapters of a model."""
    from keras_geolora import LowRankAdapter

    layers = model._flatten_layers()
    return [layer for layer in layers if isinstance(layer, LowRankAdapter)]


def count(model):
    """Returns the parameters of the adapters at their ranks."""
    return sum(a.rank * a.parameters_per_rank for a in adapters(model))


def found():
    """Returns the last row of every run, by task and tolerance."""
    runs = {}
    for row in measuring.rows(RESULT):
        setting = runs.setdefault((row["task"], row["tolerance"]), {})
        setting[row["rank"], row["seed"]] = row
    return dict(sorted(runs.items()))


def by_rank(runs):
    """Returns the rows of every starting rank."""
    return {
        rank: [row for (start, _), row in sorted(runs.items()) if start == rank]
        for rank in sorted({rank for rank, _ in runs})
    }


def print_table():
    """Prints parameters at the end, and how far they are apart."""
    settings = found()
    names = [f"{task}, {tolerance:g}" for task, tolerance in settings]
    ranks = sorted({rank for runs in settings.values() for rank, _ in runs})
    lines = [
        [
            rank,
            *(cell(by_rank(runs).get(rank, [])) for runs in settings.values()),
        ]
        for rank in ranks
    ]
    print("Parameters at the end, mean of seeds (ranks of every seed)\n")
    print(measuring.markdown(["first rank", *names], lines))
    print("\nHow far apart, and the loss at the end, relative to the start\n")
    header = ["task", "largest by smallest mean", "worst seed", "loss"]
    lines = [
        [name, *apart(runs), losses(runs)]
        for name, runs in zip(names, settings.values(), strict=True)
    ]
    print(measuring.markdown(header, lines))


def cell(rows):
    """Formats the parameters and ranks of the seeds, of many layers a range."""
    if not rows:
        return "-"
    mean = statistics.mean(row["parameters"][-1] for row in rows)
    found = [
        " ".join(map(str, row["ranks"]))
        if len(row["ranks"]) < 5
        else f"{min(row['ranks'])} to {max(row['ranks'])}"
        for row in rows
    ]
    return f"{mean:,.0f} ({'; '.join(found)})"


def losses(runs):
    """Formats the smallest and the largest loss."""
    ends = [row["loss"] for row in runs.values()]
    return f"{min(ends):.1e} to {max(ends):.1e}"


def apart(runs):
    """Returns how far the numbers at the end are apart: means, worst seed."""
    means = [
        statistics.mean(row["parameters"][-1] for row in rows)
        for rows in by_rank(runs).values()
    ]
    seeds = {}
    for (_, seed), row in runs.items():
        seeds.setdefault(seed, []).append(row["parameters"][-1])
    worst = max(map(largest_by_smallest, seeds.values()))
    return f"{largest_by_smallest(means):.2f}", f"{worst:.2f}"


def largest_by_smallest(numbers):
    """Returns the ratio of the extremes."""
    return max(numbers) / min(numbers)


STYLES = {
    2: dict(color=measuring.BLUE, linestyle="-", marker="o"),
    4: dict(color=measuring.ORANGE, linestyle="--", marker="s"),
    8: dict(color=measuring.GREEN, linestyle="-.", marker="^"),
    16: dict(color=measuring.VERMILION, linestyle=":", marker="D"),
    32: dict(color=measuring.PURPLE, linestyle="-", marker="v"),
}
NAMES = {
    "completion": "matrix completion",
    "continued": "regression, continued",
    "movies": "movie sentiment, MiniLM",
    "regression": "matrix regression",
    "teacher": "teacher network",
    "trec": "TREC questions, MiniLM",
}


def draw(file):
    """Draws the parameters over epochs, from every rank."""
    settings = found()
    columns = 2
    rows = -(-len(settings) // columns)
    figure, axes = measuring.figure(rows, columns, width=5 * columns)
    for axis in list(axes.flat)[len(settings) :]:
        axis.remove()
    for axis, ((task, tolerance), runs) in zip(
        axes.flat, settings.items(), strict=False
    ):
        lines = draw_setting(axis, runs)
        axis.set_title(f"{NAMES[task]}, tolerance {tolerance:g}", fontsize=10)
    for line in axes:
        line[0].set_ylabel("parameters of the adapters")
    figure.legend(
        lines.values(), lines, loc="outside lower center", ncols=len(lines)
    )
    figure.savefig(file, dpi=110)


def draw_setting(axis, runs):
    """Draws one panel, returns the lines by their names in the legend."""
    from matplotlib.ticker import LogLocator, NullLocator

    lines = {}
    for rank, rows in by_rank(runs).items():
        curves = [row["parameters"] for row in rows]
        points = list(zip(*curves, strict=True))
        x = range(len(points))
        (lines[f"starting rank {rank}"],) = axis.plot(
            x,
            [statistics.mean(p) for p in points],
            markersize=4,
            markevery=max(1, len(points) // 8),
            linewidth=1.3,
            **STYLES.get(rank, {}),
        )
        axis.fill_between(
            x,
            [min(p) for p in points],
            [max(p) for p in points],
            color=STYLES.get(rank, {}).get("color"),
            alpha=0.12,
            linewidth=0,
        )
    axis.set(yscale="log", xlabel="epoch")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:,.0f}")
    return lines


if __name__ == "__main__":
    main()
