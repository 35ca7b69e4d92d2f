"""What the benchmarks share: command line, machine, medians, results."""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import time

RESULTS = pathlib.Path(__file__).parent / "results"
BACKENDS = ("tensorflow", "jax", "torch")
PACKAGES = ("keras", "keras-hub", "numpy", "peft", "transformers", *BACKENDS)


def command_line(description):
    """Returns a parser, its commands, and `run`, which takes a backend."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--backend", choices=BACKENDS, required=True)
    commands.add_parser("table")
    return parser, commands, run


def run_or_print(args, measure, print_table):
    """Does what `run` or `table` asks for."""
    if args.command == "table":
        print_table()
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
    """Lets `VmHWM` start anew from what is resident now."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def markdown(header, lines):
    """Returns a Markdown table."""
    table = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in table)
