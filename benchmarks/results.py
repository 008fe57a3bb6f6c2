"""Result files: one JSON per part, saved after every finished piece, so that an interrupted run can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import BenchmarkError
from .machine import ROOT, describe_machine

RESULTS = ROOT / "benchmarks" / "results"
SCRATCH = ROOT / "bench-data" / "results"  # trial runs: ignored by git, never in the tables
FORMAT = 1


class Results:
    """`{"format", "part", "label", "quick", "machine", "settings", "results": {piece: {...}}}` in one file.

    `record(piece, measure)` calls `measure()` and saves what it returns, unless this file (opened with resume=True)
    already has the piece. Resuming needs the same commit and settings: numbers of two programs never share a file.
    """

    def __init__(
        self,
        part: str,
        *,
        label: str = "",
        quick: bool = False,
        resume: bool = False,
        settings: dict[str, Any] | None = None,
        directory: Path | None = None,
    ) -> None:
        machine = describe_machine()
        self.quick = quick
        home = directory or (SCRATCH if quick else RESULTS)
        self.path = home / f"{part}-{label or machine['date'][:10]}{'-quick' if quick else ''}.json"
        self.data: dict[str, Any] = {
            "format": FORMAT, "part": part, "label": label, "quick": quick,
            "machine": machine, "settings": settings or {}, "results": {},
        }  # fmt: skip
        if resume and self.path.exists():
            self._resume(json.loads(self.path.read_text()))
        if machine["load_average"] > 0.5 * machine["cores"] and not quick:
            print(f"warning: the machine is busy (load {machine['load_average']:.1f}): numbers will be off", flush=True)

    def _resume(self, old: dict[str, Any]) -> None:
        for what, before, now in (
            ("commit", old["machine"]["commit"], self.data["machine"]["commit"]),
            ("settings", old["settings"], json.loads(json.dumps(self.data["settings"]))),
        ):
            if before != now:
                raise BenchmarkError(f"{self.path.name}: cannot resume: expected {what} {before}, got {now}")
        self.data = old

    @property
    def pieces(self) -> dict[str, dict[str, Any]]:
        pieces: dict[str, dict[str, Any]] = self.data["results"]
        return pieces

    def record(self, piece: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The piece, measured now or before. One that fails is filed as {"failed": reason}; the others go on."""
        if piece in self.pieces and "failed" not in self.pieces[piece]:
            print(f"{piece}: already measured", flush=True)
            return self.pieces[piece]
        print(f"{piece}:", flush=True)
        try:
            self.pieces[piece] = measure()
        except BenchmarkError as error:
            print(f"  FAILED: {error}", flush=True)
            self.pieces[piece] = {"failed": str(error)}
        self.save()
        return self.pieces[piece]

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(partial, self.path)


def newest(part: str, directory: Path = RESULTS) -> dict[str, Any] | None:
    """The latest complete (not quick) result of a part, None if there is none."""
    found = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    found = [result for result in found if result.get("part") == part and not result.get("quick")]
    return max(found, key=lambda result: result["machine"]["date"], default=None)
