"""Standard streams that are closed, full or gone: the result is in place, and the exit code says what became of the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny

COMMAND = f"{sys.executable} -c 'from lors.cli import main; main()'"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny.family(tmp_path_factory.mktemp("family"), ("ca",))


def shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", f"{COMMAND} {command}"], capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("buffered", ["", "PYTHONUNBUFFERED=1"])
@pytest.mark.parametrize(
    ("streams", "code"),
    [
        ("2>&-", 0),
        (">&-", 0),
        ("<&- >&- 2>&-", 0),
        ("2>/dev/full", 0),
        (">/dev/full", 2),
        (">/dev/full 2>/dev/full", 2),
        ("--json >/dev/full", 2),
    ],
)
def test_a_merge_without_streams(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streams: str, code: int, buffered: str
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", buffered and "1")
    done = shell(f"merge {tmp_path}/out --base {family['base']} --expert ca={family['ca']} {streams}")
    assert done.returncode == code, done.stderr
    lines = [f"error: {tmp_path}/out is complete, but standard output: cannot be written: No space left on device"]
    assert done.stderr.splitlines() == (lines if code and "2>" not in streams else [])
    assert (tmp_path / "out" / "model.safetensors").exists(), "what was asked for is there"


@pytest.mark.parametrize("command", ["--version", "--help", "inspect {base} --json", "doctor"])
def test_what_cannot_be_printed_is_an_error(family: dict[str, Path], command: str) -> None:
    done = shell(f"{command.format(**family)} >/dev/full")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: standard output: cannot be written")


def test_an_error_without_stderr_keeps_its_code(family: dict[str, Path], tmp_path: Path) -> None:
    for streams in ("2>&-", "2>/dev/full"):
        done = shell(f"merge {tmp_path}/out --base {family['base']} --expert ca=nowhere {streams}")
        assert (done.returncode, done.stdout) == (2, "")


def test_a_reader_that_leaves(family: dict[str, Path]) -> None:
    done = shell(f"inspect {family['base']} --json | true; exit ${{PIPESTATUS[0]}}")
    assert done.returncode in (0, 1) and not done.stderr
