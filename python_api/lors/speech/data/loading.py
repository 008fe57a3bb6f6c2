"""Recordings to batches of features, by worker processes ahead of the model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import LorsError
from .audio import duration
from .features import Features, window
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
    """Features of some utterances of a corpus, and a line for each that cannot be read.

    parts: (rows, features [len(rows), bins, frames] float16): those that fit the model's window together, longer ones alone.
    """

    parts: list[tuple[list[int], Tensor]]
    unusable: list[str]


def load_in_order(corpus: Corpus, features: Features, batch_size: int, workers: int) -> Iterator[Loaded]:
    """All utterances in batches of like length, sorted within a few batches that lie together on the disk."""
    from torch.utils.data import DataLoader

    heard, batches = window(features.extractor), list[list[int]]()
    for start in range(0, len(corpus), _WINDOW * batch_size):
        here = range(start, min(start + _WINDOW * batch_size, len(corpus)))
        seconds = {row: _seconds(corpus, row) for row in here}
        order = sorted(here, key=lambda row: (seconds[row], row))
        fitting = [row for row in order if seconds[row] <= heard]
        batches += [fitting[i : i + batch_size] for i in range(0, len(fitting), batch_size)]
        batches += [[row] for row in order[len(fitting) :]]
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
    shortest = min((mel.shape[1] for _, mel in read), default=0)  # headers are not exact: one may be longer after all
    together = [(row, mel) for row, mel in read if mel.shape[1] == shortest]
    groups = [together] * bool(together) + [[one] for one in read if one[1].shape[1] != shortest]
    parts = [([row for row, _ in group], torch.from_numpy(np.stack([mel for _, mel in group]))) for group in groups]
    return Loaded(parts, [said for _, said in items if isinstance(said, str)])
