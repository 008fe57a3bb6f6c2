"""Unlucky days: kills at random moments, two writers, full and read-only disks, very many and very large tensors.

LORS_KILLS=N kills N times per operation (CI: 100), LORS_BIG_TENSOR_MB=N merges a tensor of N megabytes (asked for: 4096).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import hostile_jobs
import lors
import tiny
from helpers import require
from lors.checkpoints.reader import open_checkpoint
from lors.checkpoints.writer import WeightWriter
from lors.errors import LorsError
from lors.experts.decompose import decompose
from lors.experts.expert_source import open_expert
from lors.merging.edit import edit
from lors.merging.ledger import Ledger

KILLS = int(os.environ.get("LORS_KILLS", "8"))
BIG = int(os.environ.get("LORS_BIG_TENSOR_MB", "128"))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("family")
    found = {name: str(path) for name, path in tiny.family(root, ("ca", "de")).items()}
    for name in ("ca", "de"):
        found[f"{name}.file"] = decompose(found["base"], found[name], root / f"{name}.lors.safetensors", name=name).path
    return found


def digest(path: Path) -> str | None:
    """Of everything in a directory, or of a file; None when there is nothing."""
    if not path.exists():
        return None
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


def kill_at_random(seed: int, span: float, job: str, *arguments: object) -> bool:
    """Runs a job and kills it within `span` seconds; whether the kill came before its end."""
    process = hostile_jobs.start(job, *arguments)
    time.sleep(random.Random(seed).uniform(0, span))
    process.kill()
    process.join()
    return process.exitcode == -9


def in_time(hits: int, kills: int) -> None:
    """Most kills must have met a job that was still at work (shown by `pytest -s`)."""
    print(f"{hits} of {kills} kills came before the end")
    assert hits > kills // 4


def seconds(job: str, *arguments: object) -> float:
    hostile_jobs.start("nothing").join()  # the first job waits for the server that starts them
    begun = time.monotonic()
    process = hostile_jobs.start(job, *arguments)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - begun


# --- kills


def test_killed_merges_leave_the_old_or_the_new(family: dict[str, str], tmp_path: Path) -> None:
    out, experts = tmp_path / "out", {"ca": family["ca"], "de": family["de"]}
    lors.merge(family["base"], {"ca": family["ca"]}, out)
    old = digest(out)
    arguments = ("merge", family["base"], experts, str(out), True)
    hostile_jobs.start(*arguments).join()  # starts the server too
    new = digest(out)
    span, hits = seconds(*arguments), 0
    for number in range(KILLS):
        hits += kill_at_random(number, span, *arguments)
        assert digest(out) in (old, new) and new != old, f"kill {number}"
    in_time(hits, KILLS)
    lors.merge(family["base"], experts, out, force=True)
    assert digest(out) == new and os.listdir(tmp_path) == ["out"], "the next run cleans up after the killed"


def test_killed_edits_leave_the_old_or_the_new(family: dict[str, str], tmp_path: Path) -> None:
    """Add and remove by turns; after a kill the ledger and the weights belong together."""
    out = tmp_path / "out"
    lors.merge(family["base"], {"ca": family["ca.file"]}, out)
    span = seconds("edit", str(out), family["de.file"], False)
    weights, hits = {1: set[str](), 2: set[str]()}, 0
    edit(out, family["de.file"], remove=True)
    for number in range(2 * KILLS):
        ledger, before = Ledger.load(out), digest(out)
        count = len(ledger.experts)
        hits += kill_at_random(number, span, "edit", str(out), family["de.file"], count == 2)
        after = Ledger.load(out)
        with open_checkpoint(out) as checkpoint:
            weights[len(after.experts)].add(checkpoint.sha256()["model.safetensors"])
        assert after.edits - ledger.edits == abs(len(after.experts) - count) <= 1
        assert (digest(out) == before) == (after.edits == ledger.edits)
        assert lors.Recipe.load(out / "lors_recipe.yml").labels == tuple(expert.name for expert in after.experts)
    # every edit rounds once: the same number of experts is the same model up to that, and never a mixture
    assert not weights[1] & weights[2]
    in_time(hits, 2 * KILLS)
    edit(out, family["de.file"], remove=len(Ledger.load(out).experts) == 2)
    assert os.listdir(tmp_path) == ["out"]


def test_killed_decompositions_leave_the_old_or_the_new(family: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "x.lors.safetensors"
    decompose(family["base"], family["de"], out)
    old = digest(out)
    arguments = ("decompose", family["base"], family["ca"], str(out))
    span, hits = seconds(*arguments), 0
    new = digest(out)
    for number in range(KILLS):
        hits += kill_at_random(number, span, *arguments)
        assert digest(out) in (old, new) and old != new
        open_expert(out).checkpoint.close()
    in_time(hits, KILLS)
    decompose(family["base"], family["ca"], out, force=True)
    assert os.listdir(tmp_path) == ["x.lors.safetensors"]


def test_killed_sweeps_lose_nothing_that_was_finished(family: dict[str, str], tmp_path: Path) -> None:
    """Trials that are on record stay, in their order; in the end there is each once, with the score of an undisturbed run."""
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"merge_method: lors\nbase_model: {family['base']}\nmodels: [{{model: {family['ca']}}}]\n")
    hostile_jobs.start("sweep", str(recipe), str(tmp_path / "want")).join()
    span = seconds("sweep", str(recipe), str(tmp_path / "again"))
    want = {
        trial["number"]: trial["values"]
        for trial in json.loads((tmp_path / "want" / "trials.json").read_text())["trials"]
    }
    hits, round_ = 0, 0
    for number in range(KILLS):
        out = tmp_path / f"s{round_}"
        log = out / "trials.jsonl"
        before = log.read_bytes() if log.exists() else b""
        hits += kill_at_random(number, span, "sweep", str(recipe), str(out))
        after = log.read_bytes() if log.exists() else b""
        assert after.startswith(before[: before.rfind(b"\n") + 1]), f"kill {number}"
        if (out / "index.html").exists() or number == KILLS - 1:
            hostile_jobs.start("sweep", str(recipe), str(out)).join()
            trials = json.loads((out / "trials.json").read_text())["trials"]
            assert len(trials) == 6 and {trial["number"]: trial["values"] for trial in trials} == want
            assert not (out / "trials").exists() and not (out / "cache").exists()
            round_ += 1
    in_time(hits, KILLS)


# --- two at once


def test_two_merges_into_one_directory(family: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One wins; the other says so. Whoever it is, the result is one of the two."""
    lors.merge(family["base"], {"ca": family["ca"]}, tmp_path / "ca")
    lors.merge(family["base"], {"de": family["de"]}, tmp_path / "de")
    wanted = {name: open_checkpoint(tmp_path / name).sha256()["model.safetensors"] for name in ("ca", "de")}
    for round_ in range(3):
        out = tmp_path / f"out{round_}"
        code = "import sys; from lors.cli import main; main()"
        runs = [
            subprocess.Popen(
                [sys.executable, "-c", code, "merge", str(out), "--base", family["base"], "--expert", f"{name}={family[name]}", "-q"],
                stderr=subprocess.PIPE, text=True,
            )
            for name in ("ca", "de")
        ]  # fmt: skip
        errors = [run.communicate()[1] for run in runs]
        codes = sorted(run.returncode for run in runs)
        assert codes == [0, 2], errors
        assert any("another run is writing to it" in error or "exists already" in error for error in errors), errors
        winner = ("ca", "de")[[run.returncode for run in runs].index(0)]
        with open_checkpoint(out) as checkpoint:
            assert checkpoint.sha256()["model.safetensors"] == wanted[winner]


def test_an_edit_of_a_model_that_is_being_edited(family: dict[str, str], tmp_path: Path) -> None:
    lors.merge(family["base"], {"ca": family["ca.file"]}, tmp_path / "out")
    runs = [hostile_jobs.start("edit", str(tmp_path / "out"), family["de.file"], False) for _ in range(3)]
    for run in runs:
        run.join()
    # patient for a second: a second one that gets its turn finds the expert merged already
    assert sorted(run.exitcode or 0 for run in runs) == [0, 2, 2]
    assert [expert.name for expert in Ledger.load(tmp_path / "out").experts] == ["ca", "de"]


# --- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own; skipped where none may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    require("tmpfs", mounted.returncode == 0, f"cannot mount one: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_and_a_read_only_one(family: dict[str, str], small_disk: Path) -> None:
    lors.merge(family["base"], {"ca": family["ca.file"]}, small_disk / "out")
    before = digest(small_disk / "out")
    (small_disk / "ballast").write_bytes(b"x" * 400_000)
    for attempt in (
        lambda: edit(small_disk / "out", family["de.file"]),
        lambda: decompose(family["base"], family["de"], small_disk / "de.lors.safetensors"),
    ):
        with pytest.raises(LorsError, match="too full|disk is full"):
            attempt()
        assert sorted(os.listdir(small_disk)) == ["ballast", "out"] and digest(small_disk / "out") == before
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for attempt in (
        lambda: edit(small_disk / "out", family["de.file"]),
        lambda: decompose(family["base"], family["de"], small_disk / "de.lors.safetensors"),
    ):
        with pytest.raises(LorsError, match="not writable|read-only"):
            attempt()
    assert digest(small_disk / "out") == before


@pytest.mark.timeout(20)
def test_a_pipe_is_no_input(family: dict[str, str], tmp_path: Path) -> None:
    """Nothing waits for a writer that may never come."""
    os.mkfifo(tmp_path / "ca.lors.safetensors")
    os.mkfifo(tmp_path / "recipe.yml")
    for name in ("config.json", "model.safetensors"):
        shutil.copytree(family["ca"], tmp_path / name)
        os.remove(tmp_path / name / name)
        os.mkfifo(tmp_path / name / name)
    for attempt in (
        lambda: open_expert(tmp_path / "ca.lors.safetensors"),
        lambda: lors.merge(family["base"], {"ca": tmp_path / "config.json"}, tmp_path / "out"),
        lambda: lors.merge(tmp_path / "model.safetensors", {"ca": family["ca"]}, tmp_path / "out"),
        lambda: lors.Recipe.load(tmp_path / "recipe.yml"),
    ):
        with pytest.raises(LorsError, match="expected a file"):
            attempt()
    assert not (tmp_path / "out").exists()


# --- many and large


def checkpoint(path: Path, shapes: dict[str, tuple[int, ...]], fill: float) -> Path:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "whisper"}')
    with WeightWriter(
        path, [(name, np.dtype(np.float16), shape) for name, shape in shapes.items()], early_writeback=False
    ) as writer:
        for name, shape in shapes.items():
            size, step = int(np.prod(shape)), 1 << 22
            for start in range(0, size, step):
                count = min(step, size - start)
                writer.write(name, (np.arange(count) % 1009 * 1e-3 + fill).astype(np.float16), start)
        writer.finish()
    return path


def test_ten_thousand_tiny_tensors(tmp_path: Path) -> None:
    def layers(count: int) -> dict[str, tuple[int, ...]]:
        matrices: dict[str, tuple[int, ...]] = {f"model.layers.{i}.fc1.weight": (2, 3) for i in range(count)}
        return matrices | {f"model.layers.{i}.fc1.bias": (3,) for i in range(count)}

    options = {"rank": 1, "target": {"include": "fc1.weight$"}}
    base, expert = checkpoint(tmp_path / "base", layers(5000), 0.0), checkpoint(tmp_path / "ca", layers(5000), 0.5)
    report = lors.merge(base, {"ca": expert}, tmp_path / "out", lam=1.0, durable=False, **options)
    assert (report.tensors, report.decomposed) == (10_000, 5000)
    base, expert = checkpoint(tmp_path / "base2", layers(500), 0.0), checkpoint(tmp_path / "ca2", layers(500), 0.5)
    made = decompose(base, expert, tmp_path / "ca.lors.safetensors", **options)
    lors.merge(base, {"ca": made.path}, tmp_path / "b", lam=1.0, durable=False, **options)
    with open_checkpoint(tmp_path / "out") as a, open_checkpoint(tmp_path / "b") as b:
        assert len(a.tensors) == 10_000 and len(b.tensors) == 1000
        assert all(np.allclose(a.read(name), b.read(name), atol=2e-3) for name in list(b.tensors)[::17])


@pytest.mark.timeout(max(300, BIG))  # the whole of it is hashed, read and written several times
def test_a_large_tensor_needs_little_memory(tmp_path: Path) -> None:
    shapes = {"model.decoder.embed_tokens.weight": (BIG * 1024, 512), "model.layers.0.fc1.weight": (8, 8)}  # float16
    base, expert = checkpoint(tmp_path / "base", shapes, 0.0), checkpoint(tmp_path / "ca", shapes, 0.25)
    code = f"""
import lors
from lors.engine.report import peak_memory
lors.merge({str(base)!r}, {{"ca": {str(expert)!r}}}, {str(tmp_path / "out")!r}, rank=1, lam=1.0, durable=False)
from lors.experts.decompose import decompose
decompose({str(base)!r}, {str(expert)!r}, {str(tmp_path / "x.lors.safetensors")!r}, rank=1)
lors.merge({str(base)!r}, {{"ca": {str(tmp_path / "x.lors.safetensors")!r}}}, {str(tmp_path / "out2")!r}, rank=1, lam=1.0, durable=False)
print(peak_memory())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout)
    assert peak < 250_000_000, f"{peak} bytes for a tensor of {BIG} MB: memory must not grow with the tensor"
    for name in ("out", "out2"):
        with open_checkpoint(tmp_path / name) as merged:
            got = merged.read("model.decoder.embed_tokens.weight", None, 0, 5)
        assert np.allclose(got, np.arange(5) * 1e-3 + 0.25, atol=1e-3)
