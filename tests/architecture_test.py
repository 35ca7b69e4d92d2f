"""Who may import whom, and how files are called."""

import ast
import pathlib
import sys

import pytest

pytestmark = pytest.mark.backend_independent("it reads source code")
ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "keras_geolora"

# Each module and what it may import of the package; a folder stands for all
# that is in it. Imports point one way, from the bottom of this table up.
MAY_IMPORT = {
    "integrator": [],  # sees arrays only: no layer, no variable
    "transport": ["integrator"],
    "manifold": [],  # factors and what is wrong with them
    "low_rank_sum": [],  # arrays of NumPy
    "layers.adapter": ["manifold"],
    "layouts": [],  # distributions and variables
    "keras_internals": [],  # what Keras has no public name for
    # A model loads and predicts without an optimizer.
    "layers": ["layers", "layouts", "keras_internals", "manifold"],
    "budget": ["integrator"],  # arrays only, too
    "groups": [
        "integrator",
        "transport",
        "budget",
        "layers.adapter",
        "layouts",
    ],
    "replicas": ["transport"],
    "virtual_devices": [],  # distributions and the environment
    "optimizer": [
        "transport",
        "budget",
        "groups",
        "layouts",
        "replicas",
        "virtual_devices",
    ],
    "targeting": ["layers"],
    "distribution": ["layers.adapted", "layouts", "targeting"],
    # What `compile` gave a model, and whether it fits what trains.
    "compiled_state": ["layers.adapter", "optimizer", "targeting"],
    "callbacks": [
        "callbacks",
        "targeting",
        "optimizer",
        "compiled_state",
        "rank_table",
        "heat_map",
        "report",
    ],
    "substitution": [],  # variables in general
    "adaptation": ["layers.adapter", "substitution", "targeting"],
    # It refuses to compile with an optimizer that is no GeoLoRA.
    "adapted_model": [
        "layers.adapter",
        "layers.adapted",
        "targeting",
        "adaptation",
        "optimizer",
        "compiled_state",
        "replicas",
        "callbacks",
        "manifold",
    ],
    "clipping": ["targeting"],
    "conversion": [
        "layers",
        "targeting",
        "adaptation",
        "adapted_model",
        "clipping",
        "manifold",
    ],
    "lifecycle": [
        "layers.adapter",
        "targeting",
        "substitution",
        "adaptation",
        "adapted_model",
        "replicas",
        "low_rank_sum",
    ],
    "compaction": ["layers.adapter", "targeting", "adapted_model"],
    # It asks the optimizer what was dropped, and for the budget.
    "report": [
        "targeting",
        "optimizer",
        "abbreviation",
        "heat_map",
        "rank_table",
        "files",
        "manifold",
        "clipping",
    ],
    "heat_map": ["abbreviation"],
    "abbreviation": [],  # strings
    "rank_table": ["files"],
    "files": [],  # bytes and paths
    "version": [],
    "adapter_file": [
        "layers",
        "targeting",
        "adaptation",
        "adapted_model",
        "files",
        "version",
        "manifold",
    ],
    "averaging": [
        "layers.adapter",
        "targeting",
        "adaptation",
        "adapted_model",
        "adapter_file",
        "low_rank_sum",
        "manifold",
    ],
    "exchange": [
        "layers",
        "targeting",
        "adapted_model",
        "adapter_file",
        "files",
        "low_rank_sum",
        "manifold",
    ],
    "signature": [],  # models in general, adapted or not
    # Where Keras runs on TensorFlow: loads, merges and writes.
    "saved_model": [
        "targeting",
        "adapted_model",
        "conversion",
        "lifecycle",
        "signature",
    ],
    "export": [
        "targeting",
        "adapted_model",
        "lifecycle",
        "files",
        "signature",
        "saved_model",
        "version",
        "manifold",
    ],
    "__main__": ["adapter_file", "exchange"],
    "": [""],  # the package itself gathers the public names
}

# What anybody may import of other packages.
EXTERNAL = {"keras", "numpy", "safetensors"}
# What one module may import beyond that: its reason to exist.
EXTERNAL_OF = {
    "heat_map": {"matplotlib"},
    "callbacks.rank_tensor_board": {"tensorboardX"},
    "exchange": {"h5py"},
    "saved_model": {"tensorflow"},
    "replicas": {"tensorflow"},
}


def module_name(path):
    """The name below the package, "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imports(path):
    """Full names of all that a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the import in full"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def within(name, folders):
    return any(
        folder == "" or name == folder or name.startswith(f"{folder}.")
        for folder in folders
    )


def internal_imports(path):
    """Modules of the package that a file imports."""
    for name in imports(path):
        if name.split(".")[0] == PACKAGE.name:
            name = name.partition(".")[2]
            while name not in MODULES:  # a name inside a module
                name = name.rpartition(".")[0]
            yield name


def row(name):
    """The row of MAY_IMPORT that holds for a module: the most specific."""
    rows = [key for key in MAY_IMPORT if key and within(name, [key])]
    return max(rows, key=len, default="" if name == "" else None)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_module_has_its_place(name):
    assert row(name) is not None, (
        f"Add '{name}' to MAY_IMPORT: what may it know of the package?"
    )


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_inside_the_package_point_one_way(name):
    allowed = MAY_IMPORT[row(name)]
    for imported in internal_imports(MODULES[name]):
        assert within(imported, allowed), f"'{name}' may not know '{imported}'"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_public_and_backend_neutral_packages_are_imported(name):
    allowed = EXTERNAL | EXTERNAL_OF.get(name, set())
    for imported in imports(MODULES[name]):
        top = imported.split(".")[0]
        assert not within(imported, ["keras.src"]), f"'{imported}' is private"
        assert (
            top in allowed | sys.stdlib_module_names or top == PACKAGE.name
        ), f"'{name}' imports '{imported}'"


def test_the_integrator_is_made_of_keras_operations_only():
    for imported in imports(MODULES["integrator"]):
        top = imported.split(".")[0]
        public = within(imported, ["keras.ops"])
        assert public or top in sys.stdlib_module_names, imported


def test_no_module_is_a_drawer_for_odds_and_ends():
    names = {name.rpartition(".")[2] for name in MODULES}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


def test_every_test_file_is_found_by_pytest():
    for path in (ROOT / "tests").rglob("*.py"):
        defined = ast.walk(ast.parse(path.read_text("utf-8")))
        has_tests = any(
            isinstance(node, ast.FunctionDef) and node.name.startswith("test")
            for node in defined
        )
        assert not has_tests or path.name.endswith("_test.py"), path
