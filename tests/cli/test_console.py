"""Standard streams that are closed, full or gone: the result is in place, and the exit code says what became of the rest."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lors
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


def test_names_that_the_terminal_has_not_got(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are escaped; what was asked for is done."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    base, expert = (shutil.copytree(family[name], tmp_path / f"{name}-日本") for name in ("base", "ca"))
    for command, written in {
        f"inspect {expert}": "",
        f"inspect {expert} --base {base}": "",
        f"merge {tmp_path}/新 --base {base} --expert 日本={expert}": "新",
        f"decompose {base} {expert} -o {tmp_path}/日.lors.safetensors": "日.lors.safetensors",
        f"export-lora {tmp_path}/日.lors.safetensors -o {tmp_path}/アダプタ": "アダプタ",
        f"report {base} 日={expert} 本={expert} -o {tmp_path}/頁.html": "頁.html",
        f"inspect {expert} --base {base} --plot {tmp_path}/図.svg": "図.svg",
    }.items():
        done = subprocess.run(["bash", "-c", f"{COMMAND} {command}"], capture_output=True, timeout=100)
        assert done.returncode == 0, (command, done.stderr)
        assert (tmp_path / written).exists() and done.stdout.isascii()
    assert (
        rb"\u65b0"
        in subprocess.run(
            ["bash", "-c", f"{COMMAND} merge {tmp_path}/新 --force --base {base} --expert x={expert}"],
            capture_output=True,
        ).stdout
    )


def test_ctrl_c_while_the_command_is_imported(tmp_path: Path) -> None:
    """No traceback: one line and 130. What is ignored stays so (a job in the background of a script)."""
    slow = "import sys, time\nprint('importing', flush=True)\ntime.sleep(2)\nsys.exit(7)\n"
    (tmp_path / "typer.py").write_text(slow)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    for ignored, expected in ((False, (130, "interrupted\n")), (True, (7, ""))):
        action = signal.SIG_IGN if ignored else signal.SIG_DFL
        process = subprocess.Popen(
            [sys.executable, "-m", "lors", "--version"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, preexec_fn=lambda action=action: signal.signal(signal.SIGINT, action),
        )  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert (process.returncode, said) == expected


def test_python_m_lors() -> None:
    done = subprocess.run([sys.executable, "-m", "lors", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"lors {lors.__version__}\n")
