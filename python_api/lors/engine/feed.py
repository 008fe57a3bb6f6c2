"""What a device works on next: read and copied by threads of its own, while what comes before is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from lors_kernels.arrays import is_torch

from ..experts.source import Slot
from .batches import Slice


class Step(NamedTuple):
    pieces: tuple[int, ...]
    part: Slice
    first: bool  # the bases too


class Inputs(NamedTuple):
    """A step's tensors on the device, the copies under way."""

    bases: list[Any]
    tuned: list[list[Any]]  # by matrix and expert; of stored experts their parts
    slots: list[Slot]  # the copies read from them
    uploaded: Any  # event

    def tensors(self) -> Iterator[Any]:
        yield from tensors_in([self.bases, self.tuned])


class GivenUp(Exception):
    """The merge has ended elsewhere."""


class Feed:
    """Inputs of one step after the other, each read and copied while the one before is computed."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        load: Callable[[Step], Inputs | None],
        release: Callable[[Inputs], None],
        steps: Sequence[Step],
    ) -> None:
        self._pool, self._load, self._release, self._steps = pool, load, release, steps
        self._place = {step: number for number, step in enumerate(steps)}
        self._ahead: tuple[Step, Future[Inputs | None]] | None = None

    def ready(self, step: Step) -> Inputs | None:
        """What has been loaded of a step; None: nothing, or there was no room for it. What has been loaded of any other is
        given up: memory ran out, and the order has changed."""
        known, self._ahead = self._ahead, None
        found = known[1].result() if known else None
        if found and known and known[0] != step:
            self._release(found)
            found = None
        return found

    def next(self, step: Step) -> None:
        """Loads what follows on a step."""
        following = self._place.get(step, len(self._steps)) + 1
        if following < len(self._steps):
            step = self._steps[following]
            self._ahead = step, self._pool.submit(self._load, step)


def mapped(change: Callable[[np.ndarray], Any], x: Any) -> Any:
    """`change` of every array in a named tuple of named tuples."""
    if isinstance(x, np.ndarray):
        return change(x)
    return type(x)(*(mapped(change, field) for field in x)) if isinstance(x, tuple) else x


def tensors_in(x: Any) -> Iterator[Any]:
    if is_torch(x):
        yield x
    elif isinstance(x, (list, tuple)):
        for one in x:
            yield from tensors_in(one)
