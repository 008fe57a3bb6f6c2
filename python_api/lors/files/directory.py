"""A directory that appears complete or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from ..errors import LorsError, LorsWarning
from .carry import Seen, carry, dress, unseen
from .lock import Lock
from .replaceable import MODEL, Kind, foreign, objection
from .syscalls import exchange
from .writing import require_space, sync, writing

__all__ = ["OutputDirectory"]

RECIPE_FILE = "lors_recipe.yml"

_DEBRIS = re.compile(r"\.(?P<owner>.+)\.lors-\d+-[0-9a-f]{8}\.(?:tmp|old)", re.DOTALL)
_PACKAGE = Path(os.path.realpath(__file__)).parents[1]
_PATIENCE = 1.0  # seconds: a run that starts beside a target holds its lock while it removes a killed run's files


# -------------------------------------------------------------------------------------------------------- errors


def note(text: str) -> None:
    """What the user should know of a result that is in place all the same; a LorsWarning."""
    warnings.warn(LorsWarning(text), stacklevel=3)


# ----------------------------------------------------------------------------------------------------- directory


class OutputDirectory:
    """A directory that becomes visible in one step, complete.

    ::

        with OutputDirectory("merged", inputs=[...]) as out:
            ...  # write into out.path, a temporary sibling `.merged.lors-PID-RANDOM.tmp`
            out.commit()

    Leaving the block without :meth:`commit`, for whatever reason, removes everything. A reader of the target sees the
    old state or the new one. Two runs with one target: the second is told so. What a killed run left behind is removed
    by the next run beside it: a lock (`.merged.lors.lock`, gone after the run) tells the dead from the living. What
    cannot be done after the commit (a disk that does not confirm, an old directory that cannot be removed) is a
    LorsWarning: the new one is in place.

    Args:
        path: the target. Missing parents are made. A symbolic link is followed: what it points to is replaced.
        force: replace a directory in which there is nothing but a checkpoint, or what `kind` says (`replaceable`). Needs
            room for both until the commit. An empty one is always replaced.
        keep: the target is changed in place: all that is in it and is not written anew stays (:meth:`outdated`).
        inputs: every file and directory that is read; the target must not contain, or be inside, any of them.
        durable: commit survives a power failure (fsync of every file and directory).

    Raises LorsError on construction, before anything is touched, when the target cannot be used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        force: bool = False,
        keep: bool = False,
        inputs: Iterable[str | os.PathLike[str]] = (),
        durable: bool = True,
        kind: Kind = MODEL,
    ) -> None:
        self.target = Path(os.path.realpath(os.path.expanduser(path)))
        self._force, self._keep, self._durable, self._kind = force, keep, durable, kind
        self._inputs = [Path(os.path.realpath(input)) for input in inputs]
        self._left: set[str] = set()  # with `keep`: names that are not carried over
        self._carried: Seen = {}
        self._lock: Lock | None = None
        self._made: list[Path] = []
        self._own: os.stat_result | None = None  # of the new directory, under whichever name
        self._committed = False
        self._check()
        token = f"{os.getpid()}-{secrets.token_hex(4)}"
        self.path = self.target.with_name(f".{self.target.name}.lors-{token}.tmp")
        self._aside = self.path.with_suffix(".old")  # for the old one, where two names cannot be swapped

    # -------------------------------------------------------------------------------------------------- checks

    def _check(self) -> None:
        target = self.target
        if target == Path(target.anchor):
            raise LorsError(f"{target}: expected a directory to write, got the root of the file system")
        if _PACKAGE in (target, *target.parents):
            raise LorsError(f"{target}: the output must not be inside {_PACKAGE}, where lors itself is installed")
        for input in self._inputs:
            if target == input or target in input.parents:
                raise LorsError(f"{target}: the output would replace the input {input}")
            if input in target.parents:
                raise LorsError(f"{target}: the output must not be inside the input {input}")
        if os.path.lexists(target):
            with writing(target):
                self._check_replaceable()
        ancestor = next(parent for parent in target.parents if parent.exists())
        if not ancestor.is_dir():
            raise LorsError(f"{target}: {ancestor} is not a directory")
        if not os.access(ancestor, os.W_OK | os.X_OK):
            raise LorsError(f"{target}: the directory {ancestor} is not writable")

    def _check_replaceable(self) -> None:
        target = self.target
        if not target.is_dir():
            raise LorsError(
                f"{target}: expected a directory to write, it is {'a file' if target.is_file() else 'none'}"
            )
        if os.listdir(target) and not self._keep:
            if not self._force:
                raise LorsError(f"{target}: exists already; --force replaces it")
            if reason := objection(target, self._kind):
                raise LorsError(f"{target}: {reason}")
        here = Path(os.path.realpath("."))
        if here == target or target in here.parents:
            raise LorsError(f"{target}: cannot be replaced while it is, or contains, the current directory")
        if os.path.ismount(target):
            raise LorsError(f"{target}: is a mount point and cannot be replaced; write to a directory in it")

    def require_space(self, needed: int) -> None:
        """LorsError unless `needed` bytes are free."""
        require_space(self.target, needed)

    # --------------------------------------------------------------------------------------------------- block

    def __enter__(self) -> OutputDirectory:
        try:
            with writing(self.target):
                self._make_parents()
                lock = _lock_path(self.target)
                self._lock = Lock.acquire(lock, _PATIENCE)
                if self._lock is None:
                    raise LorsError(f"{self.target}: another run is writing to it{_or_was_killed(Lock.taken(lock))}")
                _sweep(self.target.parent, self.target.name)
                self._check()  # another run may have finished in between
                self.path.mkdir()
                self._own = self.path.stat()
        except BaseException:
            self._clean()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._clean()
        except (KeyboardInterrupt, SystemExit):  # an impatient second Ctrl-C must not leave half of it behind
            self._clean()
            raise

    def _make_parents(self) -> None:
        for parent in reversed(self.target.parents):
            with contextlib.suppress(FileExistsError):
                parent.mkdir()
                self._made.append(parent)

    def _clean(self) -> None:
        if self._lock is not None:
            try:
                self._discard()
            except OSError as error:
                note(f"{self.path}: could not be removed and may be deleted: {error.strerror or error}")
            try:
                self._lock.release()
            except OSError as error:
                note(f"{_lock_path(self.target)}: could not be removed and may be deleted: {error.strerror or error}")
            self._lock = None
        if not self._committed:
            self._remove_parents()

    def _discard(self) -> None:
        """Removes what stands under the temporary names: the new directory, or after the commit the old one.

        An old one that holds what came into it meanwhile stays, under a name of its own.
        """
        for path in (self.path, self._aside):
            if not os.path.lexists(path) or (path == self._aside and not os.path.lexists(self.target)):
                continue  # nothing there, or the old one, which the next run puts back
            replaced = self._own is not None and not os.path.samestat(path.lstat(), self._own)
            if not replaced or not (newcomer := self._newcomer(path)):
                _remove_tree(path)
                continue
            kept = self.target.with_name(f"{self.target.name}.{secrets.token_hex(4)}.old")
            path.rename(kept)
            note(f"{self.target}: {newcomer} came into it while it was replaced; the old directory is kept: {kept}")

    def _newcomer(self, old: Path) -> str | None:
        return unseen(old, self.target, self._carried, self._left) if self._keep else foreign(old, self._kind)

    def _remove_parents(self) -> None:
        with contextlib.suppress(OSError):  # somebody else uses them by now: theirs to keep
            while self._made:
                self._made.pop().rmdir()

    # ------------------------------------------------------------------------------------------------- content

    def copy(self, source: Path, name: str | None = None) -> None:
        """Copies a file's content (not its mode) into the directory; LorsError when that fails."""
        with writing(self.path / (name or source.name)):
            shutil.copyfile(source, self.path / (name or source.name))

    def write_text(self, name: str, text: str) -> None:
        """Writes a UTF-8 text file into the directory; LorsError when that fails."""
        with writing(self.path / name):
            (self.path / name).write_text(text, encoding="utf-8")

    def outdated(self, names: Iterable[str]) -> None:
        """Files at the top of the target that are not kept, beside those that are written anew."""
        self._left.update(names)

    def commit(self) -> None:
        """Makes the directory visible as the target, atomically; then removes what it replaced.

        Where the file system cannot swap two names in one step (some network file systems), the old directory is
        renamed away before the new one takes its name: for that moment there is none, and a run killed there leaves
        the old one under `.NAME.lors-PID-RANDOM.old`, which the next run puts back.
        """
        with writing(self.target):
            if self._durable:
                _sync_tree(self.path)
            if self.target.is_dir():
                self._dress()
            if (self._force or self._keep) and self.target.is_dir():
                self._replace()
            else:
                self.path.rename(self.target)
        self._committed = True
        self._give_back()
        if self._durable:
            self._confirm()

    def _dress(self) -> None:
        """What the target has beside its content; and with `keep`, the content too."""
        if self._keep:
            self._left.update(os.listdir(self.path))
            self._carried = carry(self.target, self.path, self._left)
            if self._durable:
                for name in [name for name, told in self._carried.items() if not told]:
                    sync(self.path / name)
        dress(self.path, self.target)
        os.utime(self.path)
        if self._durable:
            sync(self.path)

    def _replace(self) -> None:
        # The old directory is then self.path or self._aside, and leaving the block removes it as it would the new one.
        if exchange(self.path, self.target):
            return
        self.target.rename(self._aside)
        try:
            self.path.rename(self.target)
        except BaseException as error:
            try:
                self._aside.rename(self.target)
            except OSError:
                raise LorsError(
                    f"cannot write {self.target}: {error}; what was there is now {self._aside}, and the next run puts it back"
                ) from error
            raise

    def _give_back(self) -> None:
        """Directories that were carried over are the old ones again: who works in one stays in it, and loses nothing."""
        for name in [name for name, told in self._carried.items() if not told and "/" not in name]:
            with contextlib.suppress(OSError):  # the new one has all that the old one had
                if exchange(self.path / name, self.target / name):
                    self._left.add(name)

    def _confirm(self) -> None:
        try:
            for directory in {self.target.parent, *(made.parent for made in self._made)}:
                sync(directory)
        except OSError as error:
            note(
                f"{self.target}: is in place, but may not survive a power failure: the disk did not confirm its name: "
                f"{error.strerror or error}"
            )


def _lock_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.lors.lock")


def _or_was_killed(taken: Path) -> str:
    if not taken.exists():
        return ""
    return f"; or one was killed there: this file system has no locks that tell, so remove {taken} if none is running"


def _sweep(parent: Path, locked: str) -> None:
    """Removes what killed runs left in `parent`; `locked` is the target name whose lock this run holds."""
    debris: dict[str, list[Path]] = {}
    for name in os.listdir(parent):
        if found := _DEBRIS.fullmatch(name):
            debris.setdefault(found["owner"], []).append(parent / name)
    for owner, paths in debris.items():
        with contextlib.suppress(OSError):  # housekeeping: another user's debris is theirs to remove
            lock = None if owner == locked else Lock.acquire(_lock_path(parent / owner))
            if owner == locked or lock is not None:
                try:
                    _remove_debris(parent / owner, paths)
                finally:
                    if lock is not None:
                        lock.release()


def _remove_debris(target: Path, paths: list[Path]) -> None:
    for path in sorted(paths, key=lambda path: path.suffix == ".tmp"):  # the old one is put back before all
        if path.suffix == ".old" and not target.exists():
            path.rename(target)
        else:
            _remove_tree(path)


def _remove_tree(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except PermissionError:  # directories that were carried over may be read-only
        os.chmod(path, stat.S_IRWXU)
        for directory, names, _ in os.walk(path):
            for inner in (os.path.join(directory, name) for name in names):
                if not os.path.islink(inner):
                    os.chmod(inner, stat.S_IRWXU)
        shutil.rmtree(path)


def _sync_tree(directory: Path) -> None:
    for parent, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))
