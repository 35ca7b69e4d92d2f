"""The command line: inspect, convert and compare adapter files."""

import argparse
import json
import pathlib
import sys

import numpy as np

from keras_geolora.files.adapter_format import read_adapter
from keras_geolora.files.exported import exported_file
from keras_geolora.files.gguf import base_of, write_gguf
from keras_geolora.files.merged import write_merged
from keras_geolora.files.peft_names import FAMILIES
from keras_geolora.files.peft_writing import write_peft
from keras_geolora.files.rounding import DTYPES
from keras_geolora.files.servers import SERVERS


def main(arguments=None):
    """Runs a command; returns 0, 1 for files that differ, 2 for an error."""
    parser = argparse.ArgumentParser(
        prog="python -m keras_geolora", description=__doc__
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("inspect", help="show the content of a file")
    command.add_argument("file")
    command.add_argument(
        "--json", action="store_true", help="print the description as JSON"
    )
    command.set_defaults(run=inspect)

    command = commands.add_parser("convert", help="write another format")
    command.add_argument("file")
    command.add_argument(
        "--to", choices=["peft", "gguf", "merged"], required=True
    )
    command.add_argument(
        "--output",
        help="folder, by default the file name without its ending; "
        "for gguf a file, by default with this ending",
    )
    command.add_argument(
        "--base",
        help="for gguf: the GGUF file of the base model; "
        "for merged: its Hugging Face folder",
    )
    command.add_argument(
        "--names", help='JSON file: {"path of a layer": "name of a module"}'
    )
    command.add_argument(
        "--prefix", help='where the backbone is, for example "bert" or ""'
    )
    command.add_argument("--base-model", help="base model on Hugging Face")
    command.add_argument(
        "--pad", action="store_true", help="pad all layers to the largest rank"
    )
    command.add_argument(
        "--server", choices=SERVERS, help="keep the rules of a server"
    )
    command.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the factors"
    )
    command.set_defaults(run=convert)

    command = commands.add_parser("diff", help="compare two files")
    command.add_argument("file")
    command.add_argument("other")
    command.set_defaults(run=diff)

    args = parser.parse_args(arguments)
    try:
        return args.run(args) or 0
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def inspect(args):
    """Prints the content of a file."""
    description, tensors = read_adapter(args.file)
    if args.json:
        print(json.dumps(description, indent=2))
        return
    plan = description["adapter"]
    print(f"adapter '{plan['name']}' of a {description['model']}", end="")
    print(
        f", written by keras_geolora {description['keras_geolora']} "
        f"and keras {description['keras']}"
    )
    print(f"base weights {description['base']['']}\n")
    rows = [("layer", "class", "shape", "rank", "parameters", "spectrum")]
    total = 0
    for path, options in plan["layers"].items():
        U, S, V, _ = update(description, tensors, path)
        sigma = np.linalg.svd(S * options["scale"], compute_uv=False)
        count = len(S) * (len(U) + len(V))
        total += count
        rows.append(
            (
                path,
                description["classes"][path],
                f"{len(U)} x {len(V)}",
                str(len(S)),
                f"{count:,}",
                f"{sigma[0]:.3g} to {sigma[-1]:.3g}",
            )
        )
    print_table(rows)
    ranks = [options["rank"] for options in plan["layers"].values()]
    print(
        f"\n{len(ranks)} layers, mean rank {np.mean(ranks):.1f}, "
        f"{total:,} parameters of updates"
    )
    others = other_tensors(description, tensors)
    if others:
        print(f"{sum(x.size for x in others.values()):,} other parameters:")
        for key, x in others.items():
            print(f"  {key} {tuple(x.shape)}")


def convert(args):
    """Writes the adapter of a file in another format."""
    adapter = adapter_in(*read_adapter(args.file))
    write = {
        "peft": convert_to_peft,
        "gguf": convert_to_gguf,
        "merged": convert_to_merged,
    }[args.to]
    report = write(adapter, args)
    if args.server:
        print(f"serve it with --max-lora-rank {report['max_lora_rank']}")
    if report["rounding_error"]:
        print(f"rounding changes an update by {report['rounding_error']:.1%}")


def convert_to_peft(adapter, args):
    """Writes a folder for PEFT, and returns a report."""
    folder = args.output or pathlib.Path(args.file).with_suffix("")
    report = write_peft(
        folder,
        adapter,
        names=names_in(args),
        prefix=args.prefix,
        base_model=args.base_model,
        pad=args.pad,
        server=args.server,
        dtype=args.dtype,
    )
    print(f"wrote '{folder}'")
    return report


def convert_to_gguf(adapter, args):
    """Writes a file for llama.cpp, and returns a report."""
    if args.base is None:
        raise ValueError(
            "The file of an adapter does not know its number of heads, by "
            "which llama.cpp orders rows. Add the GGUF file of the base model: "
            "--base model.gguf"
        )
    refuse(args, "names", "prefix", "base_model", "pad", "server")
    path = args.output or pathlib.Path(args.file).with_suffix(".gguf")
    report = write_gguf(path, adapter, *base_of(args.base), args.dtype)
    print(f"wrote '{path}' for architecture '{report['architecture']}'")
    return report


def convert_to_merged(adapter, args):
    """Writes the folder of a merged model, and returns a report."""
    if args.base is None:
        raise ValueError(
            "A merged model is made of its base. Add the Hugging Face folder "
            "from which it was loaded: --base folder"
        )
    refuse(args, "prefix", "base_model", "pad", "server")
    if args.dtype != "float32":
        raise ValueError("A merged model keeps the dtype of its base.")
    folder = args.output or pathlib.Path(args.file).with_suffix("")
    report = write_merged(folder, adapter, args.base, names_in(args))
    print(f"wrote '{folder}', in which {report['changed']} tensors are merged")
    return report


def names_in(args):
    """Returns the names of modules that the user gave, or `None`."""
    if args.names is None:
        return None
    names = json.loads(pathlib.Path(args.names).read_text())
    if not isinstance(names, dict) or not all(
        isinstance(name, str) for name in names.values()
    ):
        raise ValueError(
            f"'{args.names}' must map paths of layers to names, "
            'for example {"dense": "classifier"}.'
        )
    return names


def refuse(args, *options):
    """Raises if an option is given that is for PEFT."""
    for option in options:
        if getattr(args, option):
            raise ValueError(
                f"--{option.replace('_', '-')} is for --to peft only."
            )


def adapter_in(description, tensors):
    """Returns the `Exported` of a file."""
    family = description.get("family") or description["backbone"]
    return exported_file(
        description,
        tensors,
        {p: update(description, tensors, p) for p in paths(description)},
        list(other_tensors(description, tensors)),
        family if family in FAMILIES else None,
    )


def diff(args):
    """Prints how two files differ."""
    files = [read_adapter(args.file), read_adapter(args.other)]
    (one, tensors), (other, other_ones) = files
    differences = []
    for key in ("model", "backbone"):
        if one[key] != other[key]:
            differences.append((key, one[key], other[key]))
    for path in sorted({*one["base"], *other["base"]} - {""}):
        if path not in paths(one) or path not in paths(other):
            has = ("yes", "no") if path in paths(one) else ("no", "yes")
            differences.append((path, *has))
            continue
        if one["base"][path] != other["base"][path]:
            differences.append((f"{path} (base)", "one", "another"))
        updates = update(one, tensors, path), update(other, other_ones, path)
        if len(updates[0][0]) != len(updates[1][0]) or len(
            updates[0][2]
        ) != len(updates[1][2]):
            shapes = (f"{len(U)} x {len(V)}" for U, _, V, _ in updates)
            differences.append((f"{path} (shape)", *shapes))
            continue
        distance = relative_distance(*updates)
        if distance > 0:
            ranks = [f"rank {len(S)}" for _, S, _, _ in updates]
            differences.append((path, *ranks, f"distance {distance:.3g}"))
    if one["base"][""] != other["base"][""]:
        differences.append(("other base weights", "one", "another"))
    mine, theirs = other_tensors(*files[0]), other_tensors(*files[1])
    for key in sorted({*mine, *theirs}):
        if key not in mine or key not in theirs:
            has = ("yes", "no") if key in mine else ("no", "yes")
            differences.append((key, *has))
        elif not np.array_equal(mine[key], theirs[key]):
            differences.append((key, "one", "another"))
    if not differences:
        print("The adapters are the same.")
        return 0
    print_table([("what", args.file, args.other), *differences])
    return 1


def paths(description):
    """Returns the paths of the adapted layers of a file."""
    return list(description["adapter"]["layers"])


def update(description, tensors, path):
    """Returns `(U, S, V, scale)` of a layer."""
    scale = description["adapter"]["layers"][path]["scale"]
    return (*(tensors[f"{path}.{role}"] for role in "USV"), scale)


def other_tensors(description, tensors):
    """Returns the arrays of a file that are not factors."""
    factors = {
        f"{path}.{role}" for path in paths(description) for role in "USV"
    }
    return {key: x for key, x in tensors.items() if key not in factors}


def relative_distance(one, other):
    """Returns the distance of two updates, relative to the larger norm.

    With `one = U S V.T` and `other = X T Y.T` the inner product is the trace
    of `S.T U.T X T Y.T V`; neither update is formed.
    """

    def product(first, second):
        U, S, V, scale = (np.asarray(x, "float64") for x in first)
        X, T, Y, other_scale = (np.asarray(x, "float64") for x in second)
        core = S.T @ (U.T @ X) @ T @ (Y.T @ V)
        return float(np.trace(core) * scale * other_scale)

    squares = product(one, one), product(other, other)
    if all(np.array_equal(a, b) for a, b in zip(one, other, strict=True)):
        return 0.0
    distance = max(sum(squares) - 2 * product(one, other), 0.0)
    return float(np.sqrt(distance / (max(squares) or 1.0)))


def print_table(rows):
    """Prints rows of strings in columns."""
    width = max(map(len, rows))
    rows = [(*row, *[""] * (width - len(row))) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (x.ljust(n) for x, n in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())
