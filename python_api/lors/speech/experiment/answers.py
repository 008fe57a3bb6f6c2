"""Every answer of an experiment in one small file, from which all scores can be computed again: ``answers.jsonl.xz``.

Lines of JSON, xz-compressed. The first names the stages that answered, each further one is an utterance for a task:

    {"lors": "answers", "stages": ["test-base", "test-lors-s0", ...]}
    {"task": ..., "language": ..., "id": ..., "reference": ..., "speaker": ... or absent, "answers": [one per stage]}

Answers to one utterance differ little, so they lie together. The bytes depend on the contents alone (and on liblzma).
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import LorsError, first_line, shown

__all__ = ["Answers", "Rows", "pack", "read_stage"]

Rows = list[
    dict[str, Any]
]  # task, language, id, reference, hypothesis, speaker where known, in the order of the test set

_ABOUT = ("task", "language", "id", "reference", "speaker")


def read_stage(directory: Path) -> Rows:
    """What a stage answered."""
    return [json.loads(line) for line in (directory / "answers.jsonl").read_text("utf-8").splitlines()]


def pack(stages: Mapping[str, Path]) -> bytes:
    """The file: answers of the stages named ``test-...``, which must have answered the same utterances."""
    names = [name for name in stages if name.startswith("test-")]
    utterances: list[dict[str, Any]] = []
    for name in names:
        rows = read_stage(stages[name])
        if not utterances:
            utterances = [{**_about(row), "answers": []} for row in rows]
        if [_about(row) for row in rows] != [_about(line) for line in utterances]:
            raise LorsError(f"stage {name}: expected answers to the utterances of {names[0]}, it has others")
        for line, row in zip(utterances, rows, strict=True):
            line["answers"].append(row["hypothesis"])
    lines = [{"lors": "answers", "stages": names}, *utterances]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)


def _about(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in _ABOUT if name in row}


@dataclass(frozen=True)
class Answers:
    """The file's contents; `rows` of one stage at a time are made, of what all stages share."""

    stages: list[str]
    utterances: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Answers:
        """LorsError for a file that is not there, or not one of these."""
        try:
            with lzma.open(path, "rt", encoding="utf-8") as stream:
                head, *utterances = (json.loads(line) for line in stream)
            if head["lors"] != "answers" or any(len(u["answers"]) != len(head["stages"]) for u in utterances):
                raise ValueError(f"its lines do not go together, the first is {shown(head)}")
        except FileNotFoundError:
            raise LorsError(
                f"{path}: not there; results from before answers were kept cannot be scored again"
            ) from None
        except (OSError, EOFError, lzma.LZMAError, ValueError, KeyError, TypeError) as error:
            raise LorsError(f"{path}: expected the answers of an experiment: {first_line(error)}") from error
        return cls(head["stages"], utterances)

    def rows(self, stage: str) -> Rows:
        """LorsError when it did not answer."""
        if stage not in self.stages:
            raise LorsError(f"answers: expected those of stage {stage}, there are {', '.join(self.stages)}")
        index = self.stages.index(stage)
        return [{**_about(line), "hypothesis": line["answers"][index]} for line in self.utterances]
