"""Names out of files, paths and models on their way to a terminal or a page: they are shown, and do nothing."""

from __future__ import annotations

import html.parser
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

import tiny
from helpers import module
from lors.analysis.interference import interference
from lors.analysis.interference_page import render
from lors.errors import print_lines
from lors.experts.decompose import decompose
from lors.pages.html import escape

COMMAND = [sys.executable, "-c", "from lors.cli import main; main()"]
ESCAPES = "\x1b]0;owned\x07\x9b2J\u202eb\nerror: none"  # a title, a cleared screen, text backwards, a line of its own
MARKUP = "<script>alert(1)</script>'\"&[/red][link=https://example.org]{0}{task.x}`|"


def run(*arguments: object) -> str:
    """Everything a command prints."""
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, timeout=120)
    text = (done.stdout + done.stderr).decode("utf-8")
    assert "Traceback" not in text, text
    return text


def visible(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """base, ca, and the expert file of ca, in directories whose names are commands."""
    root = tmp_path_factory.mktemp("family")
    found = tiny.family(root / f"in {ESCAPES}", ("ca",))
    odd = root / f"in {ESCAPES}" / f"{MARKUP.replace('/', '')}{ESCAPES}"
    shutil.copytree(found["ca"], odd)
    return found | {"odd": odd, "file": Path(decompose(found["base"], odd, odd.with_suffix(".lors.safetensors")).path)}


def test_what_commands_print(family: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / f"out{ESCAPES}"
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        json.dumps(
            {"merge_method": "lors", "base_model": str(family["base"]), "models": [{"model": str(family["odd"])}]}
        )
    )
    for arguments in (
        ("merge", recipe, out, "-v"),
        ("inspect", out),
        ("inspect", family["odd"], "--base", family["base"]),
        ("inspect", family["odd"], "--base", family["base"], "--json"),
        ("decompose", family["base"], family["odd"], "-o", tmp_path / f"{ESCAPES}.safetensors"),
        ("report", family["base"], family["odd"], family["ca"], "-o", tmp_path / f"{ESCAPES}.html"),
        ("export-lora", family["file"], "-o", tmp_path / f"lora{ESCAPES}"),
        ("add", out, family["file"], "--name", "more"),
        ("add", out, family["file"], "--name", f"x{ESCAPES}"),
        ("remove", out, family["base"]),
        ("inspect", family["odd"] / "nothing"),
        ("merge", recipe, out),
    ):
        text = run(*arguments)
        assert visible(text) and text.strip() and "\nerror: none" not in text, (arguments[0], text)


def test_non_utf8_paths_end_in_one_line(family: dict[str, Path], tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/\xff\xfe"
    shutil.copytree(os.fsencode(family["ca"]), odd)
    for arguments in (
        (b"inspect", odd),
        (b"merge", b"--base", os.fsencode(family["base"]), b"--expert", b"x=" + odd, b"out"),
    ):
        done = subprocess.run([*COMMAND, *arguments], capture_output=True, timeout=120, cwd=tmp_path)
        assert b"Traceback" not in done.stderr and visible((done.stdout + done.stderr).decode("utf-8")), done


class Outline(html.parser.HTMLParser):
    """The elements of a page with the names of their attributes, and all that is text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_pages_have_the_same_elements_whatever_things_are_called(family: dict[str, Path], tmp_path: Path) -> None:
    """Experts and tensors of plain names, and the same called as a script; both sort before "decoder"."""
    outlines = []
    for name, tensor in (("plain", "!x"), (MARKUP + ESCAPES, "<script>alert(1)</script>")):
        for source in ("base", "ca"):
            (tmp_path / name[:5] / source).mkdir(parents=True)
            state = load_file(family[source] / "model.safetensors")
            state = {key.replace("model.encoder", f"model.{tensor}.encoder"): value for key, value in state.items()}
            save_file(state, tmp_path / name[:5] / source / "model.safetensors")
        found = interference(
            tmp_path / name[:5] / "base", {name: tmp_path / name[:5] / "ca", "de": tmp_path / name[:5] / "ca"}
        )
        outlines.append(Outline(render(found)))
        assert visible(render(found))
    assert outlines[0].elements == outlines[1].elements
    assert "alert(1)" in outlines[1].text and "\\x1b]0;owned" in outlines[1].text
    assert {tag for tag, _ in outlines[1].elements} >= {"table", "svg"} and "script" not in str(outlines[1].elements)


def test_escape() -> None:
    assert escape("<a href='x'>&\x1b\ud800") == "&lt;a href=&#x27;x&#x27;&gt;&amp;\\x1b\\ud800"


def test_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print_lines("one\ntwo", "\x1b[2J three")
    assert capsys.readouterr().out == "one\\ntwo\n\\x1b[2J three\n"


def test_experiments_show_labels_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = module("lors.speech.experiment.report", "speech")
    cell = {"wer": 1.0, "bleu": 2.0}
    model = {"cells": {"transcribe/ca": cell}, "means": {"transcribe/experts": None}, "normalised": None}
    interval = {
        "difference": 1.0,
        "low": 0.5,
        "high": 2.0,
        "p": 0.1,
        "seeds_low": None,
        "seeds_high": None,
        "p_holm": 1.0,
    }
    merge = MARKUP + ESCAPES
    config = {"languages": ["ca"], "experts": ["ca"], "tasks": ["transcribe"], "against": MARKUP, "grids": {merge: {}}}
    results: dict[str, Any] = {
        "config": config,
        "models": {merge: model},
        "comparisons": [{"merge": merge, "task": "transcribe", "group": "experts", "metric": "wer", **interval}],
        "grids": {},
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    report.print_tables(tmp_path)
    text = capsys.readouterr().out
    assert visible(text) and "[/red][link=https://example.org]" in text


def test_a_progress_bar_takes_its_label_for_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lors.progress import bar

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with bar(MARKUP + "\x1b]0;owned\x07", 2) as advance:
        assert advance is not None
        advance(1, 2)
    text = capsys.readouterr().err
    assert "\x1b]0;owned" not in text
