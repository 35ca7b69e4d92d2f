"""What all tests share: their order, what is left out, and forks.

    pytest                            # every test, on one backend
    pytest --quick                    # without those marked `slow`
    pytest --needs-this-backend       # without `backend_independent` ones

`nox -s tests` gives the last one to all backends but the first, so that what
does not depend on the backend runs once. Each mark says why.
"""

import collections
import gc
import itertools
import pathlib
import sys

import forks
import pytest

# Tests of a file share models, compiled functions and what fixtures make, so
# one process runs them all. Those of these files share nothing that is dear.
APART = {
    "families_test",
    "keras_own_test",
    "drift_test",
    "scenario_test",
    "lives_test",
}
# What takes longest comes first, so that both processes end at the same time.
FIRST = (
    "drift_test",
    "keras_own_test",
    "lives_test",
    "optimizer_test",
    "changes_test",
    "distribution_test",
    "resume_test",
    "groups_test",
    "serving_test",
    "mirrored_test",
    "training_test",
    "tasks_test",
    "layouts_test",
    "export_test",
    "precision_test",
    "seeing_test",
    "documentation_test",
    "oracle_test",
    "adapter_file_test",
    "lifecycle_test",
    "compaction_test",
    "exchange_test",
)
LEFT_OUT_BY = {
    "slow": "--quick",
    "backend_independent": "--needs-this-backend",
}
left_out = pytest.StashKey()


def pytest_addoption(parser):
    for mark, option in LEFT_OUT_BY.items():
        parser.addoption(
            option, action="store_true", help=f"leave out tests marked {mark}"
        )


def pytest_configure(config):
    config.stash[left_out] = collections.Counter()
    for mark, option in LEFT_OUT_BY.items():
        config.addinivalue_line(
            "markers", f"{mark}(reason): left out by `{option}`"
        )


def pytest_collection_modifyitems(config, items):
    kept, others = [], []
    for item in items:
        reason = reason_to_leave_out(item)
        config.stash[left_out][reason] += 1
        (others if reason else kept).append(item)
    del config.stash[left_out][None]
    config.hook.pytest_deselected(items=others)
    items[:] = sorted(kept, key=lambda item: place(item.path.stem))
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = dict(config.stash[left_out])


def reason_to_leave_out(item):
    """Returns the option that leaves a test out and why, or None."""
    for mark, option in LEFT_OUT_BY.items():
        found = item.get_closest_marker(mark)
        if found and item.config.getoption(option):
            (reason,) = found.args
            return f"{option}: {reason}"
    return None


def place(file):
    return FIRST.index(file) if file in FIRST else len(FIRST)


@pytest.hookimpl(optionalhook=True)  # of xdist
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        """Divides the files of `APART`, too, in the order of the tests."""

        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return nodeid if pathlib.Path(file).stem in APART else file

    return Scheduling(config, log)


@pytest.hookimpl(optionalhook=True)  # of xdist
def pytest_testnodedown(node):
    # Every process has collected all tests, so one of them is enough.
    found = getattr(node, "workeroutput", {}).get("left_out", {})
    node.config.stash[left_out] |= collections.Counter(found)


def pytest_terminal_summary(terminalreporter, config):
    for reason, count in sorted(config.stash[left_out].items()):
        terminalreporter.write_line(f"LEFT OUT [{count}] {reason}")


def pytest_collection_finish():
    leave_to_the_end()


@pytest.hookimpl(trylast=True)  # after the fixtures of a file
def pytest_runtest_teardown(item, nextitem):
    if nextitem is None or nextitem.path != item.path:
        leave_to_the_end()


def leave_to_the_end():
    """Has the garbage collector look at younger objects only.

    Imports, and what backends keep of each file, are millions of objects. Keras
    collects garbage for every layer that it quantizes, a second each.
    """
    gc.collect()
    gc.freeze()


# After so many programs JAX gets a new context, since one never forgets the
# constants of its programs.
PROGRAMS_OF_A_CONTEXT = 200


@pytest.fixture(scope="session", autouse=True)
def shared_contexts():
    """Has JAX use a context of MLIR for many programs.

    It makes one for each, with all dialects, which takes half of the time of a
    small program whose compiled form is kept: a quarter of all tests.
    """
    import keras  # not in the process that only hands out tests

    if keras.backend.backend() != "jax":
        yield
        return
    from jax._src.interpreters import mlir

    make, programs, contexts = mlir.make_ir_context, itertools.count(), {}

    def make_now_and_then():
        if next(programs) % PROGRAMS_OF_A_CONTEXT == 0:
            contexts["now"] = make()
        return contexts["now"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlir, "make_ir_context", make_now_and_then)
        yield


@pytest.fixture(scope="session")
def forking_python(tmp_path_factory):
    return forks.python(tmp_path_factory.mktemp("forks"))


@pytest.fixture(scope="module")
def forked(forking_python):
    """Whoever starts Python by `sys.executable` gets a fork, see `forks`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", forking_python)
        yield


@pytest.fixture(scope="module")
def optimized():
    """Has JAX optimize what it compiles, as it does for users.

    `nox -s tests` turns that off, since most programs run a few times only and
    take longer to compile. Long and real trainings run as users see them, but
    for how XLA writes loops (`OLDER_LOOPS` in `noxfile.py`).
    """
    import keras  # not in the process that only hands out tests

    if keras.backend.backend() != "jax":
        yield
        return
    import jax

    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)
