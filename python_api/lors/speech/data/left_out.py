"""What of a corpus is not used, and why: recordings that are too long, rows and recordings that cannot be read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ...errors import LorsError

__all__ = ["SHARE", "LeftOut"]

SHARE = 0.01  # of rows and recordings, that a command goes without unless told otherwise


@dataclass(slots=True)
class LeftOut:
    """Counts and lists it; LorsError once more than a `share` of all is unusable. 0: at the first.

    Where there are fewer than 1 / share, the first is one too many.
    """

    share: float = 0.0
    longer: int = 0  # recordings than `max_seconds`
    unusable: list[str] = field(default_factory=list)  # a line for each row or recording that cannot be read
    accepted: int = 0  # so many of these were few enough of what they stood among: rows are not held against recordings

    @contextmanager
    def unless_unusable(self) -> Iterator[None]:
        """A LorsError in the block is listed; the caller goes on without what it was about."""
        try:
            yield
        except LorsError as error:
            if self.share == 0:
                raise
            self.note([str(error)])

    def note(self, lines: Iterable[str]) -> None:
        """As if each had been met in `unless_unusable`; a line that is there already is the same recording again."""
        for line in lines:
            if self.share == 0:
                raise LorsError(line)
            if line not in self.unusable:
                self.unusable.append(line)

    def require_few(self, name: str, total: int) -> None:
        """LorsError when more than the share of `total` rows or recordings is unusable."""
        found = len(self.unusable) - self.accepted
        if found > self.share * total:
            raise LorsError(
                f"{name}: expected at most {100 * self.share:g} % of {total} rows and recordings that cannot be used, "
                f"got {found}; the first: {self.unusable[self.accepted]}"
            )

    def accept(self) -> None:
        """What comes is counted against another total."""
        self.accepted = len(self.unusable)

    def told(self) -> str:
        """A line for people; empty where nothing was left out."""
        parts = []
        if self.longer:
            parts.append(f"{self.longer} recordings too long")
        if self.unusable:
            parts.append(f"{len(self.unusable)} unusable, the first: {self.unusable[0]}")
        return f"left out: {'; '.join(parts)}" if parts else ""
