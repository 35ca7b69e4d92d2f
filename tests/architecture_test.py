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
    "geometry": [],
    "distribution": [],
    "optimizer": [],
    "viewing": [],
    "model": [],
    "files": [],
    "serving": [],
    "geometry.integrator": [],  # sees arrays only: no layer, no variable
    "geometry.transport": ["geometry.integrator"],
    "geometry.manifold": [],  # factors and what is wrong with them
    "geometry.low_rank_sum": [],  # arrays of NumPy
    "layers.adapter": ["geometry.manifold"],
    "distribution.layouts": [],  # distributions and variables
    "keras_internals": [],  # what Keras has no public name for
    # A model loads and predicts without an optimizer.
    "layers": [
        "layers",
        "distribution.layouts",
        "keras_internals",
        "geometry.manifold",
    ],
    "geometry.budget": ["geometry.integrator"],  # arrays only, too
    "optimizer.groups": [
        "geometry.integrator",
        "geometry.transport",
        "geometry.budget",
        "layers.adapter",
        "distribution.layouts",
    ],
    "distribution.tf_replicas": ["geometry.transport"],
    "distribution.virtual_devices": [],  # distributions and the environment
    "optimizer.geolora": [
        "geometry.transport",
        "geometry.budget",
        "optimizer.groups",
        "distribution.layouts",
        "distribution.tf_replicas",
        "distribution.virtual_devices",
    ],
    "model.targeting": ["layers"],
    "model.adapter_layouts": [
        "layers.adapted",
        "distribution.layouts",
        "model.targeting",
    ],
    # What `compile` gave a model, and whether it fits what trains.
    "model.compiled_state": [
        "layers.adapter",
        "optimizer.geolora",
        "model.targeting",
    ],
    "callbacks": [
        "callbacks",
        "model.targeting",
        "optimizer.geolora",
        "model.compiled_state",
        "viewing.rank_table",
        "viewing.heat_map",
        "viewing.summary",
    ],
    "model.substitution": [],  # variables in general
    "model.adaptation": [
        "layers.adapter",
        "model.substitution",
        "model.targeting",
    ],
    # It refuses to compile with an optimizer that is no GeoLoRA.
    "adapted_model": [],  # what pickles name
    "model.adapted_model": [
        "adapted_model",
        "layers.adapter",
        "layers.adapted",
        "model.targeting",
        "model.adaptation",
        "optimizer.geolora",
        "model.compiled_state",
        "distribution.tf_replicas",
        "callbacks",
        "geometry.manifold",
    ],
    "model.clipping": ["model.targeting"],
    "model.enabling": [
        "layers",
        "model.targeting",
        "model.adaptation",
        "model.adapted_model",
        "model.clipping",
        "geometry.manifold",
    ],
    "model.switching": [
        "layers.adapter",
        "model.targeting",
        "model.substitution",
        "model.adaptation",
        "model.adapted_model",
        "distribution.tf_replicas",
        "geometry.low_rank_sum",
    ],
    "model.compaction": [
        "layers.adapter",
        "model.targeting",
        "model.adapted_model",
    ],
    # It asks the optimizer what was dropped, and for the budget.
    "viewing.summary": [
        "model.targeting",
        "optimizer.geolora",
        "viewing.abbreviation",
        "viewing.heat_map",
        "viewing.rank_table",
        "whole_files",
        "geometry.manifold",
        "model.clipping",
    ],
    "viewing.heat_map": ["viewing.abbreviation"],
    "viewing.abbreviation": [],  # strings
    "viewing.rank_table": ["whole_files"],
    "whole_files": [],  # bytes and paths
    "version": [],
    "files.adapter_file": [
        "layers",
        "model.targeting",
        "model.adaptation",
        "model.adapted_model",
        "whole_files",
        "version",
        "geometry.manifold",
    ],
    "model.averaging": [
        "layers.adapter",
        "model.targeting",
        "model.adaptation",
        "model.adapted_model",
        "files.adapter_file",
        "geometry.low_rank_sum",
        "geometry.manifold",
    ],
    "files.peft": [
        "layers",
        "model.targeting",
        "model.adapted_model",
        "files.adapter_file",
        "whole_files",
        "geometry.low_rank_sum",
        "geometry.manifold",
    ],
    "serving.signature": [],  # models in general, adapted or not
    # Where Keras runs on TensorFlow: loads, merges and writes.
    "serving.saved_model": [
        "model.targeting",
        "model.adapted_model",
        "model.enabling",
        "model.switching",
        "serving.signature",
    ],
    "serving.export": [
        "model.targeting",
        "model.adapted_model",
        "model.switching",
        "whole_files",
        "serving.signature",
        "serving.saved_model",
        "version",
        "geometry.manifold",
    ],
    "__main__": ["files.adapter_file", "files.peft"],
    "": [""],  # the package itself gathers the public names
}

# What anybody may import of other packages.
EXTERNAL = {"keras", "numpy", "safetensors"}
# What one module may import beyond that: its reason to exist.
EXTERNAL_OF = {
    "viewing.heat_map": {"matplotlib"},
    "callbacks.rank_tensor_board": {"tensorboardX"},
    "files.peft": {"h5py"},
    "serving.saved_model": {"tensorflow"},
    "distribution.tf_replicas": {"tensorflow"},
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
    for imported in imports(MODULES["geometry.integrator"]):
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
