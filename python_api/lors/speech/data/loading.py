"""Recordings to batches of features, by worker processes ahead of the model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import LorsError
from .audio import duration
from .features import Features
from .utterance import Corpus

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Loaded", "load_in_order", "workers_for"]

_MOST_WORKERS = 8
_WINDOW = 8  # batches


def workers_for(device: str) -> int:
    """Processes beside this one: none where the model takes the same cores."""
    return 0 if device == "cpu" else min(_MOST_WORKERS, os.cpu_count() or 1)


@dataclass(frozen=True, slots=True)
class Loaded:
    """Features of some utterances of a corpus, and a line for each that cannot be read."""

    rows: list[int]
    mel: Tensor  # [len(rows), bins, frames] float16
    unusable: list[str]


def load_in_order(corpus: Corpus, features: Features, batch_size: int, workers: int) -> Iterator[Loaded]:
    """All utterances in batches of like length, sorted within a few batches that lie together on the disk."""
    from torch.utils.data import DataLoader

    window, batches = _WINDOW * batch_size, list[list[int]]()
    for start in range(0, len(corpus), window):
        here = range(start, min(start + window, len(corpus)))
        order = sorted(here, key=lambda row: (_seconds(corpus, row), row))
        batches += [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    recordings: Any = _Recordings(corpus, features)  # anything with __getitem__ will do
    yield from DataLoader(recordings, batch_sampler=batches, num_workers=workers, collate_fn=_collate)


def _seconds(corpus: Corpus, row: int) -> float:
    try:
        return duration(corpus[row].audio)
    except LorsError:
        return 0.0  # its turn comes, with the same error


@dataclass(frozen=True, slots=True)
class _Recordings:
    corpus: Corpus
    features: Features

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, row: int) -> Any:
        try:
            return row, self.features.of(self.corpus[row].audio)
        except LorsError as error:
            return row, str(error)


def _collate(items: Sequence[Any]) -> Loaded:
    import numpy as np
    import torch

    read = [(row, mel) for row, mel in items if not isinstance(mel, str)]
    mel = torch.from_numpy(np.stack([mel for _, mel in read])) if read else torch.empty(0)
    return Loaded([row for row, _ in read], mel, [said for _, said in items if isinstance(said, str)])
