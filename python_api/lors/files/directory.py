"""Writing: a directory or a file that appears complete or not at all, and weights streamed into it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import struct
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..checkpoints.safetensors import dtype_code
from ..errors import LorsError, LorsWarning
from .carry import Seen, carry, dress, unseen
from .lock import Lock
from .replaceable import MODEL, Kind, foreign, objection
from .syscalls import exchange, preallocate, start_writeback
from .writing import require_space, writing

__all__ = ["OpenAIWriter", "OutputDirectory", "WeightWriter"]

RECIPE_FILE = "lors_recipe.yml"
TensorSpec = tuple[str, "np.dtype[Any]", tuple[int, ...]]

_DEBRIS = re.compile(r"\.(?P<owner>.+)\.lors-\d+-[0-9a-f]{8}\.(?:tmp|old)", re.DOTALL)
_EARLY_WRITEBACK = 1 << 20  # bytes; below it, the call costs more than it starts
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


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ------------------------------------------------------------------------------------------------------- weights


class _Coverage:
    """Which elements of each tensor have been written: exact, so that a hole and a double write cannot cancel out."""

    def __init__(self, tensors: Sequence[TensorSpec]) -> None:
        self._left = {name: math.prod(shape) for name, _, shape in tensors}
        self._ranges: dict[str, list[tuple[int, int]]] = {}
        self._lock = threading.Lock()

    def add(self, name: str, start: int, stop: int) -> None:
        with self._lock:
            ranges = self._ranges.setdefault(name, [])
            if any(start < end and begin < stop for begin, end in ranges):
                raise ValueError(f"elements [{start}, {stop}) of {name!r} are written twice")
            ranges.append((start, stop))
            self._left[name] -= stop - start

    def require_complete(self) -> None:
        incomplete = [f"{name!r} ({left} elements)" for name, left in self._left.items() if left]
        if incomplete:
            raise RuntimeError(f"{len(incomplete)} tensors are not completely written, first {incomplete[0]}")


def _check_write(name: str, dtype: np.dtype[Any], shape: tuple[int, ...], array: np.ndarray, start: int) -> None:
    if array.dtype != dtype:
        raise ValueError(f"tensor {name!r} is declared as {dtype}, got {array.dtype}")
    if not 0 <= start <= start + array.size <= math.prod(shape):
        raise ValueError(f"elements [{start}, {start + array.size}) are not within {name!r} of shape {shape}")


def _check_specs(tensors: Iterable[TensorSpec]) -> list[TensorSpec]:
    specs = [(name, np.dtype(dtype), tuple(shape)) for name, dtype, shape in tensors]
    if len({name for name, _, _ in specs}) < len(specs) or any(name == "__metadata__" for name, _, _ in specs):
        raise ValueError("tensor names must be unique, and none may be '__metadata__'")
    return specs


class WeightWriter:
    """Streams tensors into safetensors files whose layout is fixed beforehand.

    One file `{stem}.safetensors`, or, when the data take more than `shard_bytes`, `{stem}-00001-of-0000N.safetensors`
    and so on with `{stem}.safetensors.index.json`, as transformers reads them. Shards are filled in the order of
    `tensors`; a tensor is never split. Space is owned up front where the file system can, so a full disk shows on
    construction. Ranges may come in any order and from any thread; each element exactly once. Use as a context
    manager: it closes the files.

    Args:
        tensors: (name, numpy dtype, shape) of every tensor.
        metadata: strings for the header; `{"format": "pt"}` is what transformers expects.
        early_writeback: start writing to the disk at once, so that the final fsync finds little left to do. On a 1 GB
            file, fsync took 0.23 s after plain writes and 0.01 s with it.
        over: files of these names that are there already are written over, in the memory and on the disk that they
            have; for files that nobody else reads meanwhile. Implies early_writeback=False.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Iterable[TensorSpec],
        *,
        metadata: Mapping[str, str] | None = None,
        shard_bytes: int = 5_000_000_000,
        stem: str = "model",
        early_writeback: bool = True,
        over: bool = False,
    ) -> None:
        specs = _check_specs(tensors)
        self._specs = {name: (dtype, shape) for name, dtype, shape in specs}
        self._coverage = _Coverage(specs)
        self._early, self._over = early_writeback and not over, over
        self._directory, self._stem = directory, stem
        self.nbytes = sum(_spec_bytes(spec) for spec in specs)
        self._places: dict[str, tuple[int, int]] = {}  # name -> (file, byte offset)
        self._fds: list[int] = []
        shards = _shards(specs, shard_bytes)
        self.files = [directory / _shard_name(stem, index, len(shards)) for index in range(len(shards))]
        there = sum(file.stat().st_blocks * 512 for file in self.files if over and file.exists())
        require_space(directory, max(0, self.nbytes - there))
        try:
            for shard, path in zip(shards, self.files, strict=True):
                self._create(path, shard, {"format": "pt"} if metadata is None else metadata)
        except BaseException:
            self.close()
            raise

    def _create(self, path: Path, shard: list[TensorSpec], metadata: Mapping[str, str]) -> None:
        header, offsets, end = _layout(shard, metadata)
        with writing(path, end):
            self._fds.append(os.open(path, os.O_RDWR | os.O_CREAT | (0 if self._over else os.O_EXCL), 0o666))
            if self._over:
                os.ftruncate(self._fds[-1], end)
            preallocate(self._fds[-1], end)
            _write_all(self._fds[-1], memoryview(header), 0)
        self._places.update({name: (len(self._fds) - 1, offset) for name, offset in offsets.items()})

    def write(self, name: str, array: np.ndarray, start: int = 0) -> None:
        """Writes `array` (any shape, the declared dtype) as elements [start, start + size) of a tensor. Thread-safe.

        Raises LorsError when the system refuses (disk full ...), ValueError for a wrong dtype, range or a double write.
        """
        dtype, shape = self._specs[name]
        _check_write(name, dtype, shape, array, start)
        file, base = self._places[name]
        offset = base + start * dtype.itemsize
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        with writing(self.files[file], self.nbytes):
            _write_all(self._fds[file], raw, offset)
            if self._early and raw.nbytes >= _EARLY_WRITEBACK:
                start_writeback(self._fds[file], offset, raw.nbytes)
        self._coverage.add(name, start, start + array.size)

    def finish(self) -> list[Path]:
        """Writes the index of a sharded checkpoint and closes the files; RuntimeError unless all of it is written."""
        self._coverage.require_complete()
        written = list(self.files)
        if len(self.files) > 1:
            written.append(self._write_index())
        while self._fds:
            with writing(self.files[len(self._fds) - 1], self.nbytes):  # some network file systems write only now
                os.close(self._fds.pop())
        return written

    def _write_index(self) -> Path:
        path = self._directory / f"{self._stem}.safetensors.index.json"
        parameters = sum(math.prod(shape) for _, shape in self._specs.values())
        weight_map = {name: self.files[file].name for name, (file, _) in self._places.items()}
        index = {"metadata": {"total_parameters": parameters, "total_size": self.nbytes}, "weight_map": weight_map}
        with writing(path):
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return path

    def close(self) -> None:
        """Closes the files as they are; an error is of no interest, because what is not finished is thrown away."""
        while self._fds:
            with contextlib.suppress(OSError):
                os.close(self._fds.pop())

    def __enter__(self) -> WeightWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _spec_bytes(spec: TensorSpec) -> int:
    return math.prod(spec[2]) * spec[1].itemsize


def _shards(specs: list[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Consecutive tensors of at most `limit` bytes together; a larger tensor stands alone."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        nbytes = _spec_bytes(spec)
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += nbytes
    return shards


def _shard_name(stem: str, index: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors"


def _layout(shard: list[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """The header with its length field, each tensor's byte offset in the file, and the file's size.

    Wider dtypes come first, so that with the header padded to 8 bytes every tensor is aligned to its element.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begins: dict[str, int] = {}
    end = 0
    for name, dtype, shape in sorted(shard, key=lambda spec: -spec[1].itemsize):
        begins[name], end = end, end + _spec_bytes((name, dtype, shape))
        header[name] = {"dtype": dtype_code(dtype), "shape": list(shape), "data_offsets": [begins[name], end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: data + begin for name, begin in begins.items()}, data + end


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


class OpenAIWriter:
    """An openai-whisper checkpoint, `{"dims": ..., "model_state_dict": ...}` in a ``.pt``, written like a WeightWriter.

    torch writes the file, in one go: the tensors are collected in memory until :meth:`finish`.
    """

    def __init__(self, path: Path, tensors: Iterable[TensorSpec], dims: Mapping[str, int]) -> None:
        specs = _check_specs(tensors)
        self._path, self._dims = path, dict(dims)
        self._coverage = _Coverage(specs)
        self.nbytes = sum(_spec_bytes(spec) for spec in specs)
        require_space(path, self.nbytes)
        self._arrays = {name: np.empty(shape, dtype) for name, dtype, shape in specs}

    def write(self, name: str, array: np.ndarray, start: int = 0) -> None:
        """As WeightWriter.write."""
        into = self._arrays[name]
        _check_write(name, into.dtype, into.shape, array, start)
        into.reshape(-1)[start : start + array.size] = array.reshape(-1)
        self._coverage.add(name, start, start + array.size)

    def finish(self) -> list[Path]:
        """Saves the file; RuntimeError unless all elements were written."""
        import torch

        self._coverage.require_complete()
        state = {name: _to_torch(torch, array) for name, array in self._arrays.items()}
        with writing(self._path, self.nbytes), self._path.open("xb") as stream:
            torch.save({"dims": self._dims, "model_state_dict": state}, stream)
        return [self._path]

    def close(self) -> None:
        """Drops the collected tensors."""
        self._arrays.clear()

    def __enter__(self) -> OpenAIWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _to_torch(torch: Any, array: np.ndarray) -> Any:
    # torch takes no ml_dtypes: its own dtype of the same name views the same bits
    if array.dtype.kind != "V" and array.dtype.isbuiltin == 1:
        return torch.from_numpy(array)
    bits = torch.from_numpy(array.view(np.dtype(f"i{array.dtype.itemsize}")))
    return bits.view(getattr(torch, array.dtype.name))
