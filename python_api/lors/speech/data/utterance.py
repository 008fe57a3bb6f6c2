"""One recording and what is said in it; tasks; a corpus as a list of utterances."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...errors import LorsError
from .audio import AudioSource

__all__ = ["Corpus", "TASKS", "Utterance", "by_task", "parse_tasks"]

TASKS = ("transcribe", "translate")


@dataclass(frozen=True, slots=True)
class Utterance:
    """One recording, what is said in it, and what that is in English; split and speaker: None where the corpus does not tell."""

    id: str
    audio: AudioSource
    text: str
    translation: str | None
    language: str
    split: str | None = None
    speaker: str | None = None

    def reference(self, task: str) -> str | None:
        """What a perfect model answers."""
        return self.text if task == "transcribe" else self.translation


Corpus = list[Utterance]


def by_task(corpus: Iterable[Utterance], task: str) -> Corpus:
    """The utterances that have a reference for the task."""
    return [utterance for utterance in corpus if utterance.reference(task) is not None]


def parse_tasks(text: str | Iterable[str]) -> tuple[str, ...]:
    """``transcribe,translate`` (or a sequence, or ``both``) -> tasks, in order, without repeats."""
    parts = text.split(",") if isinstance(text, str) else text
    tasks = TASKS if text == "both" else tuple(dict.fromkeys(part.strip() for part in parts))
    for task in tasks:
        if task not in TASKS:
            raise LorsError(f"task: expected transcribe, translate or both, got {task!r}")
    if not tasks:
        raise LorsError("task: expected transcribe, translate or both, got none")
    return tasks
