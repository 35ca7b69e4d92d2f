"""The tests that Keras has for its layers and optimizers pass on ours."""

import pathlib
import re
import subprocess
import sys

import pytest


@pytest.mark.slow("hundreds of tests of Keras")
@pytest.mark.parametrize("what, least", [("optimizers", 45), ("layers", 290)])
def test_the_tests_of_keras_pass(forked, what, least):
    script = pathlib.Path(__file__).parents[1] / "keras_own_tests.py"
    run = subprocess.run(
        [sys.executable, str(script), what], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= least
