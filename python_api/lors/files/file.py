"""A file that appears complete or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from ..errors import LorsError
from .directory import OutputDirectory, note
from .replaceable import FileKind, require_file
from .writing import sync, writing

__all__ = ["OutputFile", "write_file"]


class OutputFile:
    """A file that appears complete or not at all: write to `path`, then :meth:`commit`.

    Args:
        target: the file. A symbolic link is followed.
        kind: what `force` may replace (`replaceable`).
        inputs: files that are read.
    """

    def __init__(
        self, target: str | os.PathLike[str], kind: FileKind, *, force: bool = False, inputs: Iterable[Path] = ()
    ) -> None:
        self.target = Path(os.path.realpath(os.path.expanduser(target)))
        self._kind, self._force = kind, force
        require_file(self.target, kind, force)
        for file in inputs:
            if self.target.exists() and self.target.samefile(file):
                raise LorsError(f"{self.target}: the output would replace the input")
        # Never committed: only its file is kept. A killed run's goes as any other debris.
        self._folder = OutputDirectory(self.target.with_name(f"{self.target.name}.writing"))
        self.path = self._folder.path / "new.safetensors"

    def __enter__(self) -> OutputFile:
        self._folder.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.__exit__(kind, error, trace)

    def write_text(self, text: str) -> None:
        """Writes UTF-8 text; LorsError when that fails."""
        self.write_bytes(text.encode())

    def write_bytes(self, content: bytes) -> None:
        """LorsError when that fails."""
        with writing(self.target):
            self.path.write_bytes(content)

    def commit(self) -> None:
        """Makes the file visible as the target, atomically."""
        with writing(self.target):
            sync(self.path)
            require_file(self.target, self._kind, self._force)
            if self._force:
                os.replace(self.path, self.target)
            else:
                _rename_new(self.path, self.target)
        try:
            sync(self.target.parent)
        except OSError as error:
            note(f"{self.target}: is in place, but may not survive a power failure: {error.strerror or error}")


def write_file(path: Path, content: str | bytes, kind: FileKind) -> None:
    """Writes a file in one step (text as UTF-8), over one of its kind if there is one; LorsError otherwise."""
    with OutputFile(path, kind, force=True) as file:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        file.commit()


def _rename_new(source: Path, target: Path) -> None:
    """Renames, unless there is something by now."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise LorsError(f"{target}: exists already; --force replaces it") from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        os.replace(source, target)  # a file system without hard links
