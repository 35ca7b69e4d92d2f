"""What the benchmarks share: command line, machine, medians, results."""

import argparse
import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

RESULTS = pathlib.Path(__file__).parent / "results"
# The method of version 0.1.0, a retraction in every step, as in docs/claims.md.
PAPER = {"retraction_interval": 1, "cut_interval": 20}
BOUND = 0.008  # its `max_update_ratio`
BACKENDS = ("tensorflow", "jax", "torch")
# How they are called in figures.
BACKEND_NAMES = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
# Colours that readers can tell apart who see no red, green or blue (Okabe and
# Ito). Every line has a marker of its own as well.
BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
VERMILION, PURPLE, SKY = "#D55E00", "#CC79A7", "#56B4E9"
PACKAGES = ("keras", "keras-hub", "numpy", "peft", "transformers", *BACKENDS)


def command_line(description):
    """Returns a parser, its commands, and `run`, which takes a backend."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--backend", choices=BACKENDS, required=True)
    commands.add_parser("table")
    return parser, commands, run


def plot_command(commands, file):
    """Adds `plot`, which takes the file to write, with a default."""
    plot = commands.add_parser("plot")
    plot.add_argument("file", nargs="?", type=pathlib.Path, default=file)


def run_or_print(args, measure, print_table, draw=None):
    """Does what `run`, `table` or `plot` asks for."""
    if args.command == "table":
        print_table()
    elif args.command == "plot":
        args.file.parent.mkdir(parents=True, exist_ok=True)
        draw(args.file)
    else:
        os.environ["KERAS_BACKEND"] = args.backend
        measure(args)


def environment(backend):
    """Returns what a timing depends on: machine, versions and the date."""
    return {
        "backend": backend,
        "device": device(backend),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }


def device(backend):
    """Returns the name of the accelerator, or that of the processor."""
    if backend == "torch":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    if backend == "jax":
        import jax

        if jax.devices()[0].platform != "cpu":
            return jax.devices()[0].device_kind
    if backend == "tensorflow":
        import tensorflow as tf

        for gpu in tf.config.list_physical_devices("GPU"):
            return tf.config.experimental.get_device_details(gpu)["device_name"]
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(": ")[1]
    return platform.processor() or platform.machine()


def versions():
    """Returns the versions of the packages that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def seconds(function):
    """Returns how long a call takes, and what it returns."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def interleaved(functions, rounds):
    """Times functions in turn, A B A B, so that all meet the same noise.

    Args:
        functions: Dict from name to function that waits for its result.
        rounds: Int.

    Returns:
        Dict from name to list of seconds.
    """
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function)[0])
    return times


def spread(times):
    """Returns median, smallest and largest of a list of seconds."""
    return {
        "median": statistics.median(times),
        "min": min(times),
        "max": max(times),
    }


def append(name, row):
    """Adds a row to a file of results, and prints it."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def rows(name):
    """Returns the rows of a file of results."""
    lines = (RESULTS / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def resident_kib(field):
    """Returns a line of the process' memory, `VmRSS` or `VmHWM`, in KiB."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise ValueError(f"No such line: {field}")


def forget_peak():
    """Lets `VmHWM` start anew from what is resident and in use.

    What a compiler needed stays with the process until it is asked for.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def memory_alone(script, methods, options, environment=None):
    """Measures the memory of each method in a process of its own.

    Args:
        script: String, the file with a command `memory_of` that prints what
            `memory_of_steps` returns.
        methods: List of names.
        options: Dict from option of the script to value.
        environment: Dict of more variables of these processes.

    Returns:
        Dict from method to what the script printed.
    """
    found = {}
    for method in methods:
        command = [sys.executable, script, "memory_of", "--methods", method]
        for option, value in options.items():
            command += [f"--{option.replace('_', '-')}", str(value)]
        output = subprocess.run(
            command,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        found[method] = json.loads(output.stdout.splitlines()[-1])
    return found


def memory_of_steps(step):
    """Returns the MiB by which steps raise the process, and its largest size.

    The first step, which compiles and makes the state of the optimizer, does
    not count.
    """
    before = resident_kib("VmRSS")
    step()
    forget_peak()
    for _ in range(3):
        step()
    peak = resident_kib("VmHWM")
    return {"rise": (peak - before) // 1024, "process": peak // 1024}


def remember(variables):
    """Returns pairs of a variable and a copy of its value."""
    from keras import ops

    return [(v, ops.convert_to_numpy(v).copy()) for v in variables]


def restore(remembered):
    """Assigns the values that `remember` copied."""
    for variable, value in remembered:
        variable.assign(value)


def markdown(header, lines):
    """Returns a Markdown table."""
    table = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in table)


def figure(rows, columns, width=9.0, height=3.2, **options):
    """Returns a figure of `rows` times `columns` axes, and the axes.

    Args:
        rows: Int.
        columns: Int.
        width: Float, inches of the figure.
        height: Float, inches of a row.
        **options: As `Figure.subplots`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height * rows), layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, alpha=0.25, linewidth=0.6)
    return made, axes


def label_lines(axis, texts, gap=0.055):
    """Writes the name of every line, with its marker, beside its last point.

    Labels that would lie on each other move apart.

    Args:
        axis: Axes, whose limits are final.
        texts: List of pairs of a name and a line.
        gap: Float, smallest distance of two labels in heights of the axes.
    """
    to_axes = axis.transData + axis.transAxes.inverted()
    ends = []
    for name, line in texts:
        x, y = to_axes.transform(line.get_xydata()[-1])
        ends.append((min(max(y, 0), 1), max(x, 1), name, line))
    ends.sort(key=lambda end: end[0])
    # Up from below, then down from above where the axes end.
    heights = []
    for y, *_ in ends:
        heights.append(max(y, heights[-1] + gap) if heights else y)
    highest = 1.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], highest)
        highest = heights[i] - gap
    where = dict(transform=axis.transAxes, clip_on=False)
    for height, (_, x, name, line) in zip(heights, ends, strict=True):
        axis.plot(
            [x + 0.04],
            [height],
            marker=line.get_marker(),
            color=line.get_color(),
            markerfacecolor=line.get_markerfacecolor(),
            markersize=4,
            **where,
        )
        axis.text(x + 0.07, height, name, va="center", fontsize=8, **where)
