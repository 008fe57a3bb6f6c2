"""Writing: the target is absent, the complete old state or the complete new one, whatever happens in between."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lors
from helpers import require
from lors.checkpoints.writer import WeightWriter
from lors.errors import LorsError, LorsWarning
from lors.files import directory
from lors.files.directory import OutputDirectory, sync
from lors.files.lock import Lock
from lors.files.signals import Terminated
from lors.files.writing import require_space, writing
from writers import names, run

F32 = np.dtype(np.float32)


def refusal(path: Path, **options: Any) -> str:
    before = names(path.parent) if path.parent.is_dir() else None
    with pytest.raises(LorsError) as caught:
        OutputDirectory(path, **options)
    assert "\n" not in str(caught.value)
    assert before is None or names(path.parent) == before, "a refusal touches nothing"
    return str(caught.value)


def old_checkpoint(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("old")
    return path


@contextlib.contextmanager
def waiting_writer(target: Path, *, force: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of writing to `target`, until it is killed or its standard input closes."""
    code = """
import sys
from lors.files.directory import OutputDirectory
from lors.files.signals import terminate_cleanly
with terminate_cleanly(), OutputDirectory(sys.argv[1], force=sys.argv[2] == "True") as out:
    out.write_text("config.json", "new")
    print("ready", flush=True)
    sys.stdin.read()
    out.commit()
"""
    process = run(code, target, force, stdin=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            assert stream is not None
            stream.close()


# --------------------------------------------------------------------------------------------------- commit


def test_nothing_is_seen_before_the_commit(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "out"
    with OutputDirectory(target) as out:
        out.write_text("config.json", "new")
        assert not target.exists() and out.path.parent == target.parent
        out.commit()
        assert (target / "config.json").read_text() == "new"
    assert names(target.parent) == ["out"] and names(target) == ["config.json"]


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("atomic", [True, False])
def test_replacing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool, atomic: bool) -> None:
    if not atomic:  # a file system that cannot exchange two names
        monkeypatch.setattr(directory, "exchange", lambda first, second: False)
    target = old_checkpoint(tmp_path / "out")
    (target / "vocab.json").write_text("of the old one")
    inode = target.stat().st_ino
    with OutputDirectory(target, force=True, durable=durable) as out:
        out.write_text("config.json", "new")
        assert (target / "config.json").read_text() == "old"
        out.commit()
    assert names(tmp_path) == ["out"] and names(target) == ["config.json"]
    assert (target / "config.json").read_text() == "new" and target.stat().st_ino != inode


def test_replacing_is_one_step_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two renames are only for file systems that cannot exchange: this one can, so a reader never sees a gap."""
    a, b = old_checkpoint(tmp_path / "a"), tmp_path / "b"
    b.mkdir()
    assert directory.exchange(a, b) and names(b) == ["config.json"] and names(a) == []
    with pytest.raises(FileNotFoundError):
        directory.exchange(a, tmp_path / "c")
    monkeypatch.delattr(Path, "rename")
    with OutputDirectory(b, force=True) as out:
        out.write_text("config.json", "new")
        out.commit()
    assert (b / "config.json").read_text() == "new" and names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, Terminated(signal.SIGTERM)])
@pytest.mark.parametrize("force", [True, False])
def test_anything_else_leaves_no_trace(tmp_path: Path, error: Any, force: bool) -> None:
    target = tmp_path / "new" / "out"
    if force:
        old_checkpoint(target)
    with pytest.raises(error if isinstance(error, type) else type(error)), OutputDirectory(target, force=force) as out:
        out.write_text("config.json", "new")
        (out.path / "sub").mkdir()
        raise error
    if force:
        assert names(target.parent) == ["out"] and (target / "config.json").read_text() == "old"
    else:
        assert names(tmp_path) == [], "parents made for it go too"


def test_leaving_without_commit_is_no_commit(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "out") as out:
        out.write_text("config.json", "new")
    assert names(tmp_path) == []


def test_a_failed_commit_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "exchange", lambda first, second: False)
    target = old_checkpoint(tmp_path / "out")
    rename = Path.rename

    def broken(self: Path, to: Path) -> Path:
        if to == target and self.suffix == ".tmp":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", broken)
    with (
        pytest.raises(LorsError, match="cannot write .*out: Input/output error"),
        OutputDirectory(target, force=True) as out,
    ):
        out.commit()
    assert names(tmp_path) == ["out"] and names(target) == ["config.json"]


def test_target_that_appears_meanwhile(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(LorsError, match="not empty"), OutputDirectory(target) as out:
        old_checkpoint(target)
        out.commit()
    assert names(tmp_path) == ["out"] and names(target) == ["config.json"]


def test_target_that_appears_before_the_lock(tmp_path: Path) -> None:
    late = OutputDirectory(tmp_path / "out")
    old_checkpoint(tmp_path / "out")
    with pytest.raises(LorsError, match="exists already"):
        late.__enter__()
    assert names(tmp_path) == ["out"]


def test_a_lock_whose_file_is_gone_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the lock file and locking it, its holder leaves (removing it) and a third run makes a new one."""
    lock, third = tmp_path / "lock", []
    flock = fcntl.flock

    def late(fd: int, operation: int) -> None:
        if not third:
            lock.unlink()
            third.append(os.open(lock, os.O_RDWR | os.O_CREAT))
            flock(third[0], operation)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    assert Lock.acquire(lock) is None
    os.close(third[0])
    held = Lock.acquire(lock)
    assert held is not None
    held.release()


def test_symbolic_links_are_followed(tmp_path: Path) -> None:
    real = old_checkpoint(tmp_path / "real")
    (tmp_path / "link").symlink_to(real)
    with OutputDirectory(tmp_path / "link", force=True) as out:
        out.write_text("config.json", "new")
        out.commit()
    assert names(tmp_path) == ["link", "real"] and (tmp_path / "link").is_symlink()
    assert (real / "config.json").read_text() == "new"


# ------------------------------------------------------------------------------------------------- refusals


def test_targets_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = old_checkpoint(tmp_path / "old")
    assert "exists already; --force" in refusal(old)
    assert "it is a file" in refusal(old / "config.json", force=True)
    assert "config.json is not a directory" in refusal(old / "config.json" / "out")
    assert "root of the file system" in refusal(Path("/"), force=True)
    package = Path(lors.__file__).resolve().parent
    for place in (package, package / "speech" / "bases" / "mine", package / "x" / "y"):
        assert f"{place}: the output must not be inside {package}, where lors itself" in refusal(place, force=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    assert "replaces only a checkpoint" in refusal(tmp_path / "home", force=True)
    monkeypatch.chdir(old)
    assert "current directory" in refusal(old, force=True)
    assert "File name too long" in str(
        pytest.raises(LorsError, OutputDirectory(tmp_path / ("x" * 240)).__enter__).value
    )
    assert names(tmp_path) == ["home", "old"]


@pytest.mark.parametrize("content", [None, "config.json", "lors_recipe.yml", "model.safetensors"])
def test_what_force_replaces(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "out").mkdir()
    if content:
        (tmp_path / "out" / content).write_text("")
    OutputDirectory(tmp_path / "out", force=True)


def test_inputs_are_never_written_to(tmp_path: Path) -> None:
    model = old_checkpoint(tmp_path / "models" / "base")
    (tmp_path / "link").symlink_to(model)
    for inputs in ([model], [model / "config.json"], [tmp_path / "link"]):
        assert "would replace the input" in refusal(model, force=True, inputs=inputs)
        assert "would replace the input" in refusal(tmp_path / "models", force=True, inputs=inputs)
    assert "must not be inside the input" in refusal(model / "out", inputs=[tmp_path / "link"])
    OutputDirectory(tmp_path / "models" / "base2", inputs=[model])
    OutputDirectory(tmp_path / "models" / "bas", inputs=[model])


def test_unprivileged_refusals(tmp_path: Path) -> None:
    """Root may write anywhere, so another user tries."""
    code = """
import os, sys
from lors.errors import LorsError, LorsWarning
from lors.files.directory import OutputDirectory
if os.getuid() == 0:
    os.seteuid(65534)
try:
    OutputDirectory(sys.argv[1]).__enter__()
except LorsError as error:
    print(error)
"""
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    printed, errors = run(code, "/proc/lors/out").communicate()
    assert printed.startswith("/proc/lors/out: the directory /proc is not writable") or "cannot write" in printed, (
        errors
    )
    if os.getuid():
        assert "is not writable" in run(code, closed / "out").communicate()[0]


# ------------------------------------------------------------------------------- two runs, and killed ones


def test_the_second_run_into_one_target_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "_PATIENCE", 0.1)
    target = tmp_path / "out"
    with waiting_writer(target) as process:
        with pytest.raises(LorsError, match="out: another run is writing to it"), OutputDirectory(target):
            pass
        with OutputDirectory(tmp_path / "neighbour") as out:
            out.commit()
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 0
        with pytest.raises(LorsError, match="exists already"), OutputDirectory(target):
            pass
    assert names(tmp_path) == ["neighbour", "out"] and names(target) == ["config.json"]


def test_one_of_many_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "_PATIENCE", 0.05)
    target = tmp_path / "out"

    def attempt(number: int) -> int:
        try:
            with OutputDirectory(target, force=True, durable=False) as out:
                out.write_text("config.json", str(number))
                out.write_text("training.json", str(number))
                out.commit()
        except LorsError as error:
            assert "another run" in str(error)
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(60))) >= 1
    assert names(tmp_path) == ["out"]
    assert (target / "config.json").read_text() == (target / "training.json").read_text()


@pytest.mark.parametrize("force", [True, False])
def test_kill_9_leaves_the_old_and_the_next_run_cleans(tmp_path: Path, force: bool) -> None:
    target = tmp_path / "out"
    if force:
        old_checkpoint(target)
    with waiting_writer(target, force=force) as process:
        process.kill()
        process.wait(10)
        left = names(tmp_path)
        assert len(left) == 2 + force, "the killed run could not clean"
        assert (target / "config.json").read_text() == "old" if force else not target.exists()
    with OutputDirectory(tmp_path / "neighbour") as out:
        out.commit()
    assert names(tmp_path) == (["neighbour", "out"] if force else ["neighbour"])


def test_kill_9_at_any_moment(tmp_path: Path) -> None:
    code = """
import itertools, sys
from lors.files.directory import OutputDirectory
for number in itertools.count():
    with OutputDirectory(sys.argv[1], force=True, durable=False) as out:
        out.write_text("config.json", str(number))
        out.write_text("training.json", str(number))
        out.commit()
    if number == 0:
        print("ready", flush=True)
"""
    target = tmp_path / "out"
    for moment in range(12):
        process = run(code, target)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.0037 * moment)
        process.kill()
        process.communicate()
        assert names(target) == ["config.json", "training.json"]
        assert (target / "training.json").read_text() == (target / "config.json").read_text() != ""
    with OutputDirectory(tmp_path / "neighbour"):
        pass
    assert [name for name in names(tmp_path) if name.endswith((".tmp", ".old"))] == []


def test_living_runs_are_not_swept(tmp_path: Path) -> None:
    with waiting_writer(tmp_path / "living") as living, waiting_writer(tmp_path / "dead") as dead:
        dead.kill()
        dead.wait(10)
        with OutputDirectory(tmp_path / "dead") as out:
            assert [name for name in names(tmp_path) if ".dead." in name and name.endswith(".tmp")] == [out.path.name]
            out.commit()
        assert living.stdin is not None
        living.stdin.close()
        assert living.wait(10) == 0
    assert names(tmp_path) == ["dead", "living"]


def test_killed_between_the_two_renames(tmp_path: Path) -> None:
    """Without an atomic exchange there is a moment without target: the next run puts the old one back."""
    old_checkpoint(tmp_path / ".out.lors-12-0123abcd.old")
    (tmp_path / ".out.lors-12-0123abcd.tmp").mkdir()
    (tmp_path / ".out.lors.lock").write_text("")
    with OutputDirectory(tmp_path / "neighbour"):
        pass
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "config.json").read_text() == "old"
    old_checkpoint(tmp_path / ".out.lors-12-0123abcd.old")
    with OutputDirectory(tmp_path / "out", force=True):
        pass
    assert names(tmp_path) == ["out"]


def test_files_of_others_are_not_swept(tmp_path: Path) -> None:
    kept = [".out.lors-12-0123abc.tmp", ".out.lors-x-0123abcd.tmp", "out.lors-12-0123abcd.tmp", ".lors-12-0123abcd.tmp"]
    for name in kept:
        (tmp_path / name).mkdir()
    with OutputDirectory(tmp_path / "out"):
        pass
    assert names(tmp_path) == sorted(kept)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_clean_up(tmp_path: Path, signum: signal.Signals) -> None:
    with waiting_writer(tmp_path / "out") as process:
        process.send_signal(signum)
        process.wait(10)
        assert process.returncode == (-signum if signum == signal.SIGINT else 128 + signum)
        assert names(tmp_path) == []


# ------------------------------------------------------------------------------ after the commit, and no locks


@pytest.mark.parametrize("force", [True, False])
def test_a_disk_that_does_not_confirm_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    """The new one is in place: an error would say that it is not."""
    target = old_checkpoint(tmp_path / "out") if force else tmp_path / "out"
    confirm = sync

    def broken(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        confirm(path)

    monkeypatch.setattr(directory, "sync", broken)
    with (
        pytest.warns(LorsWarning, match="out: is in place, but may not survive a power failure: .*Input/output error"),
        OutputDirectory(target, force=force) as out,
    ):
        out.write_text("config.json", "new")
        out.commit()
    assert (target / "config.json").read_text() == "new" and names(tmp_path) == ["out"]


def test_an_old_directory_that_cannot_be_removed_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = old_checkpoint(tmp_path / "out")

    def broken(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with pytest.warns(LorsWarning, match=r"\.tmp: could not be removed"), OutputDirectory(target, force=True) as out:
        out.write_text("config.json", "new")
        out.commit()
        monkeypatch.setattr("shutil.rmtree", broken)
    assert (target / "config.json").read_text() == "new"
    monkeypatch.undo()
    with OutputDirectory(tmp_path / "neighbour"):
        pass
    assert names(tmp_path) == ["out"], "the next run removes it"


def test_what_cannot_be_removed_does_not_hide_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with (
        pytest.warns(LorsWarning, match="could not be removed"),
        pytest.raises(ValueError, match="the reason"),
        OutputDirectory(tmp_path / "out"),
    ):
        monkeypatch.setattr("shutil.rmtree", broken)
        raise ValueError("the reason")


def test_closing_is_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network file systems report here what could not be written."""
    close = os.close

    def broken(fd: int) -> None:
        close(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with WeightWriter(tmp_path, [("a", F32, (3,)), ("b", F32, (3,))], shard_bytes=12) as writer:
        for name in "ab":
            writer.write(name, np.zeros(3, np.float32))
        monkeypatch.setattr(os, "close", broken)
        with pytest.raises(LorsError, match=r"cannot write .*model-0000\d-of-00002.safetensors: Input/output error"):
            writer.finish()
        monkeypatch.undo()
    with pytest.raises(ValueError, match="the reason"), WeightWriter(tmp_path, [], stem="x") as writer:
        monkeypatch.setattr(os, "close", broken)
        raise ValueError("the reason")


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", missing)


@pytest.mark.usefixtures("no_flock")
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "_PATIENCE", 0.1)
    target = old_checkpoint(tmp_path / "out")
    with OutputDirectory(target, force=True) as out:
        out.write_text("config.json", "new")
        with pytest.raises(LorsError, match="another run is writing to it; or one was killed there") as caught:
            OutputDirectory(target, force=True).__enter__()
        out.commit()
    assert names(tmp_path) == ["out"] and (target / "config.json").read_text() == "new"
    # what a killed run leaves: the user is told what to remove
    (tmp_path / ".out.lors.taken").touch()
    with pytest.raises(LorsError, match=r"remove .*\.out\.lors\.taken if none is running") as caught:
        OutputDirectory(target, force=True).__enter__()
    assert "\n" not in str(caught.value)
    (tmp_path / ".out.lors.taken").unlink()
    with OutputDirectory(target, force=True) as out:
        out.commit()
    assert names(tmp_path) == ["out"]


@pytest.mark.usefixtures("no_flock")
def test_a_sweep_needs_locks(tmp_path: Path) -> None:
    from lors.sweep.home import Home

    with pytest.raises(LorsError, match="the file system there has no file locks .*use a directory on another one"):
        Home(tmp_path / "sweep").open().__enter__()


def test_a_disk_without_inodes(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=3m,nr_inodes=8", "tmpfs", disk]
    mounted = subprocess.run(options, capture_output=True, text=True)
    if mounted.returncode:
        require("tmpfs", False, mounted.stderr.strip())
    try:
        for number in range(5):
            (disk / str(number)).touch()
        with (
            pytest.raises(LorsError, match="no room for another file: all 8 inodes are used"),
            OutputDirectory(disk / "o") as out,
        ):
            out.write_text("config.json", "")
        assert names(disk) == [*"01234"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_file_system_that_cannot_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "statvfs", broken)
    require_space(tmp_path, 10**18)
    with pytest.raises(LorsError, match="x: the disk is full$"), writing(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---------------------------------------------------------------------------------------------------- space


def test_durable_commit_syncs_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[str] = set()
    fsync = os.fsync

    def record(fd: int) -> None:
        synced.add(os.path.realpath(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", record)
    with OutputDirectory(tmp_path / "new" / "out") as out:
        out.write_text("a", "")
        (out.path / "sub").mkdir()
        out.write_text("sub/b", "")
        out.commit()
        assert {str(out.path / name) for name in ("a", "sub", "sub/b")} | {str(out.path)} <= synced
    assert {str(tmp_path), str(tmp_path / "new")} <= synced, "the names themselves must survive too"
