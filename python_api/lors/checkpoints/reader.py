"""Reading checkpoints: what is in one, and its weights, a range at a time, into the caller's memory.

Weights are read with ``preadv``, never mapped: peak memory is what the caller allocates, and a file that shrinks while
it is read is an error that names the tensor instead of a SIGBUS.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from ..errors import LorsError
from ..files import strict_json
from ..files.digest import sha256_file, sha256_files
from ..files.remote import fetch, is_url
from .hub import (
    HUB_ID,
    INDEX,
    NEMO,
    OPENAI,
    SAFETENSORS_PATTERNS,
    SIDECARS,
    SINGLE,
    TORCH_INDEX,
    TORCH_PATTERNS,
    TORCH_SINGLE,
    SourceNotFound,
    download,
    shipped,
)
from .layers import EMBEDDING, HEAD, naming
from .nemo import WEIGHTS, Members, is_tar, read_members
from .safetensors import read_safetensors_header
from .tensor_info import TensorInfo

__all__ = ["Checkpoint", "open_checkpoint", "require_unchanged", "sha256_checkpoints"]

_ADAPTER_CONFIG, _ADAPTERS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
_CARD = "README.md"
_Identity = tuple[int, int, int, int, int]
_CONFIG_VALUES = 100_000  # as documents.MAX_VALUES; that module is not imported for weights alone
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_HUB_PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>[\w.-]+/[\w.-]+?)(?:/tree/(?P<revision>[\w.-]+))?/?"
)
_STEP = re.compile(r"-\d{1,18}$")
_COMPARE_ELEMENTS = 1 << 20


class Checkpoint:
    """One opened checkpoint: its tensors by name, and thread-safe reads of their values.

    Made by :func:`open_checkpoint`; a context manager, or call :meth:`close`.

    Attributes:
        name: how messages and reports call it.
        path: the directory or file it was opened from.
        hub_id: ``org/name`` when it came from the hub, else None.
        url: the URL it was copied from, else None.
        files: the weight files.
        tensors: name -> TensorInfo, in the order of the files and of the data in them.
        naming: ``"hf-whisper"``, ``"openai-whisper"``, ``"nemo"`` or ``"other"``.
        config: config.json beside the weights, or None.
        adapter: adapter_config.json of a PEFT adapter, whose tensors are its factors; None for a model.
        dims: openai-whisper's dimensions from a ``.pt``, or None.
        archive: the files of a ``.nemo``, by name, or None.
        metadata: the strings of the safetensors header.
    """

    def __init__(
        self, name: str, path: Path, files: Sequence[Path], *, hub_id: str | None = None, directory: Path | None = None
    ) -> None:
        if sys.byteorder != "little":
            raise LorsError("weight files are little-endian and so must this machine be")
        self.name, self.path, self.files, self.hub_id = name, path, tuple(files), hub_id
        self.url: str | None = None
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self.dims: dict[str, Any] | None = None
        self.archive: Members | None = None
        self.adapter: dict[str, Any] | None = None
        self._directory = directory
        with contextlib.ExitStack() as stack:
            self._streams = [_open(file, stack) for file in files]
            held = {f: _identity(os.fstat(s.fileno())) for f, s in zip(files, self._streams, strict=True)}
            self._opened = self._beside() | held
            for path in (path for path in self._opened if path.name in SIDECARS):
                with contextlib.ExitStack() as beside:
                    _refuse_pointer(path, _open(path, beside))
            for index, (file, stream) in enumerate(zip(files, self._streams, strict=True)):
                self._read_contents(index, file, stream)
            if not self.tensors:
                raise LorsError(f"{path}: there is no tensor in it")
            self.config = _read_config(directory) if directory else None
            self._stack = stack.pop_all()
        self.naming = naming(self.tensors)

    def _read_contents(self, index: int, file: Path, stream: BinaryIO) -> None:
        _refuse_pointer(file, stream)
        if file.suffix != ".safetensors" and is_tar(stream):
            from .torch_archive import read_torch_archive

            self.archive = read_members(stream, file)
            tensors, _ = read_torch_archive(self.archive[WEIGHTS], file, index)
        elif _is_torch_archive(file, stream):
            from .torch_archive import read_torch_archive

            tensors, self.dims = read_torch_archive(stream, file, index)
        else:
            tensors, metadata = read_safetensors_header(stream, file, index)
            self.metadata.update(metadata)
        if twice := self.tensors.keys() & tensors.keys():
            name = min(twice)
            raise LorsError(f"{file}: tensor {name!r} is also in {self.files[self.tensors[name].file]}")
        self.tensors.update(tensors)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files; reads after it raise ValueError."""
        self._stack.close()

    def __repr__(self) -> str:
        return f"Checkpoint({self.name!r}, {len(self.tensors)} tensors, {self.naming})"

    # ------------------------------------------------------------------------------------------------ weights

    def read(self, name: str, out: np.ndarray | None = None, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Elements [start, stop) of a tensor, counted row-major, into `out`, which is returned.

        `out` is C-contiguous, of the tensor's dtype and of exactly stop - start elements, in any shape. Without it a
        new array is made: of the tensor's shape when all of it is read, else flat. Safe to call from several threads.
        Raises LorsError when there is no such tensor or the file ends early, ValueError for a wrong range or `out`.
        """
        info = self.info(name)
        if info.packed:
            raise LorsError(
                f"{self.name}: tensor {name!r}: {info.code} values are packed below a byte and cannot be read"
            )
        stop = info.numel if stop is None else stop
        if not 0 <= start <= stop <= info.numel:
            raise ValueError(f"range [{start}, {stop}) is not within the {info.numel} elements of {name!r}")
        if out is None:
            out = np.empty(info.shape if stop - start == info.numel else stop - start, info.dtype)
        elif out.dtype != info.dtype or out.size != stop - start or not out.flags.c_contiguous:
            raise ValueError(
                f"out must be C-contiguous with {stop - start} elements of {info.dtype} for {name!r}, got {out.dtype} "
                f"{out.shape}{'' if out.flags.c_contiguous else ', not contiguous'}"
            )
        offset = info.offset + start * info.dtype.itemsize
        # bfloat16 has no buffer protocol of its own: read as bytes
        filled = _read_into(
            self._streams[info.file].fileno(), out.reshape(-1).view(np.uint8), offset, self.files[info.file]
        )
        if filled < out.nbytes:
            raise LorsError(
                f"{self.files[info.file]}: the file shrank while it was read: tensor {name!r} needs {out.nbytes} bytes "
                f"at {offset}, got {filled}"
            )
        return out

    def prefetch(self, name: str) -> None:
        """Asks the system to bring a tensor into the page cache; does nothing where it cannot be asked."""
        info = self.info(name)
        if info.nbytes and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._streams[info.file].fileno(), info.offset, info.nbytes, os.POSIX_FADV_WILLNEED)

    def info(self, name: str) -> TensorInfo:
        """The TensorInfo of a name; LorsError when there is none."""
        try:
            return self.tensors[name]
        except KeyError:
            raise LorsError(f"{self.name}: there is no tensor {name!r}") from None

    # ------------------------------------------------------------------------------------------- tied weights

    @cached_property
    def head_is_tied(self) -> bool:
        """Whether the output projection is the token embedding: not stored, or stored with the same bits.

        Reads both when both are stored. False for other namings than hf-whisper, and when config.json says
        ``"tie_word_embeddings": false``.
        """
        if self.naming != "hf-whisper" or EMBEDDING not in self.tensors:
            return False
        if (self.config or {}).get("tie_word_embeddings", True) is False:
            return False
        return HEAD not in self.tensors or self._same_bits(HEAD, EMBEDDING)

    def resolve(self, name: str) -> str | None:
        """The stored tensor that holds the values of `name`: itself, the embedding for a tied head, else None."""
        if name in self.tensors:
            return name
        return EMBEDDING if name == HEAD and self.head_is_tied else None

    def _same_bits(self, first: str, second: str) -> bool:
        ours, theirs = self.tensors[first], self.tensors[second]
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            return False
        for start in range(0, ours.numel, _COMPARE_ELEMENTS):
            stop = min(start + _COMPARE_ELEMENTS, ours.numel)
            if self.read(first, None, start, stop).tobytes() != self.read(second, None, start, stop).tobytes():
                return False
        return True

    # ------------------------------------------------------------------------------------------- around weights

    @property
    def location(self) -> str:
        """What another process, or another machine that sees the same files, opens this checkpoint by."""
        return self.url or str(self.path.absolute())

    def sha256(self) -> dict[str, str]:
        """SHA-256 of each weight file, by file name."""
        return {file.name: sha256_file(file) for file in self.files}

    @property
    def directory(self) -> Path | None:
        """Where configuration and tokenizer lie, None for a bare file."""
        return self._directory

    def sidecars(self) -> list[Path]:
        """Files beside the weights that a merged model needs too: configuration, tokenizer, processor."""
        return [_inside(path) for path in self._opened if path.name in SIDECARS]

    def card(self) -> Path | None:
        """The model card (README.md) beside the weights, if there is one."""
        return next((_inside(path) for path in self._opened if path.name == _CARD), None)

    def require_unchanged(self) -> None:
        """LorsError unless the weight files and those beside them are what they were on opening.

        Told by device, inode, size and times, of the names: a file that was written to, replaced, removed or added.
        """
        now: dict[Path, _Identity | None] = {**self._beside(), **{file: _identity_of(file) for file in self.files}}
        for path in (*self._opened, *now):
            before, after = self._opened.get(path), now.get(path)
            if before != after:
                what = "was removed while it" if after is None else "changed while it"
                what = f"appeared while {self.name}" if before is None else what
                raise LorsError(f"{path}: {what} was being read; start again when it is complete")

    def _beside(self) -> dict[Path, _Identity]:
        """The files beside the weights that matter, and what they are just now."""
        if self._directory is None:
            return {}
        found = {path: _identity_of(path) for path in (self._directory / name for name in (*SIDECARS, _CARD))}
        return {path: identity for path, identity in found.items() if identity is not None}


def require_unchanged(checkpoints: Iterable[Checkpoint]) -> None:
    """:meth:`Checkpoint.require_unchanged` of several; to be asked before what was made of them is shown or kept."""
    for checkpoint in checkpoints:
        checkpoint.require_unchanged()


def _inside(path: Path) -> Path:
    """The path; LorsError for a link that leads out of its directory, unless it leads into the hub's cache.

    What lies beside somebody's weights is copied into the merged model, and published with it.
    """
    home, real = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path))
    if home in real.parents:
        return path
    from huggingface_hub import constants

    caches = [Path(os.path.realpath(constants.HF_HUB_CACHE))]
    if home.parent.name == "snapshots":
        caches.append(home.parent.parent / "blobs")
    if not any(cache in real.parents for cache in caches):
        raise LorsError(
            f"{path}: is a link to {real}, outside of its directory; if that is meant, put a copy in its place"
        )
    return path


def sha256_checkpoints(checkpoints: Iterable[Checkpoint], threads: int | None = None) -> list[dict[str, str]]:
    """:meth:`Checkpoint.sha256` of several checkpoints, their files hashed concurrently; in the given order."""
    checkpoints = list(checkpoints)
    digests = sha256_files([file for checkpoint in checkpoints for file in checkpoint.files], threads)
    return [{file.name: digests[file] for file in checkpoint.files} for checkpoint in checkpoints]


def open_checkpoint(source: str | os.PathLike[str], *, name: str | None = None) -> Checkpoint:
    """Opens a checkpoint and checks everything but the weights themselves.

    `source` is a directory in the Hugging Face format (``model.safetensors``, sharded with an index, or
    ``pytorch_model.bin``) or with a merged ``model.pt`` or
    ``model.nemo``, a ``.safetensors`` file, an openai-whisper ``.pt``, a ``.nemo``, a hub id ``org/name`` or
    ``org/name@revision``, ``tiny`` or ``tiny-early``, which come with lors, or an fsspec URL of such a directory or file,
    which is copied here first (`remote`). What exists on disk is never taken for a hub id. Raises LorsError.
    """
    text = os.fspath(source)
    if page := _HUB_PAGE.fullmatch(text):
        label = page["repo"] + (f"@{page['revision']}" if page["revision"] else "")
        raise LorsError(f"{text}: a page of the hub: expected its id, {label}")
    if is_url(text):
        weights = (SAFETENSORS_PATTERNS, TORCH_PATTERNS, [*_ADAPTERS, _ADAPTER_CONFIG])
        found = open_checkpoint(fetch(text, [[*patterns, *SIDECARS, "README.md"] for patterns in weights]), name=name)
        found.url = text
        return found
    if (own := shipped(text)) is not None:
        return _open_directory(own, name or text, None)
    path = Path(os.path.expanduser(text))
    try:
        if path.is_dir():
            return _open_directory(path, name or path.resolve().name, None)
        if path.exists():
            beside = path.suffix != ".nemo" and (path.parent / "config.json").is_file()  # an archive has its own
            directory = path.parent if beside else None
            return Checkpoint(name or _file_label(path), path, [path], directory=directory)
        if isinstance(source, str) and (hub := HUB_ID.fullmatch(text)):
            snapshot = download(hub["repo"], hub["revision"])
            return _open_directory(snapshot, name or text, hub["repo"])
    except OSError as error:  # a directory that may not be entered, a name that is too long ...
        raise LorsError(f"cannot read {error.filename or text}: {error.strerror or error}") from error
    raise SourceNotFound(text, "no such file or directory")


def _file_label(path: Path) -> str:
    generic = path.name in (SINGLE, TORCH_SINGLE, OPENAI, NEMO)
    return path.resolve().parent.name if generic else path.stem


# --------------------------------------------------------------------------------------------------- directories


def _open_directory(path: Path, name: str, hub_id: str | None) -> Checkpoint:
    for single, index in ((SINGLE, INDEX), (TORCH_SINGLE, TORCH_INDEX)):  # in transformers' order
        if (path / single).exists():
            return Checkpoint(name, path, [path / single], hub_id=hub_id, directory=path)
        if (path / index).exists():
            return _open_sharded(path / index, name, hub_id)
    for whole in (OPENAI, NEMO):
        if (path / whole).exists():
            return Checkpoint(name, path, [path / whole], hub_id=hub_id, directory=path)
    if (path / _ADAPTER_CONFIG).exists():
        return _open_adapter(path, name, hub_id)
    hint = _where_weights_are(path)
    raise LorsError(f"{path}: no weights in this directory: expected {SINGLE}, {INDEX} or {TORCH_SINGLE}{hint}")


def _where_weights_are(directory: Path, shown: int = 3) -> str:
    """End of a message: files and directories in this one that could be meant, the last checkpoint of a training first."""
    names = (SINGLE, INDEX, TORCH_SINGLE, TORCH_INDEX, OPENAI, NEMO, _ADAPTER_CONFIG)
    steps = {
        path: int(path.name.rpartition("-")[2]) for path in directory.glob("checkpoint-*") if _STEP.search(path.name)
    }
    inside = sorted(steps, key=lambda path: -steps[path]) + sorted(set(directory.iterdir()) - steps.keys())
    found = [path for path in inside if any((path / name).exists() for name in names)]
    found += [path for path in inside if path.suffix in (".safetensors", ".pt", ".nemo") and path.is_file()]
    if not found:
        return "" if inside else "; it is empty"
    more = f" and {len(found) - shown} more" if len(found) > shown else ""
    return f"; did you mean {', '.join(str(path) for path in found[:shown])}{more}?"


def _open_adapter(path: Path, name: str, hub_id: str | None) -> Checkpoint:
    config = strict_json.read(path / _ADAPTER_CONFIG, values=_CONFIG_VALUES)
    for file in _ADAPTERS:
        if (path / file).exists():
            checkpoint = Checkpoint(name, path, [path / file], hub_id=hub_id, directory=path)
            checkpoint.adapter = config
            return checkpoint
    raise LorsError(f"{path}: no weights beside {_ADAPTER_CONFIG}: expected {' or '.join(_ADAPTERS)}")


def _open_sharded(index: Path, name: str, hub_id: str | None) -> Checkpoint:
    weight_map = _read_index(index)
    shards = [index.with_name(shard) for shard in sorted(set(weight_map.values()))]
    for shard in shards:
        if not shard.exists():
            raise LorsError(f"{index}: names the shard {shard.name!r}, which is not there")
    checkpoint = Checkpoint(name, index.parent, shards, hub_id=hub_id, directory=index.parent)
    try:
        _check_index(index, weight_map, checkpoint)
    except LorsError:
        checkpoint.close()
        raise
    return checkpoint


def _read_index(index: Path) -> dict[str, str]:
    weight_map = strict_json.read(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise LorsError(f"{index}: expected weight_map to be an object of tensor names and file names")
    for tensor, shard in weight_map.items():
        if shard != os.path.basename(shard) or shard in ("", ".", "..") or "\0" in shard:
            raise LorsError(
                f"{index}: tensor {tensor!r} is said to be in {shard!r}: expected a file name in this directory"
            )
    return weight_map


def _check_index(index: Path, weight_map: Mapping[str, str], checkpoint: Checkpoint) -> None:
    for tensor, shard in weight_map.items():
        info = checkpoint.tensors.get(tensor)
        if info is None or checkpoint.files[info.file].name != shard:
            raise LorsError(f"{index}: tensor {tensor!r} is said to be in {shard!r}, which does not have it")
    if unlisted := [name for name in checkpoint.tensors if name not in weight_map]:
        raise LorsError(f"{index}: does not list {len(unlisted)} tensors that are in the shards, first {unlisted[0]!r}")


def _read_config(directory: Path) -> dict[str, Any] | None:
    path = directory / "config.json"
    if not path.exists():
        return None
    from ..files.documents import ModelConfig

    config = strict_json.read(path, values=_CONFIG_VALUES, infinite=True)  # some models have limits that are infinite
    ModelConfig.check(config, str(path))
    return config


# --------------------------------------------------------------------------------------------------------- files


def _open(path: Path, stack: contextlib.ExitStack) -> BinaryIO:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would wait forever
            raise LorsError(f"{path}: expected a file")
        stream = path.open("rb")
        stack.callback(_close, stream)
        return stream
    except OSError as error:
        raise LorsError(f"cannot read {path}: {error.strerror or error}") from error


def _identity(status: os.stat_result) -> _Identity:
    # The time of the last change of its state is set by writing, even where the time of writing is put back.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _identity_of(path: Path) -> _Identity | None:
    """None where there is no file."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise LorsError(f"cannot read {path}: {error.strerror or error}") from error
    return _identity(status) if stat.S_ISREG(status.st_mode) else None


def _close(stream: BinaryIO) -> None:
    with contextlib.suppress(OSError):  # of a file that is only read: all of it has been
        stream.close()


def _refuse_pointer(path: Path, stream: BinaryIO) -> None:
    """What git leaves in the place of a large file that was not fetched."""
    start = stream.read(len(_LFS_POINTER))
    stream.seek(0)
    if start == _LFS_POINTER:
        raise LorsError(f"{path}: a git-lfs pointer, not the file itself: run `git lfs pull` in {path.parent}")


def _is_torch_archive(path: Path, stream: BinaryIO) -> bool:
    if path.suffix == ".safetensors":
        return False
    start = stream.read(9)
    stream.seek(0)
    if start.startswith(b"PK\x03\x04") or path.suffix in (".pt", ".bin", ".pth", ".ckpt"):
        return True
    # A safetensors file may have any name: a length of 8 bytes, then JSON.
    if start[8:9] != b"{":
        raise LorsError(
            f"{path}: not weights: expected a .safetensors file, a .pt or .bin as torch writes it, or a .nemo{_packed(start)}"
        )
    return False


def _packed(start: bytes) -> str:
    return "; this one is compressed: gunzip it first" if start.startswith(b"\x1f\x8b") else ""


def _read_into(fd: int, raw: np.ndarray, offset: int, path: Path) -> int:
    """Fills `raw` (bytes) from `offset`; returns the number of bytes read, fewer only at the end of the file."""
    view = raw.data
    done = 0
    try:
        while done < len(view):
            if hasattr(os, "preadv"):
                count = os.preadv(fd, [view[done:]], offset + done)
            else:
                data = os.pread(fd, min(len(view) - done, 1 << 24), offset + done)
                count = len(data)
                view[done : done + count] = data
            if count == 0:
                break
            done += count
    except OSError as error:
        raise LorsError(f"cannot read {path}: {error.strerror or error}") from error
    return done
