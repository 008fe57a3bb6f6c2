"""Writing: the target is absent, the complete old state or the complete new one, whatever happens in between."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import require
from lors.checkpoints.reader import open_checkpoint
from lors.checkpoints.tensor_info import DTYPES
from lors.checkpoints.writer import OpenAIWriter, WeightWriter
from lors.errors import LorsError, LorsWarning
from lors.files import directory
from lors.files.directory import OutputDirectory, sync
from lors.files.lock import Lock
from lors.files.signals import Terminated
from lors.files.syscalls import preallocate, start_writeback
from lors.files.writing import require_space, writing

F32 = np.dtype(np.float32)


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path))


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


def run(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """A Python process with `code`, its output as text."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    # a background job inherits an ignored SIGINT; the program must see a real one
    options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


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


# -------------------------------------------------------------------------------------------------- weights


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    specs=st.lists(
        st.tuples(
            st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3"]),
            st.lists(st.integers(0, 5), max_size=3),
        ),
        min_size=1,
        max_size=8,
    ),
    shard_bytes=st.sampled_from([1, 64, 10**9]),
    metadata=st.sampled_from([None, {}, {"format": "pt", "naïve": "ключ"}]),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, specs: Any, shard_bytes: int, metadata: Any, seed: int
) -> None:
    """Random tensors in random pieces: read back by the safetensors package and by ours, aligned, every bit equal."""
    rng = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp("round")
    tensors: dict[str, np.ndarray] = {}
    for index, (code, shape) in enumerate(specs):
        size = int(np.prod(shape)) * DTYPES[code].itemsize
        content = rng.integers(0, 2 if code == "BOOL" else 256, size, dtype=np.uint8)
        tensors[f"t.{index} “"] = content.view(DTYPES[code]).reshape(shape)
    with WeightWriter(
        path,
        [(name, value.dtype, value.shape) for name, value in tensors.items()],
        shard_bytes=shard_bytes,
        metadata=metadata,
    ) as writer:
        pieces = []
        for name, value in tensors.items():
            cuts = sorted({0, value.size, *rng.integers(0, value.size + 1, 3).tolist()})
            pieces += [(name, start, stop) for start, stop in zip(cuts, cuts[1:], strict=False)]
        for name, start, stop in rng.permutation(np.array(pieces, dtype=object)) if pieces else []:
            writer.write(str(name), tensors[str(name)].reshape(-1)[start:stop], start)
        written = writer.finish()
    assert sorted(names(path)) == sorted(file.name for file in written)
    files = [file for file in written if file.suffix == ".safetensors"]
    theirs = [entry for file in files for entry in safetensors.deserialize(file.read_bytes())]
    assert {name: (tuple(v["shape"]), bytes(v["data"])) for name, v in theirs} == {
        name: (value.shape, value.tobytes()) for name, value in tensors.items()
    }
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.metadata == ({"format": "pt"} if metadata is None else metadata)
        for name, value in tensors.items():
            assert checkpoint.tensors[name].offset % value.dtype.itemsize == 0
            assert checkpoint.read(name).tobytes() == value.tobytes() and checkpoint.read(name).dtype == value.dtype


def test_shards_and_index_as_transformers_has_them(tmp_path: Path) -> None:
    specs = [("a", F32, (100,)), ("b", F32, (10,)), ("c", np.dtype(np.float16), (10,)), ("d", F32, (5,))]
    with WeightWriter(tmp_path, specs, shard_bytes=60) as writer:
        for name, dtype, shape in specs:
            writer.write(name, np.zeros(shape, dtype))
        writer.finish()
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert names(tmp_path) == sorted([*files, "model.safetensors.index.json"])
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_parameters": 125, "total_size": 480},
        "weight_map": {"a": files[0], "b": files[1], "c": files[1], "d": files[2]},
    }


def test_writes_from_many_threads(tmp_path: Path) -> None:
    specs = [(f"t{i}", F32, (64, 1000)) for i in range(4)]
    pieces = [(name, start) for name, _, _ in specs for start in range(0, 64_000, 500)]
    with WeightWriter(tmp_path, specs, shard_bytes=300_000) as writer:
        with ThreadPoolExecutor(8) as pool:
            done = pool.map(lambda p: writer.write(p[0], np.arange(p[1], p[1] + 500, dtype=np.float32), p[1]), pieces)
            assert len(list(done)) == len(pieces)
        writer.finish()
    with open_checkpoint(tmp_path) as checkpoint:
        for name, _, _ in specs:
            np.testing.assert_array_equal(checkpoint.read(name).reshape(-1), np.arange(64_000, dtype=np.float32))


def test_holes_and_double_writes_are_bugs_that_show(tmp_path: Path) -> None:
    specs = [("a", F32, (4, 2)), ("b", F32, (1,))]
    with WeightWriter(tmp_path, specs) as writer:
        writer.write("b", np.zeros(1, np.float32))
        writer.write("a", np.zeros(4, np.float32), 0)
        with pytest.raises(RuntimeError, match=r"1 tensors are not completely written, first 'a' \(4 elements\)"):
            writer.finish()
        for array, start, message in [
            (np.zeros(4, np.float32), 3, "written twice"),
            (np.zeros(5, np.float32), 4, "not within"),
            (np.zeros(1, np.float32), -1, "not within"),
            (np.zeros(4, np.float64), 4, "declared as float32, got float64"),
        ]:
            with pytest.raises(ValueError, match=message):
                writer.write("a", array, start)
        writer.write("a", np.arange(8, dtype=np.float32)[::2], 4)  # not contiguous
        writer.finish()
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read("a").reshape(-1).tolist() == [0, 0, 0, 0, 0, 2, 4, 6]
    for names_ in (["x", "x"], ["__metadata__"]):
        with pytest.raises(ValueError, match="names must be unique"):
            WeightWriter(tmp_path, [(name, F32, ()) for name in names_])
    with pytest.raises(LorsError, match="File exists"):
        WeightWriter(tmp_path, specs)


def test_openai_pt_round_trip(tmp_path: Path) -> None:
    import torch

    codes = ["F32", "F16", "BF16", "F8_E4M3", "I64", "BOOL"]
    tensors = {code: np.arange(6).reshape(2, 3).astype(DTYPES[code]) for code in codes}
    with OpenAIWriter(tmp_path / "x.pt", [(n, v.dtype, v.shape) for n, v in tensors.items()], {"n_mels": 80}) as writer:
        for name, value in tensors.items():
            writer.write(name, value.reshape(-1)[2:], 2)
            if name == "F32":
                with pytest.raises(RuntimeError, match="6 tensors"):
                    writer.finish()
            writer.write(name, value.reshape(-1)[:2])
        assert writer.finish() == [tmp_path / "x.pt"]
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert loaded["dims"] == {"n_mels": 80}
    assert loaded["model_state_dict"]["BF16"].dtype == torch.bfloat16
    for name, value in tensors.items():
        assert loaded["model_state_dict"][name].double().tolist() == value.astype(float).tolist()
    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        assert all(checkpoint.read(name).tobytes() == value.tobytes() for name, value in tensors.items())


# ---------------------------------------------------------------------------------------------------- space

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


def test_start_writeback_and_preallocate(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as stream:
        preallocate(stream.fileno(), 1 << 20)
        stat = os.fstat(stream.fileno())
        assert stat.st_size == 1 << 20
        if sys.platform == "linux":
            assert stat.st_blocks * 512 >= 1 << 20, "the space is owned, not only promised"
            assert start_writeback(stream.fileno(), 0, 1 << 20)
