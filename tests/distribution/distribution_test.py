"""A training on several replicas is the training on one."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks/distributed.py"
# Engine and number of replicas.
ENGINES = {
    "torch": [("ddp", 2)],
    "jax": [("data_parallel", 8), ("model_parallel", 2), ("multi_process", 2)],
    "tensorflow": [("mirrored", 2), ("multi_worker", 2)],
}[keras.backend.backend()]
EVERY_ENGINE = pytest.mark.parametrize("engine, replicas", ENGINES)
# Those that keep a whole model on every device, and others.
PARTS = [pair for pair in ENGINES if pair[0] == "model_parallel"]
WHOLE = [pair for pair in ENGINES if pair not in PARTS]
SCALED = ("--accumulate", "2", "--loss-scale")
LIMIT = 240  # seconds
slow = pytest.mark.slow("trains in processes of its own")


class Training:
    """What a training wrote."""

    def __init__(self, folder):
        self.replicas = {}
        for file in sorted(folder.glob("replica-*.npz")):
            with np.load(file) as arrays:
                self.replicas[file.stem] = dict(arrays)
        self.processes = [
            json.loads(file.read_text()) for file in folder.glob("process-*")
        ]

    def deltas(self):
        """Returns what does not depend on signs of singular vectors."""
        found = next(iter(self.replicas.values()))
        deltas = {}
        for path, array in found.items():
            if path.startswith("optimizer/"):
                continue
            if path.endswith("/U"):
                S, V = found[path[:-1] + "S"], found[path[:-1] + "V"]
                deltas[path] = array @ S @ V.T
            elif not path.endswith(("/S", "/V")):
                deltas[path] = array
        return deltas


@pytest.fixture(scope="module")
def run(tmp_path_factory, forked):
    """Runs a training in processes of its own, once for equal options."""
    found = {}
    environment = {
        # All compile nearly the same: JAX does it once.
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        **os.environ,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(SCRIPT.parents[1]),
    }

    def run_once(engine, replicas, *options):
        key = (engine, replicas, *map(str, options))
        if key not in found:
            folder = tmp_path_factory.mktemp("training")
            command = [sys.executable, SCRIPT, "--engine", engine]
            command += ["--replicas", str(replicas), "--out", folder]
            command += ["--limit", str(LIMIT), *options]
            done = subprocess.run(
                list(map(str, command)),
                env=environment,
                capture_output=True,
                text=True,
                timeout=LIMIT + 30,
            )
            assert done.returncode == 0, done.stderr[-4000:]
            found[key] = Training(folder)
        return found[key]

    return run_once


def assert_same(one, other, tolerance=1e-4):
    one, other = one.deltas(), other.deltas()
    assert one.keys() == other.keys()
    assert any(path.endswith("/U") for path in one)
    for path, delta in one.items():
        error = np.linalg.norm(other[path] - delta)
        assert error <= tolerance * np.linalg.norm(delta), path


def assert_replicas_agree(training, count):
    assert len(training.replicas) == count
    first, *others = training.replicas.values()
    for other in others:
        assert first.keys() == other.keys()
        for path, array in first.items():
            assert array.tobytes() == other[path].tobytes(), path
    ranks = [process["ranks"] for process in training.processes]
    assert all(found == ranks[0] for found in ranks)


@pytest.mark.backend_independent("it watches processes of any kind")
def test_no_process_waits_for_one_that_failed():
    spec = importlib.util.spec_from_file_location("distributed", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sources = ("import time; time.sleep(60)", "raise SystemExit(3)")
    running = [subprocess.Popen([sys.executable, "-c", x]) for x in sources]
    try:
        with pytest.raises(SystemExit, match="Process 1 ended with code 3"):
            script.wait_for_all(running, limit=30)
    finally:
        for process in running:
            process.kill()
            process.wait()


@slow
@EVERY_ENGINE
@pytest.mark.parametrize("options", [(), SCALED], ids=["plain", "scaled"])
def test_several_replicas_train_as_one(run, engine, replicas, options):
    spread = run(engine, replicas, "--steps", "50", *options)
    assert_same(run("single", 1, "--steps", "50", *options), spread)
    assert_replicas_agree(spread, replicas)


@slow
@EVERY_ENGINE
def test_replicas_stay_bit_identical(run, engine, replicas):
    options = ("--steps", "200", "--budget", "12")
    training = run(engine, replicas, *options)
    assert_replicas_agree(training, replicas)
    assert sum(training.processes[0]["ranks"]) <= 12


@slow
@EVERY_ENGINE
def test_all_replicas_skip_what_one_cannot_take(run, engine, replicas):
    # Where a direction joins, rounding is magnified for a few steps: compare
    # where others do.
    options = ("--steps", "50", "--poison", "5")
    training = run(engine, replicas, *options)
    assert_replicas_agree(training, replicas)
    for process in training.processes:
        assert process["skipped_steps"] == 1
    for arrays in training.replicas.values():
        assert all(np.isfinite(array).all() for array in arrays.values())
    assert_same(run("single", 1, *options), training)


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory):
    """The first half of a training on one replica, as a file."""
    file = tmp_path_factory.mktemp("saved") / "model.keras"
    run("single", 1, "--steps", "25", "--save", file)
    return file


REST = ("--steps", "25", "--first-step", "25", "--load")


@slow
@EVERY_ENGINE
def test_training_resumes_on_one_replica(
    run, engine, replicas, saved, tmp_path
):
    file = tmp_path / "model.keras"
    run(engine, replicas, "--steps", "25", "--save", file)
    resumed = run("single", 1, *REST, file)
    assert_same(run("single", 1, *REST, saved), resumed)


@slow
@EVERY_ENGINE
def test_training_of_one_resumes_on_several(run, engine, replicas, saved):
    resumed = run(engine, replicas, *REST, saved)
    assert_replicas_agree(resumed, replicas)
    assert_same(run("single", 1, *REST, saved), resumed)


@slow
@pytest.mark.parametrize("engine, replicas", WHOLE)
def test_replicas_exchange_gradients_of_factors_only(run, engine, replicas):
    training = run(engine, replicas, "--steps", "2", "--count")
    sizes = training.processes[0]["exchanged"]
    factors = 4 * (8 * (12 + 32) + 2 * 8 * (32 + 32))
    cores = 4 * 3 * 8 * 8  # whose gradients follow from those of U
    plain = 4 * (32 * 4 + 4)
    assert factors + plain <= sum(sizes)
    assert sum(sizes) <= 1.01 * (factors + cores + plain) + 64


@slow
@pytest.mark.parametrize("batch", [16, 32])  # without and with merged kernels
@pytest.mark.parametrize("engine, replicas", PARTS)
def test_parts_of_a_model_exchange_no_kernel(run, engine, replicas, batch):
    options = ("--steps", "2", "--width", "64", "--batch", batch, "--count")
    sizes = run(engine, replicas, *options).processes[0]["exchanged"]
    # Activations, factors and small matrices, but neither a kernel nor an
    # update, of which the largest are square.
    assert 0 < max(sizes) < 4 * 64 * 64 / 2
