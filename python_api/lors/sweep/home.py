"""The directory of a sweep, here or at a URL, and what is kept in it: the plan and a line per finished trial.

A sweep at a URL works in a local directory; its plan and its trials are uploaded after every trial, its results at the
end. Started again, here or elsewhere, it goes on from whichever of the two knows more trials.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from ..errors import LorsError, first_line
from ..files.documents import first_problem
from ..files.lock import flock
from ..files.remote import Store, cache, local_path
from ..files.writing import PARTIAL, replacing, writing
from ..public import public

__all__ = ["STATE", "Home", "load_lines"]

STATE = ("sweep.json", "trials.jsonl")
T = TypeVar("T")


class Home:
    """Where a sweep works (`path`), and where it is kept (`url`; None: there)."""

    def __init__(self, out: str | os.PathLike[str]) -> None:
        local = local_path(out) if isinstance(out, str) else os.fspath(out)
        self.url = None if local is not None else str(out).rstrip("/")
        if local is not None:
            self.path = Path(os.path.abspath(os.path.expanduser(local)))
        else:
            self.path = scratch(str(self.url), "sweep")

    def __str__(self) -> str:
        return str(self.path) if self.url is None else public(self.url)

    @contextlib.contextmanager
    def open(self) -> Iterator[dict[str, Any] | None]:
        """Makes or reopens the directory, for one process at a time; the plan that it holds, None when it is new.

        LorsError when it holds something else.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, self.path)
            except BlockingIOError:
                raise LorsError(f"{self}: another sweep is running there") from None
            self._pull()
            path = self.path / "sweep.json"
            before = _read_plan(path) if path.exists() else None
            if before is None and (
                others := sorted(p.name for p in self.path.iterdir() if not _before_it_began(p.name))
            ):
                raise LorsError(f"{self}: expected a new directory or that of a sweep, it has {others[0]!r}")
            yield before
        finally:
            with contextlib.suppress(OSError):
                os.close(lock)

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Keeps the plan, and removes what a run that was killed had under way."""
        self.replace("sweep.json", json.dumps(plan, indent=2) + "\n")
        self.push(("sweep.json",))
        shutil.rmtree(self.path / "trials", ignore_errors=True)
        for path in self.path.iterdir():
            if PARTIAL.fullmatch(path.name):
                path.unlink()
        for unit in self.path.glob("cache/unit-*"):
            shutil.rmtree(unit, ignore_errors=True) if unit.is_dir() else unit.unlink()

    # --- files

    def replace(self, name: str, text: str) -> None:
        """Writes a file in one step."""
        path = self.path / name
        with writing(path), replacing(path, durable=True) as partial:
            partial.write_text(text, encoding="utf-8")

    def append(self, line: str) -> None:
        """A line of trials.jsonl, on disk when this returns; on an error it is not there, and neither is half of it."""
        path = self.path / "trials.jsonl"
        with writing(path), path.open("ab", buffering=0) as stream:
            size = stream.tell()
            try:
                rest = memoryview(f"{line}\n".encode())
                while rest:
                    rest = rest[stream.write(rest) or 0 :]
                os.fsync(stream.fileno())
            except BaseException:
                stream.truncate(size)
                raise

    def push(self, names: tuple[str, ...] | None = None) -> None:
        """Uploads files, by default all of the directory's own, when the sweep is kept at a URL."""
        if self.url is not None:
            chosen = [self.path / name for name in names] if names else sorted(self.path.iterdir())
            Store(self.url).put({path.name: path for path in chosen if path.is_file() and path.name[0] != "."})

    def _pull(self) -> None:
        if self.url is None:
            return
        store = Store(self.url)
        infos = store.entries()
        if infos and "sweep.json" not in infos:
            raise LorsError(f"{self}: expected nothing there or a sweep, it has {min(infos)!r}")
        known = self.path / "trials.jsonl"
        behind = known.exists() and known.stat().st_size >= (infos.get("trials.jsonl", {}).get("size") or 0)
        if infos and not behind:
            store.get([name for name in STATE if name in infos], lambda name: self.path / name, infos)

    # --- what workers on other machines need

    def share(self, files: Mapping[str, Path]) -> dict[str, str]:
        """The same files as every worker can open them."""
        if self.url is None:
            return {label: str(path) for label, path in files.items()}
        at = f"{self.url}/cache"
        store = Store(at)
        there = store.listing()
        store.put({path.name: path for path in files.values() if path.name not in there})
        return {label: f"{at}/{path.name}" for label, path in files.items()}

    def clear(self, finished: bool) -> None:
        """Removes what trials shared, if all are done, and the copy of what is at a URL."""
        shutil.rmtree(self.path / "trials", ignore_errors=True)
        if not finished:
            return
        shutil.rmtree(self.path / "cache", ignore_errors=True)
        if self.url is not None:
            store = Store(f"{self.url}/cache")
            store.remove([name for name in store.listing() if name.endswith(".lors.safetensors")])

    def forget(self) -> None:
        """Removes the local copy of a sweep that is complete at its URL."""
        if self.url is not None:
            shutil.rmtree(self.path, ignore_errors=True)


def _before_it_began(name: str) -> bool:
    """Whether a file is of a sweep that was stopped before its plan was there."""
    partial = PARTIAL.fullmatch(name)
    return name in (".lock", ".sweep.json.partial") or (partial is not None and partial["name"] == "sweep.json")


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        plan = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise LorsError(f"{path}: cannot be read: {error}") from None
    if not isinstance(plan, dict):
        raise LorsError(f"{path}: expected the plan of a sweep")
    return plan


def scratch(url: str, what: str) -> Path:
    """A directory of this machine that belongs to a URL."""
    return cache() / f"{what}-{hashlib.sha256(url.encode()).hexdigest()[:32]}"


def load_lines(home: Path, read: Callable[[bytes], T]) -> list[T]:
    """Every line of trials.jsonl; a last one that a kill cut off is dropped."""
    path = home / "trials.jsonl"
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    found = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            found.append(read(line))
        except ValueError as error:
            raise LorsError(f"{path}: line {number}: {_problem(error)}") from None
    return found


def _problem(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return first_line(error)
    place, what = first_problem(error, {})
    return f"{place}: {what}" if place else what
