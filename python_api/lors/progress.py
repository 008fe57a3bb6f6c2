"""How a command tells what it is doing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import printable

__all__ = ["bar"]


@contextmanager
def bar(label: str, total: int | None = None, *, quiet: bool = False) -> Iterator[Callable[[int, int], None] | None]:
    """On a terminal a progress bar, which what is yielded sets to (done, in all); None elsewhere.

    total: where it is known beforehand, things are counted; else a share is shown.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    shown = MofNCompleteColumn() if total is not None else TaskProgressColumn()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), shown, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(printable(label), total=total)
        yield lambda done, of: progress.update(task, completed=done, total=of)
