"""Runs tests of Keras itself on our layers and on wrapped optimizers.

    python tests/keras_own_tests.py optimizers
    python tests/keras_own_tests.py layers

In the tests of optimizers the name of the optimizer stands for
`GeoLoRA(optimizer)`; in those of layers, `Dense` for `GeoLoRADense` without a
rank, and so on. What is left out is listed in `LEFT_OUT` with its reason.
"""

import gc
import importlib
import pathlib
import sys

import keras
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import keras_geolora  # noqa: E402
from keras_geolora import GeoLoRA  # noqa: E402

LAYERS = (
    "Dense",
    "EinsumDense",
    "Embedding",
    "ReversibleEmbedding",
    "Conv1D",
    "Conv2D",
    "Conv3D",
)
LAYER_MODULES = (
    "core.dense_test",
    "core.einsum_dense_test",
    "core.embedding_test",
    "core.reversible_embedding_test",
    "convolutional.conv_test",
)
OPTIMIZERS = {
    "sgd_test": "SGD",
    "adam_test": "Adam",
    "adamw_test": "AdamW",
    "nadam_test": "Nadam",
    "adamax_test": "Adamax",
    "rmsprop_test": "RMSprop",
    "lion_test": "Lion",
    "adagrad_test": "Adagrad",
    "adadelta_test": "Adadelta",
    "adafactor_test": "Adafactor",
    "lamb_test": "Lamb",
    "muon_test": "Muon",
}
EMA = "GeoLoRA refuses `use_ema`"
PRIVATE = "looks at a private method or a slot, which the inner optimizer has"
METHOD = "calls a method of Muon that is not part of `Optimizer`"
LEFT_OUT = {
    "test_ema": EMA,
    "test_ema_overwrite_frequency": EMA,
    "test_clip_norm": PRIVATE,
    "test_clip_value": PRIVATE,
    "SGDTest::test_single_step": "counts the variables of the bare optimizer",
    "NadamTest::test_build_with_empty_var_list": PRIVATE,
    "MuonTest::test_Newton_Schulz": METHOD,
    "MuonTest::test_adamw_single_step": METHOD,
    "MuonTest::test_adamw_weight_decay": METHOD,
    "MuonTest::test_lr_adjust_2d": METHOD,
    "MuonTest::test_lr_adjust_none": METHOD,
    "MuonTest::test_muon_single_step": METHOD,
    "MuonTest::test_muon_weight_decay": METHOD,
    "MuonTest::test_should_use_adamw": METHOD,
}


class Selection:
    """Pytest plugin that leaves tests out, and seeds the others.

    Some of Keras' bounds on errors of random int4 kernels hold for most seeds.
    Keras collects garbage for every layer that it quantizes, which takes as
    long as there are objects to look at: those of other tests are left alone.
    """

    @pytest.fixture(autouse=True)
    def seeded(self):
        keras.utils.set_random_seed(0)
        gc.freeze()

    def pytest_configure(self, config):
        for mark in ("requires_trainable_backend", "multi_device"):
            config.addinivalue_line("markers", f"{mark}: Keras")

    def pytest_collection_modifyitems(self, config, items):
        left_out = [
            item
            for item in items
            if item.name in LEFT_OUT
            or f"{item.parent.name}::{item.name}" in LEFT_OUT
        ]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


class Wrapping(Selection):
    """Pytest plugin that also wraps the optimizer under test."""

    @pytest.fixture(autouse=True)
    def wrapped(self, request, monkeypatch):
        module = request.module
        name = OPTIMIZERS[module.__name__.rsplit(".", 1)[-1]]
        optimizer_class = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *args, **options: GeoLoRA(optimizer_class(*args, **options)),
        )


def replace_layers():
    """Puts our layers in the places of those of Keras."""
    module = importlib.import_module("keras.src.layers")
    for name in LAYERS:
        setattr(module, name, getattr(keras_geolora, f"GeoLoRA{name}"))


def main(what, *options):
    """Runs the tests of Keras' optimizers or layers."""
    if what == "layers":
        replace_layers()
        package, modules, plugin = "layers", LAYER_MODULES, Selection()
    else:
        package, modules, plugin = "optimizers", OPTIMIZERS, Wrapping()
    files = [
        importlib.import_module(f"keras.src.{package}.{module}").__file__
        for module in modules
    ]
    # No settings of ours: they are not those of Keras.
    settings = "-q -W ignore -c /dev/null --rootdir / --tb short"
    settings += " -p no:cacheprovider --import-mode importlib"
    return pytest.main([*settings.split(), *options, *files], plugins=[plugin])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
