"""Writing: a directory that appears complete or not at all, and weights streamed into it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import resource
import secrets
import shutil
import signal
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np

from .errors import LorsError
from .formats import dtype_code
from .system import exchange, preallocate, start_writeback

__all__ = [
    "OpenAIWriter",
    "OutputDirectory",
    "Terminated",
    "WeightWriter",
    "require_space",
    "terminate_cleanly",
    "writing",
]

RECIPE_FILE = "lors_recipe.yml"
TensorSpec = tuple[str, "np.dtype[Any]", tuple[int, ...]]

_DEBRIS = re.compile(r"\.(?P<owner>.+)\.lors-\d+-[0-9a-f]{8}\.(?:tmp|old)", re.DOTALL)
_EARLY_WRITEBACK = 1 << 20  # bytes; below it, the call costs more than it starts
_PATIENCE = 1.0  # seconds


# -------------------------------------------------------------------------------------------------------- errors


@contextlib.contextmanager
def writing(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turns an OSError of the block into a LorsError that says which limit was met. `needed` is in bytes."""
    try:
        yield
    except OSError as error:
        raise LorsError(_explain(error, path, needed)) from error


def _explain(error: OSError, path: Path, needed: int | None) -> str:
    need = f"{_size(needed)} needed, " if needed is not None else ""
    if error.errno == errno.ENOSPC:
        return f"cannot write {path}: the disk is full: {need}{_size(_free(path))} free"
    if error.errno == errno.EDQUOT:
        return f"cannot write {path}: the disk quota is used up{need and f': {need[:-2]}'}"
    if error.errno == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        allowed = (
            "more than the file system allows"
            if limit == resource.RLIM_INFINITY
            else f"{_size(limit)} allowed (ulimit -f)"
        )
        return f"cannot write {path}: the file is too large: {need}{allowed}"
    if error.errno == errno.EROFS:
        return f"cannot write {path}: the file system is read-only"
    return f"cannot write {path}: {error.strerror or error}"


def _free(path: Path) -> int:
    """Bytes a user may still write in the file system of `path` or of its nearest existing parent."""
    while not path.exists() and path != path.parent:
        path = path.parent
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


def _size(count: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} bytes"


def require_space(path: Path, needed: int) -> None:
    """LorsError unless `needed` bytes are free where `path` is, or will be."""
    if (free := _free(path)) < needed:
        raise LorsError(f"cannot write {path}: the disk is too full: {_size(needed)} needed, {_size(free)} free")


# ------------------------------------------------------------------------------------------------------- signals


class Terminated(SystemExit):
    """SIGTERM or SIGHUP as an exception; left alone, the process ends with the status a shell expects, 128 + signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


@contextlib.contextmanager
def terminate_cleanly() -> Iterator[None]:
    """Within the block, SIGTERM and SIGHUP raise Terminated in the main thread, so that what is temporary is removed.

    Signals that are ignored (nohup) stay ignored. Outside the main thread, which alone may set handlers, nothing
    changes.
    """

    def handler(signum: int, frame: FrameType | None) -> None:
        raise Terminated(signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for signum, previous in before.items():
            if previous is not signal.SIG_IGN:
                signal.signal(signum, handler)
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)


# ----------------------------------------------------------------------------------------------------- directory


class OutputDirectory:
    """A directory that becomes visible in one step, complete.

    ::

        with OutputDirectory("merged", inputs=[...]) as out:
            ...  # write into out.path, a temporary sibling `.merged.lors-PID-RANDOM.tmp`
            out.commit()

    Leaving the block without :meth:`commit`, for whatever reason, removes everything. A reader of the target sees the
    old state or the new one. Two runs with one target: the second is told so. What a killed run left behind is removed
    by the next run beside it: a lock (`.merged.lors.lock`, gone after the run) tells the dead from the living.

    Args:
        path: the target. Missing parents are made. A symbolic link is followed: what it points to is replaced.
        force: replace an existing directory that holds a checkpoint or nothing. Needs room for both until the commit.
        inputs: every file and directory that is read; the target must not contain, or be inside, any of them.
        durable: commit survives a power failure (fsync of every file and directory).

    Raises LorsError on construction, before anything is touched, when the target cannot be used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        force: bool = False,
        inputs: Iterable[str | os.PathLike[str]] = (),
        durable: bool = True,
    ) -> None:
        self.target = Path(os.path.realpath(os.path.expanduser(path)))
        self._force, self._durable = force, durable
        self._inputs = [Path(os.path.realpath(input)) for input in inputs]
        self._lock: int | None = None
        self._made: list[Path] = []
        self._committed = False
        self._check()
        token = f"{os.getpid()}-{secrets.token_hex(4)}"
        self.path = self.target.with_name(f".{self.target.name}.lors-{token}.tmp")

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
        if target.exists():
            self._check_replaceable()
        ancestor = next(parent for parent in target.parents if parent.exists())
        if not ancestor.is_dir():
            raise LorsError(f"{target}: {ancestor} is not a directory")
        if not os.access(ancestor, os.W_OK | os.X_OK):
            raise LorsError(f"{target}: the directory {ancestor} is not writable")

    def _check_replaceable(self) -> None:
        target = self.target
        if not target.is_dir():
            raise LorsError(f"{target}: expected a directory to write, it is a file")
        if not self._force:
            raise LorsError(f"{target}: exists already; --force replaces it")
        names = os.listdir(target)
        if names and not any(name in ("config.json", RECIPE_FILE) or name.endswith(".safetensors") for name in names):
            raise LorsError(f"{target}: --force replaces only a checkpoint or an empty directory, and this is neither")
        here = Path(os.path.realpath("."))
        if here == target or target in here.parents:
            raise LorsError(f"{target}: cannot be replaced while it is, or contains, the current directory")

    def require_space(self, needed: int) -> None:
        """LorsError unless `needed` bytes are free."""
        require_space(self.target, needed)

    # --------------------------------------------------------------------------------------------------- block

    def __enter__(self) -> OutputDirectory:
        try:
            with writing(self.target):
                self._make_parents()
                self._lock = _acquire_patiently(_lock_path(self.target))
                if self._lock is None:
                    raise LorsError(f"{self.target}: another run is writing to it")
                _sweep(self.target.parent, self.target.name)
                self._check()  # another run may have finished in between
                self.path.mkdir()
        except BaseException:
            self._clean()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._clean()
        except (KeyboardInterrupt, Terminated):  # an impatient second Ctrl-C must not leave half of it behind
            self._clean()
            raise

    def _make_parents(self) -> None:
        for parent in reversed(self.target.parents):
            with contextlib.suppress(FileExistsError):
                parent.mkdir()
                self._made.append(parent)

    def _clean(self) -> None:
        if self._lock is None:
            return self._remove_parents()
        with writing(self.path):
            if os.path.lexists(self.path):
                shutil.rmtree(self.path)
            _release(_lock_path(self.target), self._lock)
        self._lock = None
        if not self._committed:
            self._remove_parents()

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

    def commit(self) -> None:
        """Makes the directory visible as the target, atomically; then removes what it replaced.

        Where the file system cannot swap two names in one step (some network file systems), the old directory is
        renamed away before the new one takes its name: for that moment there is none, and a run killed there leaves
        the old one under `.NAME.lors-PID-RANDOM.old`, which the next run puts back.
        """
        with writing(self.target):
            if self._durable:
                _sync_tree(self.path)
            if self._force and self.target.exists():
                self._replace()
            else:
                self.path.rename(self.target)
            self._committed = True
            if self._durable:
                for directory in {self.target.parent, *(made.parent for made in self._made)}:
                    _sync(directory)

    def _replace(self) -> None:
        # After an exchange, self.path is the old directory, and leaving the block removes it as it would the new one.
        if exchange(self.path, self.target):
            return
        aside = self.path.with_suffix(".old")
        self.target.rename(aside)
        try:
            self.path.rename(self.target)
        except BaseException:
            aside.rename(self.target)
            raise
        aside.rename(self.path)


def _lock_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.lors.lock")


def _acquire(lock: Path) -> int | None:
    """Locks a lock file, made if need be; None when another process holds it."""
    while True:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have removed the file between our open and our lock: then it locks nothing.
            if os.path.samestat(os.fstat(fd), os.stat(lock)):
                return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _acquire_patiently(lock: Path) -> int | None:
    # A run that starts beside this target may hold the lock for the moment it takes to remove a killed run's files.
    deadline = time.monotonic() + _PATIENCE
    while (fd := _acquire(lock)) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return fd


def _release(lock: Path, fd: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(lock)  # while it is still locked: nobody can hold the file that goes
    os.close(fd)


def _sweep(parent: Path, locked: str) -> None:
    """Removes what killed runs left in `parent`; `locked` is the target name whose lock this run holds."""
    debris: dict[str, list[Path]] = {}
    for name in os.listdir(parent):
        if found := _DEBRIS.fullmatch(name):
            debris.setdefault(found["owner"], []).append(parent / name)
    for owner, paths in debris.items():
        if owner == locked:
            _remove_debris(parent / owner, paths)
            continue
        with contextlib.suppress(OSError):  # housekeeping: another user's debris is theirs to remove
            lock = _lock_path(parent / owner)
            if (fd := _acquire(lock)) is not None:
                try:
                    _remove_debris(parent / owner, paths)
                finally:
                    _release(lock, fd)


def _remove_debris(target: Path, paths: list[Path]) -> None:
    for path in paths:
        if path.suffix == ".old" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path)


def _sync_tree(directory: Path) -> None:
    for parent, _, names in os.walk(directory, topdown=False):
        for name in names:
            _sync(Path(parent, name))
        _sync(Path(parent))


def _sync(path: Path) -> None:
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
        self.close()
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
        """Closes the files, complete or not."""
        while self._fds:
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
