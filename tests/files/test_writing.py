"""Disks that are full, read-only or small, in one line."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from helpers import require
from lors.checkpoints.writer import WeightWriter
from lors.errors import LorsError
from lors.files.directory import OutputDirectory
from lors.files.syscalls import preallocate, start_writeback
from lors.files.writing import PARTIAL, replacing, writing
from writers import names, run

F32 = np.dtype(np.float32)
WRITE_8_MB = """
import os, resource, sys
import numpy as np
from lors.checkpoints import writer
from lors.errors import LorsError, LorsWarning
from lors.files.directory import OutputDirectory
target, how = sys.argv[1:]
if how == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))
if how in ("grows", "sidecar"):  # the disk fills after the look at the free space: as if there had been enough
    writer.require_space = lambda path, needed: None
if how == "grows":
    writer.preallocate = os.ftruncate
try:
    with OutputDirectory(target) as out:
        size = 1000 if how == "sidecar" else 1_000_000
        with writer.WeightWriter(out.path, [("a", np.dtype(np.float32), (2, size))]) as weights:
            weights.write("a", np.zeros((2, size), np.float32))
            weights.finish()
        if how == "sidecar":
            out.write_text("vocab.json", "x" * 8_000_000)
        out.commit()
except LorsError as error:
    print(error)
"""


def test_file_size_limit(tmp_path: Path) -> None:
    printed, errors = run(WRITE_8_MB, tmp_path / "out", "limit").communicate()
    assert (
        "the file is too large: 8.00 MB needed, 4.00 MB allowed (ulimit -f)" in printed and printed.count("\n") == 1
    ), errors
    assert names(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True, text=True)
    require("tmpfs", mounted.returncode == 0, f"cannot mount one: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("how", ["early", "grows", "sidecar"])
def test_full_disk(small_disk: Path, how: str) -> None:
    printed, errors = run(WRITE_8_MB, small_disk / "out", how).communicate()
    assert f"cannot write {small_disk}/" in printed and printed.count("\n") == 1, errors
    assert "8.00 MB needed, 3.1" in printed if how == "early" else "the disk is full" in printed
    assert names(small_disk) == []


def test_read_only_file_system(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    printed, errors = run(WRITE_8_MB, small_disk / "out", "early").communicate()
    assert "is not writable" in printed or "read-only" in printed, errors


def test_space_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "out") as out:
        with pytest.raises(LorsError, match="too full: 1000000.00 GB needed, .* free"):
            out.require_space(10**15)
        with pytest.raises(LorsError, match="too full"):
            WeightWriter(out.path, [("a", F32, (10**15,))])
        assert names(out.path) == []


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.ENOSPC, "disk is full: 5 bytes needed"),
        (errno.EIO, "I"),
    ],
)
def test_system_errors_are_one_line(tmp_path: Path, code: int, expected: str) -> None:
    with pytest.raises(LorsError, match=expected), writing(tmp_path, 5):
        raise OSError(code, os.strerror(code))


def test_start_writeback_and_preallocate(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as stream:
        preallocate(stream.fileno(), 1 << 20)
        stat = os.fstat(stream.fileno())
        assert stat.st_size == 1 << 20
        if sys.platform == "linux":
            assert stat.st_blocks * 512 >= 1 << 20, "the space is owned, not only promised"
            assert start_writeback(stream.fileno(), 0, 1 << 20)


# --- one file in one step


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_in_one_step(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "a.json"
    for text in ("one", "two"):
        with replacing(path, durable=durable) as partial:
            partial.write_text(text)
            there = PARTIAL.fullmatch(partial.name)
            assert there is not None and there["name"] == "a.json" and partial.parent == tmp_path
            assert path.exists() == (text == "two") and (text == "one" or path.read_text() == "one")
        assert path.read_text() == text and names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_fails_leaves_the_old_file_alone(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["a.json"]
