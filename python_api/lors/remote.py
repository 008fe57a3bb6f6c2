"""Checkpoints, expert files and results at fsspec URLs: s3://, gs://, abfs://, hdfs://, http://, memory:// ...

    fetch     a URL -> a local copy, made once per state of what is there
    placed    a local place whose content is uploaded when the block ends well

A merge itself reads and writes local files only, at their speed; a URL costs a copy before or after it. Copies lie in
$XDG_CACHE_HOME/lors/remote (~/.cache without the variable) under a digest of the URL and of what the store says of each
file (size, time, tag), so a file that changed is fetched again. Whatever lies there may be deleted.

file:// URLs are local paths and are never copied.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from .errors import LorsError
from .output import require_space, writing

__all__ = ["Store", "cache", "fetch", "is_url", "last_part", "local_path", "placed"]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.+", re.DOTALL)  # fsspec's chains (simplecache::s3://...) too
LAST = "README.md"  # of an upload: where it is, all else is


def is_url(text: str | os.PathLike[str]) -> bool:
    """Whether this is a URL rather than a path or a hub id."""
    return isinstance(text, str) and _URL.match(text.rpartition("::")[2]) is not None


def local_path(text: str) -> str | None:
    """The path of a file:// URL, or the text itself when it is no URL; None for a URL of another machine."""
    if not is_url(text):
        return text
    return unquote(text.removeprefix("file://")) if text.startswith("file:///") else None


def last_part(url: str) -> str:
    """What a URL's file or directory is called."""
    return url.rstrip("/").rpartition("/")[2]


def cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home, "lors", "remote")


class Store:
    """One URL and the file system that it names; every error of the file system is one line."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            import fsspec
        except ImportError:
            raise LorsError(f"{url}: URLs need fsspec: pip install 'lors-merging[remote]'") from None
        with self._errors("cannot be opened"):
            self.fs, self.path = fsspec.core.url_to_fs(self.url)
            self.fs.invalidate_cache()  # of listings: what another program wrote a moment ago counts

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except LorsError:
            raise
        except FileNotFoundError as error:
            raise LorsError(f"{self.url}: no such file or directory") from error
        except Exception as error:  # every store has errors of its own
            lines = str(error).strip().splitlines()
            raise LorsError(f"{self.url}: {what}: {lines[0] if lines else type(error).__name__}") from error

    def listing(self) -> dict[str, Mapping[str, Any]]:
        """Relative name -> what the store says of it; {"": ...} for a single file, {} when there is nothing."""
        with self._errors("cannot be listed"):
            if not self.fs.exists(self.path):
                with contextlib.suppress(FileNotFoundError):  # some stores answer no when they cannot be reached
                    self.fs.info(self.path)
                return {}
            if self.fs.isfile(self.path):
                return {"": self.fs.info(self.path)}
            entries = self.fs.ls(self.path, detail=True)
        return {last_part(entry["name"]): entry for entry in entries if entry["type"] == "file"}

    def get(self, names: Sequence[str], into: Callable[[str], Path], infos: Mapping[str, Mapping[str, Any]]) -> None:
        """Fetches files; LorsError unless all of each came."""
        with self._errors("cannot be read"):
            self.fs.get([self.at(name) for name in names], [str(into(name)) for name in names])
        for name in names:
            wanted, got = infos[name].get("size"), into(name).stat().st_size
            if wanted is not None and wanted != got:
                raise LorsError(f"{self.at(name)}: cannot be read: expected {wanted} bytes, got {got}")

    def put(self, files: Mapping[str, Path]) -> None:
        """Uploads local files under these names."""
        with self._errors("cannot be written"):
            self.fs.makedirs(self.path if "" not in files else self.path.rpartition("/")[0], exist_ok=True)
            for name, file in files.items():
                self.fs.put_file(str(file), self.at(name))

    def remove(self, names: Sequence[str]) -> None:
        with self._errors("cannot be removed"):
            for name in names:
                self.fs.rm_file(self.at(name))

    def at(self, name: str) -> str:
        return f"{self.path}/{name}" if name else str(self.path)

    def state(self, infos: Mapping[str, Mapping[str, Any]]) -> str:
        """A digest that changes when one of the files does, as far as the store tells."""
        told = ("size", "mtime", "LastModified", "last_modified", "updated", "created", "ETag", "etag", "md5", "ino")
        seen = sorted((name, [str(info.get(key)) for key in told]) for name, info in infos.items())
        return hashlib.sha256(repr((self.url, seen)).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def fetch(url: str, patterns: Sequence[Sequence[str]]) -> Path:
    """A local copy of a file, or of the files of a directory that match; LorsError in one line.

    patterns: alternatives of file name patterns, the first that matches a weight file counts; each begins with those.
    """
    if (local := local_path(url)) is not None:
        return Path(local)
    store = Store(url)
    infos = store.listing()
    if not infos:
        raise LorsError(f"{url}: there is no file at this URL")
    if "" not in infos:
        infos = _wanted(url, infos, patterns)
    home = cache() / store.state(infos)
    target = home / last_part(store.url)
    if not target.exists():
        _copy(store, infos, home, target)
    return target


def _wanted(
    url: str, infos: Mapping[str, Mapping[str, Any]], patterns: Sequence[Sequence[str]]
) -> dict[str, Mapping[str, Any]]:
    for chosen in patterns:
        found = {name: info for name, info in infos.items() if any(fnmatch(name, pattern) for pattern in chosen)}
        if any(fnmatch(name, chosen[0]) or fnmatch(name, chosen[1]) for name in found):
            return found
    raise LorsError(f"{url}: no weights there: expected {' or '.join(chosen[0] for chosen in patterns)}")


def _copy(store: Store, infos: Mapping[str, Mapping[str, Any]], home: Path, target: Path) -> None:
    """Appears complete or not at all; of two that fetch at once, one wins and both find it."""
    partial = home.with_name(f"{home.name}.{secrets.token_hex(4)}.tmp")
    try:
        with writing(partial):
            require_space(partial, sum(info.get("size") or 0 for info in infos.values()))
            inside = partial / target.name
            (partial if "" in infos else inside).mkdir(parents=True)
        store.get(list(infos), lambda name: inside / name if name else inside, infos)
        with contextlib.suppress(OSError):  # another process was first: its copy is as good
            partial.rename(home)
        if not target.exists():
            raise LorsError(f"cannot write {target}: the copy of {store.url} could not take its place")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def placed(out: str | os.PathLike[str], force: bool = False) -> Iterator[str | os.PathLike[str]]:
    """Where to write what shall be at `out`: there, or for a URL a local place that is uploaded when the block ends well.

    Object stores cannot rename a directory: its files appear one after the other, README.md last. LorsError when there
    is something at the URL already, unless `force`; then what the new directory has not is removed.
    """
    if not isinstance(out, str) or (local := local_path(out)) is not None:
        yield out if not isinstance(out, str) else str(local)
        return
    store = Store(out)
    if store.listing() and not force:
        raise LorsError(f"{out}: exists already; --force replaces it")
    home = cache() / f"out-{secrets.token_hex(8)}"
    with writing(home):
        home.mkdir(parents=True)
    try:
        written = home / last_part(store.url)
        yield str(written)
        if written.exists():  # a rehearsal writes nothing
            replace(out, written)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def replace(url: str, local: Path) -> None:
    """Makes what is at the URL a local file or the files of a local directory; on an error what is new is removed again."""
    store = Store(url)
    files = {"": local} if local.is_file() else {path.name: path for path in local.iterdir()}
    names = sorted(files, key=lambda name: (name == LAST, name))
    before = store.listing()
    try:
        if LAST in before:
            store.remove([LAST])  # incomplete from here on
        store.put({name: files[name] for name in names})
        store.remove([name for name in before if name not in files and name != LAST])
    except LorsError:
        with contextlib.suppress(LorsError):  # the reason why writing failed is the one to tell
            store.remove([name for name in store.listing() if name in files and name not in before])
        raise
