"""The `lors` command as a user runs it: a real process, its output, its exit code, what it leaves behind."""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import whispers
from helpers import module, require

COMMAND = [sys.executable, "-c", "from lors.cli import main; main()"]


def run(
    *arguments: object, check: int | None = 0, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, env={**os.environ, **(env or {})}
    )
    assert check is None or done.returncode == check, done.stderr
    return done


def options(root: Path, *experts: str) -> list[str]:
    return ["--base", str(root / "base"), *(f"--expert={name}={root / name}" for name in experts or ("ca", "de"))]


def refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(part in done.stderr for part in parts), done.stderr
    assert not done.stdout


def test_merge_by_options(tiny_whisper: Path, tmp_path: Path) -> None:
    done = run(
        "merge",
        *options(tiny_whisper),
        "--rank",
        3,
        "--density",
        0.1,
        "--lambda",
        0.4,
        "--weight",
        "ca=0.5",
        "-v",
        tmp_path / "out",
    )
    assert "energy in L" in done.stdout and "encoder mlp fc1" in done.stdout and "backend cpu" in done.stdout
    base, ca, de = (whispers.load(tiny_whisper / name) for name in ("base", "ca", "de"))
    expected = whispers.by_definition(base, [ca, de], 3, 0.1, 0.4, [0.5, 1.0])
    merged = whispers.load(tmp_path / "out")
    whispers.assert_close(merged, expected, base)


def test_merge_by_recipe_relative_to_the_recipe(tiny_whisper: Path, tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(tiny_whisper)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        "merge_method: lors\nbase_model: models/base\n"
        "models:\n- model: models/ca\n- model: models/de\n  parameters: {weight: 0.5}\n"
        "parameters: {rank: [2, 6], density: [{filter: fc1, value: 0.3}, {value: 0.1}], lambda: 0.3}\nout_dtype: bfloat16\n"
    )
    report = json.loads(run("merge", recipe, tmp_path / "out", "--json").stdout)
    assert report["experts"] == ["ca", "de"] and report["out"] == str(tmp_path / "out")
    assert {str(x.dtype) for x in whispers.load(tmp_path / "out").values()} == {"bfloat16"}


def test_quiet_prints_nothing(tiny_whisper: Path, tmp_path: Path) -> None:
    done = run("merge", *options(tiny_whisper), "--quiet", tmp_path / "out")
    assert done.stdout == done.stderr == ""


def test_check_and_dry_run(tiny_whisper: Path, tmp_path: Path) -> None:
    dry = run("merge", *options(tiny_whisper), "--dry-run", tmp_path / "out")
    assert "nothing was read or written" in dry.stdout and not (tmp_path / "out").exists()
    assert "->" not in dry.stdout and "GB/s" not in dry.stdout
    assert (
        "compared with the method's definition"
        in run("merge", *options(tiny_whisper), "--check", tmp_path / "out").stdout
    )


def test_existing_output_needs_force(tiny_whisper: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("merge", *options(tiny_whisper), out)
    old = (out / "model.safetensors").read_bytes()
    refused(run("merge", *options(tiny_whisper), out, check=None), "exists already", "--force")
    assert (out / "model.safetensors").read_bytes() == old
    run("merge", *options(tiny_whisper), "--force", "--density", 0.5, out)
    assert (out / "model.safetensors").read_bytes() != old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_wrong_arguments_leave_nothing(tiny_whisper: Path, tmp_path: Path) -> None:
    """As a process; what the lines say is in test_messages.py."""
    base = tiny_whisper / "base"
    refused(
        run("merge", "--densty", 1, tmp_path / "out", check=None), "unknown option --densty, did you mean --density?"
    )
    refused(run("mrge", check=None), "no such command 'mrge', did you mean 'merge'?")
    refused(run("merge", "--base", base, "--expert", "ca=/nowhere", tmp_path / "out", check=None), "no such file")
    refused(run("merge", *options(tiny_whisper), base / "inside", check=None), "inside the input")
    refused(run("merge", *options(tiny_whisper), "--force", base, check=None), "would replace the input")
    assert not list(tmp_path.iterdir()) and not (base / "inside").exists()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "out of memory; fewer --threads, or jobs at a time, need less"),
        (RecursionError("maximum recursion depth exceeded"), "something in the input is nested too deeply"),
        (RuntimeError("can't start new thread"), "the system does not allow so many threads; give fewer --threads"),
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied (LORS_TRACEBACK=1 shows where)"),
        (OSError(5, "Input/output error"), "Input/output error (LORS_TRACEBACK=1 shows where)"),
        (KeyError("a\nb"), "KeyError: 'a\\nb' (LORS_TRACEBACK=1 shows where)"),
        (RuntimeError("first\nsecond"), "RuntimeError: first (LORS_TRACEBACK=1 shows where)"),
        (NotImplementedError(), "NotImplementedError: NotImplementedError (LORS_TRACEBACK=1 shows where)"),
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_what_nobody_foresaw_is_one_line(
    error: Exception, line: str, whole: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lors.analysis import inspect
    from lors.cli import app

    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(inspect, "inspect_command", fail)
    monkeypatch.setattr("sys.argv", ["lors", "inspect", "x"])
    monkeypatch.setenv("LORS_TRACEBACK", "1" if whole else "0")
    with pytest.raises(SystemExit) as ended:
        app.main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.endswith(f"error: {line}\n") and ("Traceback" in err) == whole and (whole or err.count("\n") == 1), err


def test_a_plain_merge_loads_no_more_than_it_needs(tiny_whisper: Path, tmp_path: Path) -> None:
    """That is most of what a small one costs: modules, validators of documents that are not read, garbage at the end."""
    code = """
import atexit, gc, json, sys
from pydantic import BaseModel

def kinds(of):
    return [of, *(kind for below in of.__subclasses__() for kind in kinds(below))]

def tell():
    built = [kind.__name__ for kind in kinds(BaseModel) if kind.__module__[:4] == "lors" and kind.__pydantic_complete__]
    print(json.dumps([sorted(sys.modules), built, gc.get_freeze_count()]))

atexit.register(tell)
from lors.cli import main
main()
"""
    command = [sys.executable, "-c", code, "merge", *options(tiny_whisper), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    modules, built, frozen = json.loads(done.stdout.splitlines()[-1])
    unused = {"rich", "numpy.ma", "fsspec", "torch", "huggingface_hub", "multiprocessing", "jsonschema", "optuna"}
    unused |= {
        f"lors.{name}" for name in ("cli.analysis", "speech.commands", "experts.adapter", "checkpoints.torch_archive")
    }
    assert not unused & set(modules) and "lors.merging.on_disk" in modules
    assert "Recipe" in built and not {"_LayoutText", "_File"} & set(built)  # and all of them are imported
    assert frozen


def test_nothing_is_said_at_the_end_under_torch() -> None:
    """Triton's bindings, which doctor loads, complain of what is not freed."""
    module("triton", "triton")
    assert run("doctor", check=None).stderr == ""


@pytest.mark.parametrize(
    ("word", "alone"), [("merge", True), ("inspect", True), ("--help", False), ("marge", False), ("", False)]
)
def test_a_command_is_made_alone(word: str, alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from lors.cli import app

    applications: list[Any] = []
    monkeypatch.setattr(app, "run", applications.append)
    monkeypatch.setattr("sys.argv", ["lors", *([word] if word else [])])
    app.main()
    names = [command.name for command in applications[0].registered_commands]
    assert names == ([word] if alone else list(app.COMMANDS))


def test_more_threads_than_the_system_allows(tiny_whisper: Path, tmp_path: Path) -> None:
    """Each wants 8 MB of address space for its stack; the merge ends at once, not when the rest of them are done."""
    code = (
        "import resource, sys; from lors.merging import on_disk as merging; from lors.cli import main; "
        "free = 400 << 20; used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize(); "
        "resource.setrlimit(resource.RLIMIT_AS, (used + free, used + free)); main()"
    )
    experts = [f"--expert=e{i}={tiny_whisper / 'ca'}" for i in range(100)]
    command = [sys.executable, "-c", code, "merge", "--base", str(tiny_whisper / "base"), *experts, "--threads", "4000"]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, timeout=120)
    refused(done, "the system does not allow so many threads; give fewer --threads")
    assert not list(tmp_path.iterdir())


def test_streams_that_are_closed_or_full(tiny_whisper: Path, tmp_path: Path) -> None:
    """As a daemon, and on a full disk: the model is written, and nothing is written into it but its weights."""
    arguments = ["merge", *options(tiny_whisper)]
    for closed in ((2,), (0, 1, 2)):
        out = tmp_path / f"out{len(closed)}"
        ended = subprocess.run(
            [*COMMAND, *arguments, str(out)], preexec_fn=lambda closed=closed: [os.close(fd) for fd in closed]
        )
        assert ended.returncode == 0 and whispers.load(out)
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [*COMMAND, *arguments, str(tmp_path / "full")], stdout=full, stderr=subprocess.PIPE, text=True
        )
        assert ended.returncode == 2 and ended.stderr.count("\n") == 1
        assert f"{tmp_path}/full is complete, but standard output: cannot be written: No space left" in ended.stderr
        assert whispers.load(tmp_path / "full")
        ended = subprocess.run([*COMMAND, "merge", "--nothing"], stderr=full, stdout=subprocess.PIPE)
        assert (ended.returncode, ended.stdout) == (2, b"")


def test_file_size_limit_leaves_nothing(tiny_whisper: Path, tmp_path: Path) -> None:
    limit = (tiny_whisper / "base/model.safetensors").stat().st_size // 2
    done = subprocess.run(
        [*COMMAND, "merge", *options(tiny_whisper), str(tmp_path / "out")],
        capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    refused(done, "too large")
    assert not list(tmp_path.iterdir())


def _slow_recipe(root: Path, tmp_path: Path) -> list[str]:
    """Many experts on one thread: long enough to be interrupted."""
    return [*COMMAND, "merge", "--base", str(root / "base"), "--threads", "1", *(f"--expert=e{i}={root / 'ca'}" for i in range(200)), str(tmp_path / "out")]  # fmt: skip


def _start_and_wait_for_work(command: list[str], tmp_path: Path) -> subprocess.Popen[str]:
    # a background job inherits an ignored SIGINT; the merge must see a real one
    restore = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=restore)
    deadline = time.monotonic() + 60
    while not any(path.name.endswith(".tmp") for path in tmp_path.iterdir()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    return process


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_merge_leaves_nothing(how: signal.Signals, tiny_whisper: Path, tmp_path: Path) -> None:
    process = _start_and_wait_for_work(_slow_recipe(tiny_whisper, tmp_path), tmp_path)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in (130, 128 + how) and "Traceback" not in stderr
    assert not list(tmp_path.iterdir())


def test_killed_merge_leaves_the_old_output_and_the_next_one_cleans_up(tiny_whisper: Path, tmp_path: Path) -> None:
    run("merge", *options(tiny_whisper), tmp_path / "out")
    old = (tmp_path / "out/model.safetensors").read_bytes()
    process = _start_and_wait_for_work([*_slow_recipe(tiny_whisper, tmp_path), "--force"], tmp_path)
    process.kill()
    process.wait()
    assert (tmp_path / "out/model.safetensors").read_bytes() == old
    run("merge", *options(tiny_whisper), "--force", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_inspect(tiny_whisper: Path, tmp_path: Path) -> None:
    assert "hf-whisper" in run("inspect", tiny_whisper / "ca").stdout
    tensors = json.loads(run("inspect", tiny_whisper / "ca", "--json").stdout)["tensors"]
    assert len(tensors) == len(whispers.load(tiny_whisper / "ca"))
    spectra = json.loads(
        run(
            "inspect", tiny_whisper / "ca", "--base", tiny_whisper / "base", "--match", "fc1", "--rank", 2, "--json"
        ).stdout
    )
    import numpy as np

    base, ca = whispers.load(tiny_whisper / "base"), whispers.load(tiny_whisper / "ca")
    for row in spectra:
        sigma = np.linalg.svd(ca[row["name"]] - base[row["name"]], compute_uv=False)
        assert row["norm"] == pytest.approx(float(np.linalg.norm(sigma)), rel=1e-5)
        assert row["energy"] == pytest.approx(float((sigma[:2] ** 2).sum() / (sigma**2).sum()), rel=1e-4)
    plot = tmp_path / "spectra.png"
    module("matplotlib", "plot")
    run("inspect", tiny_whisper / "ca", "--base", tiny_whisper / "base", "--plot", plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
    refused(run("inspect", tiny_whisper / "ca", "--match", "(", check=None), "not a regular expression")
    refused(run("inspect", tiny_whisper / "ca", "--plot", plot, check=None), "expected --base too")


def test_doctor_and_module() -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert found["backends"]["cpu"]["ok"] and found["backends"]["reference"]["ok"]
    wrong = json.loads(run("doctor", "--json", env={"LORS_ISA": "mmx"}, check=1).stdout)
    assert not wrong["backends"]["cpu"]["ok"] and "LORS_ISA: expected one of" in wrong["backends"]["cpu"]["reason"]


def test_a_named_backend_never_falls_back(tiny_whisper: Path, tmp_path: Path) -> None:
    done = run(
        "merge", *options(tiny_whisper), "--backend", "cpu", tmp_path / "out", check=None, env={"LORS_ISA": "mmx"}
    )
    refused(done, "error: LORS_ISA: expected one of")


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_validate_every_instruction_set(isa: str) -> None:
    from lors_kernels.backends.cpu import instruction_set

    require("avx2", isa != "avx2" or instruction_set() != "portable", "this processor has none")
    done = run("validate", "--quick", "--backend", "cpu", "--json", env={"LORS_ISA": isa})
    results = json.loads(done.stdout)
    assert len(results) > 300 and all(check["ok"] for check in results)


def test_validate_without_its_kernels_fails() -> None:
    done = run("validate", "--quick", env={"LORS_ISA": "mmx"}, check=1)
    assert "cpu: broken: LORS_ISA: expected one of" in done.stderr


def test_help_is_fast_and_version_is_told() -> None:
    assert "merge" in run("--help").stdout
    assert run("--version").stdout.startswith("lors ")
    assert run("merge", "--densty", "1", "x", check=2).stderr
