"""SHA-256 of files, remembered until they change."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from lors.checkpoints.reader import open_checkpoint, sha256_checkpoints
from lors.errors import LorsError
from lors.files import digest
from weights import sha256, write


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LORS_DIGEST_CACHE", raising=False)
    monkeypatch.setattr(digest, "_SETTLED_NS", -(10**12))  # the files of a test are always fresh
    return tmp_path / "cache" / "lors" / "digests"


def test_digests_are_remembered_until_the_file_changes(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(os.urandom(3_000_001))
    assert digest.sha256_file(path) == sha256(path)
    (entry,) = cache.iterdir()
    entry.write_text("a" * 64)
    assert digest.sha256_file(path) == "a" * 64, "the remembered value is used"
    for damaged in (b"", b"\xff\xfe", b"A" * 64, b"a" * 63):
        entry.write_bytes(damaged)
        assert digest.sha256_file(path) == sha256(path)
        assert entry.read_text().strip() == sha256(path), "a damaged entry is written anew"
    entry.write_text("a" * 64)
    times = path.stat()
    path.write_bytes(os.urandom(3_000_001))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digest.sha256_file(path) == sha256(path), "same size and mtime, but ctime tells"


def test_cache_off_unwritable_or_file_fresh(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"weights")
    monkeypatch.setattr(digest, "_SETTLED_NS", 2_000_000_000)
    assert digest.sha256_file(path) == sha256(path) and not cache.exists(), (
        "a fresh file may change under the same times"
    )
    monkeypatch.setattr(digest, "_SETTLED_NS", -(10**12))
    monkeypatch.setenv("LORS_DIGEST_CACHE", "0")
    assert digest.sha256_file(path) == sha256(path) and not cache.exists()
    monkeypatch.delenv("LORS_DIGEST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert digest.sha256_file(path) == sha256(path)


def test_several_files_at_once(tmp_path: Path, cache: Path) -> None:
    paths = [write(tmp_path / name, {name: np.zeros(1000 + ord(name), np.float32)}) for name in "abc"]
    checkpoints = [open_checkpoint(path) for path in paths]
    expected = [{"model.safetensors": sha256(path / "model.safetensors")} for path in paths]
    assert sha256_checkpoints(checkpoints, threads=2) == expected == [one.sha256() for one in checkpoints]
    (paths[1] / "model.safetensors").unlink()
    with pytest.raises(LorsError, match="cannot read .*b/model.safetensors"):
        sha256_checkpoints(checkpoints)
    for one in checkpoints:
        one.close()


def test_an_error_stops_the_other_hashes(tmp_path: Path, cache: Path) -> None:
    big = tmp_path / "big"
    with big.open("wb") as stream:
        stream.truncate(1 << 40)  # sparse: hashing it would take ten minutes
    for paths in ([tmp_path / "missing", big], [big, tmp_path / "missing"]):
        with pytest.raises(LorsError, match="missing"):
            digest.sha256_files(paths, threads=2)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lors-sha256")]


@pytest.mark.parametrize("home", ["blobs", "hub/models--org--whisper/blobs"])
def test_a_name_is_no_digest(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    """Blobs of the hub's cache are named by their SHA-256: until one is damaged, or somebody makes such a name."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    blob = tmp_path / home / ("0" * 64)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"not that digest")
    (tmp_path / "link").symlink_to(blob)
    assert digest.sha256_file(tmp_path / "link") == digest.sha256_file(blob) == sha256(blob)
