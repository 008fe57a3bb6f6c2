"""Every command at once: its options, its help, its JSON, its silence; completion in a shell."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import lors
import tiny
from helpers import module
from lors.cli import app, main
from lors.experts.decompose import decompose

COMMANDS = {name: command for name, command in typer.main.get_command(app.application(app.COMMANDS)).commands.items()}  # type: ignore[attr-defined]
OURS = [name for name in COMMANDS if name != "mergekit-yaml"]  # whose options are mergekit's


def options(name: str) -> dict[str, Any]:
    """Argument -> option."""
    return {each.name: each for each in COMMANDS[name].params if each.param_type_name == "option"}


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[str, str]:
    monkeypatch.setattr("sys.argv", ["lors", *map(str, words)])
    try:
        main()
    except SystemExit as ended:
        assert ended.code in (None, 0), capsys.readouterr().err
    return capsys.readouterr()


@pytest.mark.parametrize("name", OURS)
def test_one_spelling_each_json_and_quiet_everywhere(name: str) -> None:
    found = options(name)
    assert {"as_json", "quiet"} <= set(found)
    for option in found.values():
        assert len([text for text in option.opts if text.startswith("--")]) == 1 and not option.secondary_opts, (
            option.opts
        )
        assert option.help and option.help.endswith((".", ")")), option.name


@pytest.mark.parametrize("name", ["", *OURS])
def test_help_is_readable_at_80_columns(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text, _ = said(monkeypatch, capsys, *filter(None, [name]), "--help")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in text
    for option in options(name).values() if name else ():
        shown = [line for line in lines if f"{option.opts[0]} " in line]
        assert shown, option.opts
    described = [line.rstrip("│ ")[-30:] for line in lines if line.startswith("│")]
    assert all(len(text.strip()) > 2 for text in described), "a column of help that is squeezed to nothing"


def test_what_finetune_and_evaluate_share_has_one_name() -> None:
    both = {
        "data",
        "languages",
        "tasks",
        "limit",
        "max_seconds",
        "sample_seed",
        "unusable",
        "batch_size",
        "beams",
        "device",
    }
    both |= {"workers", "cache", "out", "as_json", "quiet"}
    tuned, scored = options("finetune"), options("evaluate")
    assert set(tuned) & set(scored) == both
    assert all(tuned[name].opts == scored[name].opts and tuned[name].metavar == scored[name].metavar for name in both)


@pytest.mark.parametrize(
    "words",
    [
        "--model tiny --languages ca --tasks both --batch-size 4 --max-steps 3 --scheduler cosine --limit 5",
        "--model_name_or_path tiny --language ca --task both --per_device_train_batch_size 4 --max_steps 3 "
        "--lr_scheduler_type=cosine --max_train_samples 5",
        "--model tiny --language ca --task both --per-device-train-batch-size 4 --max-steps 3 --lr-scheduler-type cosine "
        "--max-train-samples 5",
    ],
)
def test_names_of_transformers_are_taken(words: str) -> None:
    command: Any = COMMANDS["finetune"]
    given = command.make_context("finetune", [*words.split(), "--data", "x", "--output_dir", "out"]).params
    wanted = {"model": "tiny", "languages": "ca", "tasks": "both", "batch_size": 4, "max_steps": 3, "limit": 5}
    assert given.items() >= {**wanted, "scheduler": "cosine", "out": Path("out")}.items()


def test_a_wrong_setting_is_told_by_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module("transformers", "speech")
    words = [
        "finetune",
        "--model",
        "tiny",
        "--languages",
        "ca",
        "--data",
        "x",
        "-o",
        str(tmp_path / "x"),
        "--scheduler",
        "bent",
    ]
    monkeypatch.setattr("sys.argv", ["lors", *words])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.startswith("error: --scheduler: no 'bent'")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    paths = tiny.family(root / "models", ("ca", "de", "es"))
    for name in ("ca", "de", "es"):
        decompose(paths["base"], paths[name], root / f"{name}.lors.safetensors", name=name)
    lors.merge(paths["base"], {name: root / f"{name}.lors.safetensors" for name in ("ca", "es")}, root / "merged")
    (root / "r.yml").write_text("merge_method: lors\nbase_model: models/base\nmodels: [{model: models/ca}]\n")
    return root


RUNS = {
    "merge": "merge r.yml out",
    "merge --dry-run": "merge r.yml out --dry-run",
    "inspect": "inspect models/ca",
    "inspect --base": "inspect models/ca --base models/base",
    "doctor": "doctor",
    "decompose": "decompose models/base models/ca -o new.lors.safetensors",
    "add": "add merged de.lors.safetensors",
    "remove": "remove merged ca.lors.safetensors",
    "export-lora": "export-lora de.lors.safetensors -o lora",
    "report": "report models/base models/ca models/de -o r.html",
    "sweep": "sweep r.yml -o sweep --lambda 0.1,0.2 --score 'sh -c \"echo 1\"'",
}


@pytest.mark.parametrize("name", RUNS)
def test_json_is_all_there_is_and_quiet_is_nothing(
    name: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shlex

    told = {}
    for how in ("", "--json", "--quiet", "--json --quiet"):
        place = tmp_path / (how or "plain")
        shutil.copytree(made, place)
        monkeypatch.chdir(place)
        told[how], errors = said(monkeypatch, capsys, *shlex.split(f"{RUNS[name]} {how}"))
        assert not errors
    assert told[""] and told["--quiet"] == ""
    first, second = json.loads(told["--json"]), json.loads(told["--json --quiet"])
    assert first and type(first) is type(second)
    with pytest.raises(json.JSONDecodeError):
        json.loads(told[""])


@pytest.mark.parametrize("command", ["validate", "bench"])
def test_kernels_are_quiet_too(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lors_kernels.testing import bench, validate

    def told(*args: object, as_json: bool, **options: object) -> bool:
        print("{}" if as_json else "a table")
        return True

    monkeypatch.setattr({"validate": validate, "bench": bench}[command], f"{command}_command", told)
    found = [said(monkeypatch, capsys, command, *how)[0] for how in ((), ("--json",), ("--quiet",), ("--json", "-q"))]
    assert found == ["a table\n", "{}\n", "", "{}\n"]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["lors", "me"], ["merge", "mergekit-yaml"]),
        (["lors", "merge", "--me"], ["--method"]),
        (["lors", "merge", "--method", "t"], ["task_arithmetic", "ties", "tsv"]),
        (["lors", "finetune", "--lang"], ["--languages"]),
    ],
)
def test_a_shell_completes(words: list[str], wanted: list[str]) -> None:
    asked = {"_LORS_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-m", "lors"], env={**os.environ, **asked}, capture_output=True, text=True, timeout=60
    )
    assert sorted(done.stdout.split()) == wanted and done.returncode == 0, done.stderr
