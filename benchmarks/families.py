"""Every backbone of KerasHub: what is adapted, and that it trains and merges.

    python benchmarks/families.py run --backend torch
    python benchmarks/families.py table

Builds a tiny instance of every exported backbone, adapts everything that has
a kernel at rank 1, checks that the outputs are bit-identical, takes three
steps, checks that the loss fell and only factors changed, merges and compares.
Every family adds a line to `benchmarks/results/families.jsonl`; `table` prints
Markdown. The check itself is that of the test suite.
"""

import argparse
import os
import pathlib
import re
import sys
import warnings

import measuring

ROOT = pathlib.Path(__file__).parents[1]
RESULT = "families"


def run(names):
    """Examines families; one that fails does not stop the others."""
    tests = ROOT / "tests"
    sys.path[:0] = [str(ROOT), str(tests), str(tests / "model")]
    warnings.simplefilter("ignore")
    import families
    import keras
    import keras_hub
    from families_test import examine

    for name in names or families.names():
        row = {"family": name.removesuffix("Backbone")}
        try:
            row = examine(name)
        except Exception as error:
            row["error"] = why(error)
        row["enable_lora"] = keras_enable_lora(families, name)
        row["backend"] = keras.backend.backend()
        row["keras"], row["keras_hub"] = (
            keras.__version__,
            keras_hub.__version__,
        )
        measuring.append(RESULT, row)
        keras.backend.clear_session()


def why(error):
    """Returns the last sentence before Keras' list of arguments."""
    text = str(error).split("Arguments received by")[0].strip()
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)  # colours of a terminal
    return f"{type(error).__name__}: {text.splitlines()[-1][:80]}"


def keras_enable_lora(families, name):
    """Counts the layers that KerasHub's own `enable_lora` adapts."""
    backbone, _ = families.build(name)
    try:
        backbone.enable_lora(1)
    except Exception:
        return 0
    return sum(getattr(x, "lora_enabled", False) for x in all_layers(backbone))


def all_layers(model):
    """Returns all layers inside a model."""
    return list(model._flatten_layers(include_self=False))


def percent(share):
    """Formats a share; `None` for a family without a result."""
    return "-" if share is None else f"{share:.1%}".replace("0.0%", "0")


def matrices(row):
    """Describes what no adapter reaches and is no vector."""
    left = row.get("matrices out of reach")
    if left is None:
        return "-"
    names = dict.fromkeys(path.rpartition("/")[0] for path in left)
    last = dict.fromkeys(
        re.sub(r"_?\d+$", "", name.rpartition("/")[2]) for name in names
    )
    listed = ", ".join(f"`{name}`" for name in list(last)[:3])
    return percent(sum(left.values())) + (f": {listed}" if left else "")


def table():
    """Prints a row for every family."""
    rows = measuring.rows(RESULT)
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    print(
        "| family | layers adapted | by `enable_lora` | kernels left out "
        "| out of reach | without vectors | parameters | ranks | "
        + " | ".join(backends)
        + " |"
    )
    print("|---" * (8 + len(backends)) + "|")
    for family in sorted({row["family"] for row in rows}):
        found = {r["backend"]: r for r in rows if r["family"] == family}
        whole = [r for r in found.values() if "layers" in r] or [{}]
        row = whole[0]
        times = [
            "-"
            if backend not in found
            else found[backend].get("error") or f"{found[backend]['seconds']} s"
            for backend in backends
        ]
        print(
            f"| {family} | {row.get('layers', '-')} "
            f"| {next(iter(found.values()))['enable_lora']} "
            f"| {row.get('left out', '')} | {percent(row.get('out of reach'))} "
            f"| {matrices(row)} | {row.get('parameters', '-')} "
            f"of {row.get('of', '-')} | {row.get('ranks', '-')} "
            f"| {' | '.join(times)} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run")
    command.add_argument("names", nargs="*", help="all if not given")
    command.add_argument("--backend", default="torch")
    commands.add_parser("table")
    args = parser.parse_args()
    if args.command == "table":
        table()
    else:
        os.environ["KERAS_BACKEND"] = args.backend
        run(args.names)
