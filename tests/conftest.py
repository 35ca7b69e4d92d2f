"""What all tests share."""

import sys

import forks
import pytest


@pytest.fixture(scope="session")
def forking_python(tmp_path_factory):
    return forks.python(tmp_path_factory.mktemp("forks"))


@pytest.fixture(scope="module")
def forked(forking_python):
    """Whoever starts Python by `sys.executable` gets a fork, see `forks`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", forking_python)
        yield
