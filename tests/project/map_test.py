"""Pages that show the way through the code name what is there."""

import pathlib
import re
import runpy

import pytest

pytestmark = pytest.mark.backend_independent("it reads pages and source code")
ROOT = pathlib.Path(__file__).parents[2]
PAGES = [
    ROOT / "CONTRIBUTING.md",
    ROOT / "docs" / "architecture.md",
    ROOT / "docs" / "glossary.md",
]
# `folder/file.py`, and what is in it, in parentheses: (`one`, `another`).
FILE = r"`([\w./]+\.(?:py|md|txt))`"
REFERENCE = re.compile(rf"{FILE}(?:\s+\(((?:`[\w.]+`(?:,\s+)?)+)\))?")


def missing(file, names):
    """Returns what a reference to a file, and to names in it, does not find."""
    places = [ROOT / "keras_geolora" / file, ROOT / file]
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        return [file]
    words = set(re.findall(r"\w+", path.read_text("utf-8")))
    return [f"{n} in {file}" for n in names if not set(n.split(".")) <= words]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_way_leads_somewhere(page):
    nowhere = []
    for file, names in REFERENCE.findall(page.read_text("utf-8")):
        nowhere += missing(file, re.findall(r"`([\w.]+)`", names))
    assert not nowhere


def test_the_picture_shows_the_imports_of_today():
    script = ROOT / "docs" / "images" / "architecture.py"
    drawn = runpy.run_path(str(script))["picture"]()
    shown = script.with_suffix(".svg").read_text("utf-8")
    assert drawn == shown, f"Draw it anew: python {script.relative_to(ROOT)}"
