"""Runs the optimizer tests of Keras itself with every optimizer wrapped.

    python tests/keras_own_tests.py

In every module the name of the optimizer under test stands for
`GeoLoRA(optimizer)`. What is left out is listed in `LEFT_OUT` with its reason.
"""

import importlib
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from keras_geolora import GeoLoRA  # noqa: E402

MODULES = {
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


class Wrapping:
    """Pytest plugin that wraps the optimizer under test."""

    def pytest_configure(self, config):
        config.addinivalue_line("markers", "requires_trainable_backend: Keras")

    def pytest_collection_modifyitems(self, config, items):
        left_out = [
            item
            for item in items
            if item.name in LEFT_OUT
            or f"{item.parent.name}::{item.name}" in LEFT_OUT
        ]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]

    @pytest.fixture(autouse=True)
    def wrapped(self, request, monkeypatch):
        module = request.module
        name = MODULES[module.__name__.rsplit(".", 1)[-1]]
        optimizer_class = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *args, **options: GeoLoRA(optimizer_class(*args, **options)),
        )


if __name__ == "__main__":
    files = [
        importlib.import_module(f"keras.src.optimizers.{module}").__file__
        for module in MODULES
    ]
    # No settings of ours: they are not those of Keras.
    options = [
        "-q",
        "-W",
        "ignore",
        "-c",
        "/dev/null",
        "--rootdir",
        "/",
        "--tb",
        "short",
    ]
    options += ["-p", "no:cacheprovider", "--import-mode", "importlib"]
    sys.exit(pytest.main([*options, *files], plugins=[Wrapping()]))
