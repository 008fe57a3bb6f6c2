"""The sub-commands as a user types them, in processes of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from lors.errors import LorsError
from lors.speech import commands
from lors.speech.commands import COMMANDS, OPTIONS


def _app() -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    for name, command in COMMANDS.items():
        app.command(name, **OPTIONS.get(name, {}))(command)
    return app


def _run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(_app(), [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_line_has_all_of_them() -> None:
    from lors.cli import app

    assert [name for name, module in app.COMMANDS.items() if module == "..speech.commands"] == list(COMMANDS)


def test_importing_the_commands_is_light() -> None:
    code = "import sys, lors.speech.commands; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "set()"


def test_finetune_and_evaluate(tmp_path: Path, recordings: Path) -> None:
    common = ("--data", recordings, "--device", "cpu")
    said = _run(
        *("finetune", "--model_name_or_path", "tiny", "--language", "ca", "--task", "both", "-o", tmp_path / "ca"),
        *(*common, "--max_steps", 3, "--learning-rate", "4e-4", "--train", "matrices", "--json"),
    )
    assert json.loads(said)["steps"] == 3 and json.loads(said)["tasks"] == ["transcribe", "translate"]
    said = _run(
        *("evaluate", "tiny", tmp_path / "ca", "--languages", "ca,es", "--tasks", "transcribe,translate", *common),
        *("--limit", 8, "--compare", "ca,tiny", "-o", tmp_path / "scores"),
    )
    assert "WER of ca minus tiny" in said and "BLEU of ca minus tiny" in said and "tok:13a" in said
    assert len(json.loads((tmp_path / "scores" / "scores.json").read_text())) == 8
    assert len(list((tmp_path / "scores" / "answers").iterdir())) == 8


def test_experiment_lists_its_stages(tmp_path: Path) -> None:
    said = _run("experiment", "quick", "-o", tmp_path, "--list", "--seeds", "5")
    assert "test-lors-s5" in said and "done" not in said
    with pytest.raises(LorsError, match=r"expected data\.synth or data\.source"):
        _run("experiment", "covost-small", "-o", tmp_path, "--list")
    with pytest.raises(LorsError, match=r"x: expected ca/clips or clips"):  # what is done depends on the rows
        _run("experiment", "covost-small", "-o", tmp_path, "--list", "--data", "covost2:x", "--device", "cpu")


@pytest.mark.usefixtures("espeak")
def test_synth(tmp_path: Path) -> None:
    said = _run(
        "synth", tmp_path / "c", "--languages", "ca,sv", "--train", 0, "--dev", 1, "--test", 2, "--format", "wav"
    )
    assert said.startswith("6 utterances") and len(list((tmp_path / "c").rglob("*.wav"))) == 6
    before = (tmp_path / "c" / "manifest.tsv").read_bytes()
    with pytest.raises(LorsError, match="exists already"):
        _run("synth", tmp_path / "c", "--languages", "ca")
    with pytest.raises(LorsError, match="expected utterances in at least one split"):
        _run("synth", tmp_path / "c", "--force", "--train", 0, "--dev", 0, "--test", 0)
    assert (tmp_path / "c" / "manifest.tsv").read_bytes() == before
    with pytest.raises(LorsError, match="is not a directory"):
        _run("synth", tmp_path / "c" / "manifest.tsv" / "x", "--train", 0, "--dev", 0, "--test", 1)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_every_default(command: str) -> None:
    """Brackets in a help text would be taken for markup and vanish."""
    said = " ".join(_run(command, "--help").split())
    assert "Usage" in said and not re.search(r" \.[^.]", said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("evaluate", "tiny", "--data", "x.tsv", "--languages", "ca"), "cannot read x.tsv"),
        (("evaluate", "tiny", "--data", "x.tsv", "--languages", "ca", "--tasks", "sing"), "task: expected transcribe"),
        (
            ("evaluate", "tiny", "--data", "x.tsv", "--languages", "ca", "--dtype", "int8"),
            "dtype: expected float32, float16, bfloat16, got 'int8'",
        ),
        (
            ("evaluate", "tiny", "--data", "x.tsv", "--languages", "ca", "--device", "tpux"),
            "device: expected cpu or cuda, got 'tpux'",
        ),
        (
            ("evaluate", "tiny", "--data", "x", "--languages", "ca", "--compare", "tiny"),
            "expected A,B of the models tiny",
        ),
        (
            ("evaluate", "tiny", "--data", "x", "--languages", "ca", "--compare", "tiny,b"),
            "expected A,B of the models tiny",
        ),
        (
            ("evaluate", "tiny", "de", "es", "--data", "x", "--languages", "ca"),
            "expected models, got the language 'de'; separate languages by commas: --languages ca,de,es$",
        ),
        (
            ("evaluate", "test", "--data", "x", "--languages", "ca"),
            "^test: expected a model directory, a hub id, tiny or tiny-early; looked for in .*, did you mean 'tests'",
        ),
        (("evaluate", "tiny", "--data", "x", "--languages", "ca", "-o", __file__), "cannot write .*: "),
        (("experiment", "quick", "-o", "x", "--list", "--rest", "none"), "rest: Input should be 'task_arithmetic'"),
        (("experiment", "quick", "-o", "x", "--list", "--seeds", "a"), "--seeds: expected numbers"),
        (("synth", "x", "--languages", "eo", "--dev", "0", "--test", "0"), "no sentences in 'eo'"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(LorsError, match=said):
        _run(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("synth", "out"),
        ("finetune", "--model", "tiny", "--language", "ca", "--data", "x.tsv", "-o", "out"),
        ("evaluate", "tiny", "--languages", "ca", "--data", "x.tsv"),
        ("experiment", "quick", "-o", "out"),
    ],
)
def test_without_the_extra_nothing_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "EXTRA", ("json", "no_such_module"))
    with pytest.raises(LorsError, match=r"^speech needs no_such_module: pip install 'lors-merging\[speech\]'$"):
        _run(*arguments)
    assert list(tmp_path.iterdir()) == []
