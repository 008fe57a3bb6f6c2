"""The notebook runs from top to bottom, and what is stored in it came from such a run."""

from __future__ import annotations

from typing import Any

import pytest

import pages
from helpers import module

nbformat = module("nbformat", "docs")
nbclient = module("nbclient", "docs")
module("ipykernel", "docs")
for _name in ("transformers", "accelerate", "soundfile", "soxr", "jiwer"):
    module(_name, "speech")
module("matplotlib", "plot")

NOTEBOOK = pages.ROOT / "examples" / "two-languages.ipynb"


def outputs(notebook: Any) -> list[set[str]]:
    """Kinds of output of every cell of code."""
    kinds = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            kinds.append({kind for out in cell.outputs for kind in out.get("data", {out.get("name", "error"): ""})})
    return kinds


def test_the_notebook_runs_and_shows_what_is_stored_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # of tqdm, about widgets
    stored = nbformat.read(NOTEBOOK, 4)
    fresh = nbformat.read(NOTEBOOK, 4)
    client = nbclient.NotebookClient(
        fresh, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(pages.ROOT)}}
    )
    client.execute()
    assert outputs(fresh) == outputs(stored)
    assert {"stdout", "text/html", "image/png"} <= set().union(*outputs(fresh))
    assert [cell.execution_count for cell in stored.cells if cell.cell_type == "code"] == list(
        range(1, len(outputs(stored)) + 1)
    )
    assert NOTEBOOK.stat().st_size < 500_000
    wer = next(cell.outputs[0].text for cell in fresh.cells if cell.source.startswith("models ="))
    rows = {line[:10].strip(): [float(part) for part in line[10:].split()[1::2]] for line in wer.splitlines()}
    base, merged = rows["tiny"], rows["merged"]
    assert sum(merged) < sum(base), "a merge that is of no use would be a bad example"
