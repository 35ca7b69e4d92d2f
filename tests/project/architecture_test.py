"""Who may import whom, and how files are called."""

import ast
import pathlib
import sys

import pytest

pytestmark = pytest.mark.backend_independent("it reads source code")
ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "keras_geolora"

# The package from the bottom up. A module imports its own wing and those
# below; the first row is for all, and sees nothing but itself.
WINGS = (
    ("version", "whole_files", "keras_internals"),
    ("adapted_model",),  # what pickles name
    ("geometry",),  # arrays: no layer, no variable
    ("distribution",),  # several devices
    ("layers",),  # they load and predict without an optimizer
    ("optimizer",),
    ("viewing",),
    ("callbacks",),
    ("model",),
    ("files",),
    ("serving",),  # adapter files join what is exported
    ("__main__",),
    ("",),  # the package itself gathers the public names
)

# What anybody may import of other packages.
EXTERNAL = {"keras", "numpy", "safetensors"}
# What one module may import beyond that: its reason to exist.
EXTERNAL_OF = {
    "viewing.heat_map": {"matplotlib"},
    "callbacks.rank_tensor_board": {"tensorboardX"},
    "files.keras_lora": {"h5py"},
    "files.gguf": {"gguf"},
    "serving.bundle": {"tensorflow"},
    "serving.endpoint": {"tensorflow"},
    "serving.saved_model": {"tensorflow"},
    "distribution.tf_replicas": {"tensorflow"},
    "optimizer.precision": {"jax", "torch"},
    "optimizer.retractions": {"jax"},
    "optimizer.traced_once": {"jax", "tensorflow"},
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


def storey(name):
    """The place of a module in `WINGS`, counted from the bottom."""
    wing = name.split(".")[0]
    return next((i for i, names in enumerate(WINGS) if wing in names), None)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_module_has_its_place(name):
    assert storey(name) is not None, (
        f"Add '{name}' to WINGS: which modules may it import?"
    )


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_inside_the_package_point_down(name):
    for imported in internal_imports(MODULES[name]):
        same_wing = imported.split(".")[0] == name.split(".")[0]
        assert same_wing or storey(imported) < storey(name), (
            f"'{name}' may not know '{imported}'"
        )


def test_no_two_modules_import_each_other():
    todo = {
        name: set(internal_imports(path)) - {name, ""}
        for name, path in MODULES.items()
    }
    while todo:
        done = {name for name, needs in todo.items() if not needs & set(todo)}
        assert done, f"a circle of imports among {sorted(todo)}"
        todo = {name: x for name, x in todo.items() if name not in done}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_public_and_backend_neutral_packages_are_imported(name):
    allowed = EXTERNAL | EXTERNAL_OF.get(name, set())
    for imported in imports(MODULES[name]):
        top = imported.split(".")[0]
        assert not within(imported, ["keras.src"]), f"'{imported}' is private"
        assert (
            top in allowed | sys.stdlib_module_names or top == PACKAGE.name
        ), f"'{name}' imports '{imported}'"


INTEGRATOR = ("geometry.integrator", "geometry.decompositions")


@pytest.mark.parametrize("name", INTEGRATOR)
def test_the_integrator_is_made_of_keras_operations_only(name):
    own = [f"{PACKAGE.name}.{part}" for part in INTEGRATOR]
    for imported in imports(MODULES[name]):
        top = imported.split(".")[0]
        public = within(imported, ["keras.ops", *own])
        assert public or top in sys.stdlib_module_names, imported


@pytest.mark.parametrize(
    "name", [name for name in sorted(MODULES) if within(name, ["geometry"])]
)
def test_the_geometry_sees_arrays_only(name):
    allowed = "keras.ops", "numpy", "keras_geolora.geometry"
    for imported in imports(MODULES[name]):
        top = imported.split(".")[0]
        assert within(imported, allowed) or top in sys.stdlib_module_names


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


def private_names(tree):
    """Names of private methods and attributes that classes define."""
    for node in ast.walk(tree):
        name = None
        if isinstance(node, ast.FunctionDef):
            name = node.name
        elif isinstance(node, ast.Attribute) and isinstance(
            node.ctx, ast.Store
        ):
            name = node.attr
        if name and name.startswith("_") and not name.startswith("__"):
            yield name


OWN_PRIVATE = {
    name
    for path in PACKAGE.rglob("*.py")
    if path.name != "keras_internals.py"  # what Keras defines
    for name in private_names(ast.parse(path.read_text("utf-8")))
}


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "examples"])
def test_nobody_outside_uses_what_is_private_here(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in OWN_PRIVATE:
                owner = ast.unparse(node.value)
                assert owner in ("self", "cls", "super()"), (
                    f"{path}:{node.lineno} uses `{ast.unparse(node)}`"
                )
