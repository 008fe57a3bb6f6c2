"""The first day on a machine with a GPU, rehearsed on the CPU: every number it would file, and everything going wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import cuda_emulation
from benchmarks import gpu, wheels
from benchmarks.released import topk_prune
from benchmarks.stages import Recorder, Rows, run_stages

ROOT = Path(__file__).parent.parent.parent


def start(*arguments: str, program: tuple[str, ...] = ("-m", "benchmarks.gpu"), **variables: str) -> Any:
    environment = {**os.environ, **variables}
    environment.pop("PYTHONPATH", None)  # nothing is installed there
    return subprocess.Popen(
        [sys.executable, *program, *arguments], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(*arguments: str, **options: Any) -> tuple[int, str, str]:
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def faulty(out: Path, *chosen: str, seconds: float = 600, again: bool = False) -> list[str]:
    command = [sys.executable, "tests/support/faulty_stages.py", str(out), *(["--again"] if again else [])]
    limits = dict.fromkeys(("hangs", "dies", "fails", "poisoned", "breaks", "fine"), 60.0) | {"hangs": 3.0}
    return run_stages(command, limits, chosen or limits, out, seconds)


@pytest.mark.timeout(600)
def test_rehearsal_of_every_stage(tmp_path: Path) -> None:
    code, out, err = run("--dry-run", "--out", str(tmp_path), "--seconds", "900")
    log = (tmp_path / "log.txt").read_text()
    assert code == 0, out[-3000:] + err + log[-3000:]
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert data["dry_run"] and "say nothing" in data["device"] and "say nothing" in out
    assert list(data["outcomes"]) == list(gpu.STAGES)
    assert {found["outcome"] for found in data["outcomes"].values()} == {"done"}
    results = data["results"]
    assert all(results[name] for name in gpu.STAGES)
    # inputs of two bytes move half of what inputs of four do, but for x, z and the factors
    rows = [results["operations"][f"merge_update reference {d} 48x48 x1"] for d in ("float32", "float16")]
    factors = 5 * (48 + 48) * 7 * 4
    assert rows[0]["bytes"] == 8 * 48 * 48 * 4 + factors and rows[1]["bytes"] == 8 * 48 * 48 * 2 + factors
    assert [key.split()[0] for key in results["resident"]] == ["lors", "task_arithmetic", "ties", "dare_ties"]
    rivals = {key.split(": ", 1)[1] for key in results["rivals"]}
    assert {"full SVD, as released", "torch.linalg.svd of a batch", "prune, topk mask"} <= rivals


@pytest.mark.timeout(900)
def test_rehearsal_of_the_first_day_on_emulated_kernels(
    tmp_path: Path,
    emulated: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of it in its order, with a stage that hangs, one that crashes and one whose kernels break the device."""
    faults = {"bandwidth": "hangs", "eigenproblems": "dies", "profile": "poisoned", "resident": "breaks"}
    variables = {
        **(sanitized := cuda_emulation.environment()), "LORS_TEST_CUDA_EMULATION": str(emulated),
        "ASAN_OPTIONS": f"{sanitized['ASAN_OPTIONS']}:handle_segv=0",  # a crash is one
        "LORS_TEST_STAGE_FAULTS": ",".join(f"{stage}:{fault}" for stage, fault in faults.items()),
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    child = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--dry-run", "--stage"]
    limits = {**gpu.STAGES, "bandwidth": 20.0}
    assert run_stages(child, limits, gpu.STAGES, tmp_path, 850) == []
    data = gpu.assemble(tmp_path, True)
    results, ended = data["results"], {name: found["outcome"] for name, found in data["outcomes"].items()}
    log = (tmp_path / "log.txt").read_text()
    assert ended == {name: "done" for name in gpu.STAGES} | {
        "bandwidth": "did not end in 20 s", "eigenproblems": "died of SIGSEGV",
        "profile": "failed with exit code 1, see log.txt", "resident": "failed with exit code 1, see log.txt",
    }, log[-3000:]  # fmt: skip
    assert results["eigenproblems"]["now"]["lost"] and list(results["profile"]) == ["broken"]
    assert {tuple(key.split()[:2]) for key in results["operations"]} == {
        (operation, backend)
        for operation in ("gram_apply", "residual_threshold", "merge_update", "ties_update")
        for backend in ("cuda", "reference")
    }
    assert results["accuracy"]["96x64 float32 cuda"]["error"] < 1e-5
    assert all(key.endswith(": cuda") and row["matrices"] for key, row in results["merges"].items())
    assert results["sanitizer"]["memcheck"]["last"] == "9 rounds of every kernel"
    table = "\n".join(gpu.table(data))
    assert "merges: micro" in table and "bandwidth: did not end in 20 s" in table


def test_a_stage_that_goes_wrong_costs_only_itself_and_is_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("LORS_TEST_MENDED", str(tmp_path / "mended"))
    assert faulty(out) == []
    results, outcomes = Rows(out).results(), Rows(out).outcomes()
    ended = {name: found["outcome"] for name, found in outcomes.items()}
    assert ended == {
        "hangs": "did not end in 3 s", "dies": "died of SIGSEGV", "fails": "rows failed", "fine": "done",
        "poisoned": "failed with exit code 1, see log.txt", "breaks": "failed with exit code 1, see log.txt",
    }  # fmt: skip
    assert outcomes["hangs"]["seconds"] < 15
    assert list(results["hangs"]) == ["first", "second", "third"]
    assert results["hangs"]["third"] == {"failed": "the process did not end in 3 s", "lost": True}
    assert results["dies"]["now"] == {"failed": "the process died of SIGSEGV", "lost": True}
    assert results["fails"] == {"bad": {"failed": "ValueError: no luck"}, "good": {"seconds": 1.0}}
    assert list(results["poisoned"]) == ["broken"], "behind an illegal access nothing can be measured"
    assert "breaks" not in results and "No module named 'pydantic'" in (out / "log.txt").read_text()
    assert results["fine"] == {"only": {"seconds": 1.0}}
    assert f"stays behind {out}" not in processes(), "what a stage started ends with it"
    # a second run: what is there stays, what was lost is not tried again, what failed is
    before = (out / "rows.jsonl").read_text()
    (tmp_path / "mended").touch()
    assert faulty(out, "hangs", "dies", "fails") == []
    assert (out / "rows.jsonl").read_text().startswith(before)
    results, outcomes = Rows(out).results(), Rows(out).outcomes()
    assert {outcomes[name]["outcome"] for name in ("hangs", "dies", "fails")} == {"done"}
    assert results["hangs"]["fourth"] == {"seconds": 2.0} and results["dies"]["behind"] == {"seconds": 3.0}
    assert results["fails"]["bad"] == {"seconds": 2.0}
    assert results["hangs"]["third"]["lost"], "it would cost the same again"
    faulty(out, "dies", again=True)
    assert Rows(out).outcomes()["dies"]["outcome"] == "died of SIGSEGV"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_kill_keeps_what_was_measured_and_leaves_nothing_running(tmp_path: Path, number: signal.Signals) -> None:
    process = start(str(tmp_path), "--all", program=("tests/support/faulty_stages.py",))
    deadline = time.monotonic() + 120
    while not (tmp_path / "now.txt").exists() or (tmp_path / "now.txt").read_text() != "third":
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    process.wait(60)
    time.sleep(1)
    assert f"faulty_stages.py {tmp_path}" not in processes()
    assert list(Rows(tmp_path).results()["hangs"])[:2] == ["first", "second"]


def processes() -> str:
    return subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout


def test_what_does_not_fit_the_time_is_named(tmp_path: Path) -> None:
    assert faulty(tmp_path, "hangs", "dies", "fine", seconds=11) == ["dies", "fine"]
    assert list(Rows(tmp_path).results()["hangs"])[:2] == ["first", "second"]
    options = gpu.parser().parse_args(["--out", str(tmp_path), "--dry-run", "--seconds", "0"])
    assert gpu.run_stages([], gpu.STAGES, ["machine"], options.out, options.seconds) == ["machine"]


def test_a_line_that_was_cut_off_is_no_row(tmp_path: Path) -> None:
    rows = Rows(tmp_path)
    Recorder(rows, "a").measure("x", lambda: {"seconds": 1.0})
    with rows.path.open("a") as file:
        file.write('{"stage": "a", "key": "y", "fou')
    assert rows.results() == {"a": {"x": {"seconds": 1.0}}}
    Recorder(rows, "a").measure("z", lambda: {"seconds": 2.0})
    assert rows.results() == {"a": {"x": {"seconds": 1.0}, "z": {"seconds": 2.0}}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_no_number(tmp_path: Path) -> None:
    code, _, err = run("--out", str(tmp_path))
    assert code == 2 and "expected a GPU, found none" in err
    assert Rows(tmp_path).results() == {}


def test_stages_that_are_not_there(tmp_path: Path) -> None:
    code, _, err = run("--out", str(tmp_path), "--stages", "bandwidth,lunch")
    assert code == 2 and "error: --stages: expected some of machine, build" in err and "got 'lunch'" in err


def test_the_mask_of_topk_is_where_the_residual_is(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: devices.append(k.get("device")) or zeros(*a, **k))
    residual = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    assert int((topk_prune(residual, 7) != 0).sum()) == 7
    assert devices == [residual.device]


def test_wheels_to_bring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = {found.metadata["Name"]: found.version for found in metadata.distributions()}
    for name in ("pydantic", "pydantic_core", "typer"):
        there.pop(name, None)
    row = {"stage": "machine", "key": "packages", "found": {"python": "3.12", "packages": there}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert wheels.main([str(tmp_path)]) == 0
    found = [line.split("==") for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in found] == ["pydantic", "pydantic-core", "typer"]
    assert all(version == metadata.version(name) for name, version in found)
    old = {**there, "rich": "1.0"}
    assert "rich" in " ".join(wheels.missing(old, "3.12")), "an older one than is asked for is none"
    assert "ray" in " ".join(wheels.missing({}, "3.12", ("ray",)))
    (tmp_path / "rows.jsonl").write_text("")
    assert wheels.main([str(tmp_path)]) == 2


def test_the_kernels_stages_need_no_package_of_the_merge_engine() -> None:
    """What a bare machine may lack costs the stages `resident` and `files`, and nothing before them."""
    code = "import sys; sys.modules.update(dict.fromkeys(('pydantic', 'lors', 'yaml', 'typer')));"
    code += "import benchmarks.gpu, benchmarks.sanitized; from benchmarks import gpu_stages as g; g.Bench(True)"
    found, _, err = run(program=("-c", code))
    assert found == 0, err
