"""A part of a file, read as a file of its own: what lies in an archive that stores without compression."""

from __future__ import annotations

import io
import os
from typing import BinaryIO

__all__ = ["Extent"]


class Extent(io.RawIOBase):
    """Bytes [start, start + size) of an open file. `at` reads at any place, from any thread; the rest is a stream's."""

    def __init__(self, stream: BinaryIO, start: int = 0, size: int | None = None) -> None:
        self._fd, self.start, self._place = stream.fileno(), start, 0
        self.size = os.fstat(self._fd).st_size - start if size is None else size

    def at(self, offset: int, count: int) -> bytes:
        """At most `count` bytes from `offset` on; fewer only at the end."""
        count = min(count, self.size - offset)
        return os.pread(self._fd, count, self.start + offset) if count > 0 and offset >= 0 else b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        content = self.at(self._place, len(buffer))
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)
