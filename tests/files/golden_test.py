"""Files of earlier versions load, answer as they did, and train on.

Each folder of `golden` holds what one version wrote on one backend, by its
`write.py`. What is there is never written again.
"""

import pathlib
import pickle

import keras
import numpy as np
import pytest
from golden import write

import keras_geolora

FOLDERS = sorted(p.parent for p in write.HERE.glob("*/*/expected.npz"))
SAVED = [kind for kind in write.KINDS if kind != "built_with_rank"]
# Another machine and another backend add in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(
    scope="module",
    params=FOLDERS,
    ids=lambda p: p.relative_to(write.HERE).as_posix(),
)
def folder(request):
    return request.param


@pytest.fixture(scope="module")
def expected(folder):
    with np.load(folder / "expected.npz") as file:
        return dict(file)


def assert_answers(model, expected, name, **tolerance):
    for number, answer in enumerate(write.predictions(model)):
        np.testing.assert_allclose(
            answer, expected[f"{name}/{number}"], **(tolerance or CLOSE)
        )


def test_every_backend_has_written():
    backends = {path.name for path in FOLDERS}
    assert backends == {"tensorflow", "jax", "torch"}


# A file from JAX says `jit_compile=True`, and the compiler of torch warns.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method")
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>")
@pytest.mark.parametrize("kind", write.KINDS)
def test_a_keras_file_loads_and_trains_on(folder, expected, kind):
    model = keras.saving.load_model(folder / f"{kind}.keras")
    assert_answers(model, expected, kind)
    if folder.name == keras.backend.backend():  # of another, dropout differs
        write.train(model)
        name = f"{kind}, trained on"
        assert_answers(model, expected, name, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", SAVED)
def test_an_adapter_file_loads(folder, expected, kind):
    model = write.pretrained(kind)
    model.load_geolora(folder / f"{kind}.safetensors")
    assert_answers(model, expected, kind)


def test_weights_load(folder, expected):
    model = keras.saving.load_model(folder / "dense.keras")
    for variable in model.trainable_variables:
        variable.assign(0 * variable)
    model.load_weights(folder / "dense.weights.h5")
    assert_answers(model, expected, "dense")


def test_a_pickle_loads(folder, expected):
    model = pickle.loads((folder / "dense.pickle").read_bytes())
    assert_answers(model, expected, "dense")
    assert model.geolora_adapters() == ["second", "default"]


def test_an_adapter_of_peft_loads(folder, expected):
    model = write.pretrained("hub")
    keras_geolora.import_peft(model, folder / "peft")
    assert_answers(model, expected, "hub")


@pytest.mark.parametrize("name", ["quantized", "merged"])
def test_a_model_loads(folder, expected, name):
    model = keras.saving.load_model(folder / f"{name}.keras")
    # Rounding to eight bits makes a step of a rounding error.
    tolerance = {"atol": 0.02} if name == "quantized" else CLOSE
    assert_answers(model, expected, name, **tolerance)


def test_golden_files_stay_small():
    for folder in FOLDERS:
        files = [p for p in pathlib.Path(folder).rglob("*") if p.is_file()]
        assert sum(p.stat().st_size for p in files) < 1e6
