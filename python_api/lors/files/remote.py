"""Checkpoints, expert files and results at fsspec URLs: s3://, gs://, abfs://, hdfs://, http://, memory:// ...

    fetch     a URL -> a local copy, made once per state of what is there
    placed    a local place whose content is uploaded when the block ends well

A merge itself reads and writes local files only, at their speed; a URL costs a copy before or after it. Copies lie in
$XDG_CACHE_HOME/lors/remote (~/.cache without the variable) under a digest of the URL and of what the store says of each
file (size, time, tag), so a file that changed is fetched again; where the store tells neither time nor tag, once per
process. Whatever lies there may be deleted.

file:// and local:// URLs are local paths and are never copied. What is printed or stored of a URL is `public`.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import posixpath
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ..errors import LorsError, first_line
from ..public import public, public_text, secrets_of
from .replaceable import MODEL, FileKind, objection_to
from .writing import require_space, writing

__all__ = ["Store", "cache", "fetch", "is_url", "last_part", "local_path", "placed"]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.+", re.DOTALL)  # fsspec's chains (simplecache::s3://...) too
_LOCAL = re.compile(r"(?P<scheme>file|local)://(localhost(?=/))?(?P<path>.+)", re.DOTALL | re.IGNORECASE)
LAST = "README.md"  # of an upload: where it is, all else is

# What stores call the time, tag or digest of a file; memory:// makes a new file of every write.
VALIDATORS = (
    *("mtime", "LastModified", "last_modified", "Last-Modified", "modified", "updated", "created"),
    *("ETag", "etag", "md5", "md5Hash", "content_md5", "Content-MD5", "Digest", "checksum", "generation"),
)


def is_url(text: str | os.PathLike[str]) -> bool:
    """Whether this is a URL rather than a path or a hub id."""
    return isinstance(text, str) and _URL.match(text.rpartition("::")[2]) is not None


def local_path(text: str) -> str | None:
    """The path of a file:// or local:// URL, or the text itself when it is no URL; None for a URL of another machine."""
    if not is_url(text):
        return text
    found = _LOCAL.fullmatch(text)
    if found is None:
        return None
    return unquote(found["path"]) if found["scheme"].lower() == "file" else found["path"]


def last_part(url: str) -> str:
    """What a URL's file or directory is called, or what stands for it in a local name."""
    name = public(url).rstrip("/").rpartition("/")[2]
    return "file" if name in ("", ".", "..") or "\0" in name else name


def cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home, "lors", "remote")


class Store:
    """One URL and the file system that it names; every error of the file system is one line without secrets."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.name = public(self.url)
        try:
            import fsspec
        except ImportError:
            raise LorsError(f"{self.name}: URLs need fsspec: pip install 'lors-merging[remote]'") from None
        with self._errors("cannot be opened"):
            self.fs, self.path = fsspec.core.url_to_fs(self.url)
            self.fs.invalidate_cache()  # of listings: what another program wrote a moment ago counts

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except LorsError:
            raise
        except FileNotFoundError:
            raise LorsError(f"{self.name}: no such file or directory") from None
        except Exception as error:  # every store has errors of its own
            said = public_text(first_line(error))
            for secret in secrets_of(self.url):
                said = said.replace(secret, "...")
            raise LorsError(f"{self.name}: {what}: {said}") from None  # the cause would show what the line does not

    def listing(self) -> dict[str, Mapping[str, Any]]:
        """Relative name -> what the store says of it; {"": ...} for a single file, {} when there is nothing."""
        return {name: info for name, info in self.entries().items() if not name.endswith("/")}

    def entries(self) -> dict[str, Mapping[str, Any]]:
        """`listing`, and directories, whose names end in "/"."""
        with self._errors("cannot be listed"):
            if not self.fs.exists(self.path):
                with contextlib.suppress(FileNotFoundError):  # some stores answer no when they cannot be reached
                    self.fs.info(self.path)
                return {}
            if self.fs.isfile(self.path):
                return {"": self.fs.info(self.path)}
            found = {}
            for entry in self.fs.ls(self.path, detail=True):
                place = entry["name"].rstrip("/")
                name = last_part(place) if is_url(place) else place.rpartition("/")[2]
                if place != self.path.rstrip("/"):  # object stores may hold an object that stands for the directory
                    found[name if entry["type"] == "file" else f"{name}/"] = entry
        return found

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

    def head(self, size: int) -> bytes:
        """The first bytes of the file."""
        with self._errors("cannot be read"):
            return bytes(self.fs.cat_file(self.path, start=0, end=size))

    def at(self, name: str) -> str:
        if not name:
            return str(self.path)
        place, mark, query = self.path.partition("?") if is_url(self.path) else (self.path, "", "")
        return f"{place.rstrip('/')}/{name}{mark}{query}"

    def state(self, infos: Mapping[str, Mapping[str, Any]]) -> str:
        """A digest that changes when one of the files does, as far as the store tells.

        Of a file of which it tells nothing but the size, every process has a state of its own.
        """
        seen = sorted(
            (name, [str(info.get(key)) for key in ("size", "ino", *VALIDATORS)]) for name, info in infos.items()
        )
        told = (self.url, seen, _PROCESS if _silent(infos) else "")
        return hashlib.sha256(repr(told).encode("utf-8", "surrogateescape")).hexdigest()[:32]


_PROCESS = secrets.token_hex(8)


def _silent(infos: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the store tells of a file nothing but its size."""
    return any(all(info.get(key) is None for key in VALIDATORS) for info in infos.values())


def fetch(url: str, patterns: Sequence[Sequence[str]]) -> Path:
    """A local copy of a file, or of the files of a directory that match; LorsError in one line.

    patterns: alternatives of file name patterns, the first that matches a weight file counts; each begins with those.
    """
    if (local := local_path(url)) is not None:
        return Path(local)
    store = Store(url)
    infos = store.listing()
    if not infos:
        raise LorsError(f"{store.name}: there is no file at this URL")
    if "" not in infos:
        infos = _wanted(store.name, infos, patterns)
    home = cache() / store.state(infos)
    target = home / last_part(store.url)
    if not target.exists():
        _copy(store, infos, home, target)
        if _silent(infos):
            atexit.register(
                shutil.rmtree, home, ignore_errors=True
            )  # nobody can tell later whether it is still the same
    return target


def _wanted(
    name: str, infos: Mapping[str, Mapping[str, Any]], patterns: Sequence[Sequence[str]]
) -> dict[str, Mapping[str, Any]]:
    for chosen in patterns:
        found = {name: info for name, info in infos.items() if any(fnmatch(name, pattern) for pattern in chosen)}
        if any(fnmatch(name, chosen[0]) or fnmatch(name, chosen[1]) for name in found):
            return found
    raise LorsError(f"{name}: no weights there: expected {' or '.join(chosen[0] for chosen in patterns)}")


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
            raise LorsError(f"cannot write {target}: the copy of {store.name} could not take its place")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# --- writing


@contextlib.contextmanager
def placed(
    out: str | os.PathLike[str],
    force: bool = False,
    *,
    inputs: Iterable[str | os.PathLike[str] | None] = (),
    kind: FileKind | None = None,
) -> Iterator[str | os.PathLike[str]]:
    """Where to write what shall be at `out`: there, or for a URL a local place that is uploaded when the block ends well.

    Object stores cannot rename a directory: its files appear one after the other, README.md last. LorsError when there
    is something at the URL already, unless `force` and it is what `replaceable` allows: a checkpoint, or with `kind` a
    file of that kind; or when the URL is one of the `inputs`, holds one, or is inside one.
    """
    if not isinstance(out, str) or (local := local_path(out)) is not None:
        yield out if not isinstance(out, str) else str(local)
        return
    _require_apart(out, inputs)
    store = Store(out)
    _require_replaceable(store, force, kind)
    home = cache() / f"out-{secrets.token_hex(8)}"
    with writing(home):
        home.mkdir(parents=True)
    try:
        written = home / last_part(store.url)
        yield str(written)
        if written.exists():  # a rehearsal writes nothing
            _upload(store, written, force, kind)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _require_apart(out: str, inputs: Iterable[str | os.PathLike[str] | None]) -> None:
    scheme, place = _place(out)
    for other in inputs:
        if other is None or _place(other)[0] != scheme:
            continue
        there, shown = _place(other)[1], public(os.fspath(other))
        if there == place or there.startswith(f"{place}/"):
            raise LorsError(f"{public(out)}: the output would replace the input {shown}")
        if place.startswith(f"{there}/"):
            raise LorsError(f"{public(out)}: the output must not be inside the input {shown}")


def _place(name: str | os.PathLike[str]) -> tuple[str, str]:
    """What is equal for two names of one place: the file system, and host and path in it."""
    text = os.fspath(name)
    last = text.rpartition("::")[2] if is_url(text) else text
    if (local := local_path(last)) is not None:
        return "file", os.path.realpath(os.path.expanduser(local))
    from fsspec.registry import known_implementations

    scheme, _, place = public(last).partition("://")
    known = known_implementations.get(scheme.lower(), {})
    return known.get("class", scheme.lower()), posixpath.normpath(place.strip("/"))


def _require_replaceable(store: Store, force: bool, kind: FileKind | None) -> None:
    there = store.entries()
    if not there:
        return
    if ("" in there) != (kind is not None):
        expected, got = ("directory", "file") if kind is None else ("file", "directory")
        raise LorsError(f"{store.name}: expected a {expected} to write, it is a {got}")
    if not force:
        raise LorsError(f"{store.name}: exists already; --force replaces it")
    if kind is None:
        if reason := objection_to(list(there)):
            raise LorsError(f"{store.name}: {reason}")
    elif (head := store.head(kind.offset + len(kind.begins))) and head[kind.offset :] != kind.begins:
        raise LorsError(f"{store.name}: only {kind.called} may be replaced, and this is none")


def _upload(store: Store, local: Path, force: bool, kind: FileKind | None) -> None:
    """Makes what is at the URL a local file or the files of a local directory; on an error what is new is removed again."""
    _require_replaceable(store, force, kind)  # something may have come there meanwhile
    files = {"": local} if local.is_file() else {path.name: path for path in local.iterdir()}
    names = sorted(files, key=lambda name: (name == LAST, name))
    before = store.listing()
    try:
        if LAST in before:
            store.remove([LAST])  # incomplete from here on
        store.put({name: files[name] for name in names})
        store.remove([name for name in before if name not in files and re.fullmatch(MODEL.entries, name)])
    except BaseException:
        with contextlib.suppress(LorsError):  # the reason why writing failed is the one to tell
            store.remove([name for name in store.listing() if name in files and name not in before])
        raise
