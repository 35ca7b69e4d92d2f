"""The tests that Keras has for its layers and optimizers pass on ours."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest


@pytest.mark.slow("hundreds of tests of Keras")
@pytest.mark.skipif(
    importlib.util.find_spec("keras.src.layers.core.dense_test") is None,
    reason="this release of Keras was published without its tests",
)
@pytest.mark.parametrize("what, least", [("optimizers", 45), ("layers", 290)])
def test_the_tests_of_keras_pass(forked, what, least):
    script = pathlib.Path(__file__).parents[1] / "keras_own_tests.py"
    run = subprocess.run(
        [sys.executable, str(script), what], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= least
