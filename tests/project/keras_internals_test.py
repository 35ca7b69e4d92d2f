"""What this library asks of Keras in private is still there.

If a test here fails after an update of Keras, the message names what has
moved; `keras_geolora/keras_internals.py` is the one place to mend.
"""

import ast
import pathlib

import keras
import pytest

import keras_geolora
from keras_geolora import keras_internals

PACKAGE = pathlib.Path(keras_geolora.__file__).parent
OF_OTHERS = {f"layer on {name}" for name in ("torch", "tensorflow", "jax")} - {
    f"layer on {keras.backend.backend()}"
}
NAMES = [
    pytest.param(owner, name, why, id=f"{owner}-{name}")
    for owner, names in keras_internals.PRIVATE.items()
    if owner not in OF_OTHERS
    for name, why in names.items()
]


@pytest.fixture(scope="module")
def owners():
    layer = keras.layers.Dense(2)
    plain = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    compiled = keras.Sequential([keras.Input((3,)), layer])
    compiled.compile("sgd", "mse")
    compiled.make_train_function()
    with keras.device("cpu"):
        adam = keras.optimizers.Adam()
        adam.build(compiled.trainable_variables)
        sgd = keras.optimizers.SGD(gradient_accumulation_steps=2)
        sgd.build(compiled.trainable_variables)
    return {
        "layer": layer,
        "layer on torch": layer,
        "layer on tensorflow": layer,
        "tensor": compiled.outputs[0],
        "variable": layer.kernel,
        "model": plain,
        "compiled model": compiled,
        "optimizer": adam,
        "accumulating optimizer": sgd,
    }


@pytest.mark.parametrize("owner, name, why", NAMES)
def test_keras_has_a_private_name(owners, owner, name, why):
    assert hasattr(owners[owner], name), (
        f"Keras {keras.__version__} has no `{name}` on a {owner} any more; "
        f"keras_internals.py needs it for this: {why}."
    )


def test_a_model_is_before_compile_as_we_restore_it():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    for name, value in keras_internals.BEFORE_COMPILE.items():
        assert getattr(model, name) == value, name
    for name in keras_internals.SINCE_COMPILE:
        assert name not in vars(model), name


@pytest.mark.backend_independent("it reads source code")
def test_private_names_of_others_are_in_one_file():
    trees = {
        path: ast.parse(path.read_text("utf-8"))
        for path in PACKAGE.rglob("*.py")
    }
    nodes = [(p, node) for p, tree in trees.items() for node in ast.walk(tree)]
    ours = {"_replace", "_fields"}  # of named tuples, public
    for _, node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            ours.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(
            node.ctx, ast.Store
        ):
            ours.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            ours.add(node.id)
    for owner in keras_internals.PRIVATE.values():
        ours -= set(owner)
    theirs = [
        f"{path.name}:{node.lineno}: {node.attr}"
        for path, node in nodes
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and node.attr not in ours
        and path.name != "keras_internals.py"
    ]
    assert not theirs
