"""Says whether an installed keras_geolora is that of this checkout.

    python -I tests/installed.py

`nox -s package` runs it where a wheel is installed. Tests import the checkout,
in which no file can be missing.
"""

import importlib.metadata
import pathlib
import sys

import keras_geolora

CHECKOUT = pathlib.Path(__file__).resolve().parents[1]


def contents(folder):
    """Returns the bytes of all files in a folder, by path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }


def main():
    installed = pathlib.Path(keras_geolora.__file__).resolve().parent
    if CHECKOUT in installed.parents:
        sys.exit(f"This is the checkout itself: {installed}")
    version = importlib.metadata.version("keras_geolora")
    if version != keras_geolora.__version__:
        sys.exit(f"{keras_geolora.__version__} was published as {version}")
    found, expected = contents(installed), contents(CHECKOUT / "keras_geolora")
    differ = {
        "missing": expected.keys() - found.keys(),
        "not of the checkout": found.keys() - expected.keys(),
        "changed": {p for p in expected if found.get(p) != expected[p]},
    }
    for what, paths in differ.items():
        if paths:
            sys.exit(f"Installed files are {what}: {sorted(paths)}")
    print(f"keras_geolora {version}: all {len(found)} files are in the wheel")


if __name__ == "__main__":
    main()
