"""The tables on pages are those that the benchmarks print from their rows."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# Of the other scripts, pages show a part, or rows are sorted by hand.
SCRIPTS = [
    "compaction",
    "decompositions",
    "distant_task",
    "few_rows",
    "generation",
    "language",
    "large_model",
    "learning_rates",
    "starting_rank",
    "train_step",
]


@pytest.mark.backend_independent("rows are read, nothing is computed")
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_row_that_is_printed_is_on_a_page(name):
    script = ROOT / "benchmarks" / f"{name}.py"
    command = [sys.executable, str(script), "table"]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert printed.returncode == 0, printed.stderr
    lines = [x for x in printed.stdout.splitlines() if x.startswith("|")]
    assert len(lines) > 2
    pages = [p.read_text("utf-8") for p in (ROOT / "docs").glob("*.md")]
    shown = {line for page in pages for line in page.splitlines()}
    rows = [x for x in lines if set(x) - set("|- ")]
    assert [row for row in rows if row not in shown] == []
