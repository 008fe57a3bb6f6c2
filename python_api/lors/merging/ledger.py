"""`lors_ledger.json` in a merged directory: what the model is made of, so that one expert can be added or taken out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ..errors import LorsError
from ..files.directory import OutputDirectory
from ..files.documents import Document
from .card import Input

__all__ = ["LEDGER_FILE", "Ledger", "write_ledger"]

LEDGER_FILE = "lors_ledger.json"
FORMAT = 1


@dataclass(frozen=True)
class Ledger:
    """The inputs of a merged model, in the order in which they were added."""

    base: Input
    experts: tuple[Input, ...]
    edits: int = 0  # adds and removes since the merge

    @classmethod
    def load(cls, directory: Path) -> Ledger:
        path = directory / LEDGER_FILE
        if not path.is_file():
            raise LorsError(f"{directory}: expected a model merged by lors: there is no {LEDGER_FILE} in it")
        file = _File.read(path)
        return cls(file.base, tuple(file.experts), file.edits)


class _File(Document):
    """The ledger as it stands in its file."""

    format: Literal[1]
    base: Input
    experts: Annotated[list[Input], Field(min_length=1)]
    edits: Annotated[int, Field(ge=0, lt=2**53)]


def write_ledger(output: OutputDirectory, base: Input, experts: Sequence[Input], edits: int = 0) -> None:
    """Writes the ledger into a directory that is being written."""
    data = {"format": FORMAT, "base": asdict(base), "experts": [asdict(expert) for expert in experts], "edits": edits}
    output.write_text(LEDGER_FILE, json.dumps(data, indent=2) + "\n")
