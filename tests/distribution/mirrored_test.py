"""The checks of `mirrored.py`, which take a process of their own."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import mirrored
import pytest

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="tf.distribute is of TensorFlow",
)


@pytest.fixture(scope="module")
def results(forked):
    script = pathlib.Path(mirrored.__file__)
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(script.parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", mirrored.CHECKS)
def test_under_a_mirrored_strategy(results, name):
    assert results[name] is None, results[name]
