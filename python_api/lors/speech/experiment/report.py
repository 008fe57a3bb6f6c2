"""What an experiment leaves: a page, results, answers, tables; and its tables on a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import LorsError, first_line, print_lines, printable
from ...files.file import write_file
from ...files.replaceable import ANSWERS_XZ, COMPARISONS, CSV, PAGE, RESULTS, TEX, FileKind, require_file
from .answers import Answers, pack
from .config import Config
from .page import page
from .results import summarise, summarise_again
from .shown import UNIT, task_table, verdicts
from .tables import comparisons_csv, latex, scores_csv

__all__ = ["FILES", "print_tables", "score_again", "wide_console", "write_report"]

FILES: dict[str, FileKind] = {
    "results.json": RESULTS, "report.html": PAGE, "answers.jsonl.xz": ANSWERS_XZ, "scores.csv": CSV,
    "comparisons.csv": COMPARISONS, "tables.tex": TEX,
}  # fmt: skip


def write_report(config: Config, root: Path, stages: Mapping[str, Path]) -> Path:
    """Writes FILES into `root` and returns the page."""
    return _write(root, summarise(config, stages), pack(stages))


def score_again(source: Path, out: Path) -> Path:
    """FILES in `out` from ``results.json`` and ``answers.jsonl.xz`` in `source`, scored anew; returns the page.

    LorsError, before anything is written, where one of them is not there or not what it should be.
    """
    for name, kind in FILES.items():
        require_file(out / name, kind, force=True)
    answers = Answers.read(source / "answers.jsonl.xz")
    try:
        results = json.loads((source / "results.json").read_text("utf-8"))
        summary = summarise_again(results, answers)
    except OSError as error:
        raise LorsError(f"cannot read {error.filename}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise LorsError(f"{source / 'results.json'}: expected results of an experiment: {first_line(error)}") from error
    return _write(out, summary, (source / "answers.jsonl.xz").read_bytes())


def _write(root: Path, summary: Mapping[str, Any], answers: bytes) -> Path:
    results = {"lors": "experiment", **summary}
    contents: dict[str, str | bytes] = {
        "results.json": json.dumps(results, indent=1, ensure_ascii=False) + "\n",
        "answers.jsonl.xz": answers,
        "scores.csv": scores_csv(results),
        "comparisons.csv": comparisons_csv(results),
        "tables.tex": latex(results),
        "report.html": page(results),
    }
    for name, content in contents.items():
        write_file(root / name, content, FILES[name])
    return root / "report.html"


# -------------------------------------------------------------------------------------------------------- terminal


def wide_console() -> Any:
    """A console for tables of names: it takes them for text, and does not cut ten languages where it is no terminal."""
    import sys

    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False, highlight=False)


def print_tables(root: Path) -> None:
    """The test tables of a finished experiment."""
    from rich.table import Table

    results = json.loads((root / "results.json").read_text("utf-8"))
    console = wide_console()
    for task in results["config"]["tasks"]:
        header, *rows = task_table(results, task)
        table = Table(*header, box=None, title=f"{task}: {UNIT[task]}", title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*map(printable, row))
        console.print(table)
    for line in verdicts(results):
        print_lines(line)
