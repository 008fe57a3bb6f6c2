"""Results from the answers alone: the numbers of the run, without its models and recordings."""

from __future__ import annotations

import csv
import json
import lzma
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cut import cut_config
from lors.cli.app import application
from lors.errors import LorsError
from lors.speech.experiment.answers import Answers, pack
from lors.speech.experiment.plan import build_stages
from lors.speech.experiment.report import FILES, score_again
from lors.speech.experiment.tables import comparisons_csv, latex, scores_csv

UNCHANGED = set(FILES) - {"results.json"}


def _results(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "results.json").read_text()))


@pytest.fixture
def kept(finished: Path, tmp_path: Path) -> Path:
    """What is committed of an experiment: no stages, models, recordings."""
    place = tmp_path / "kept"
    place.mkdir()
    for name in FILES:
        shutil.copy(finished / name, place)
    return place


def test_the_same_numbers(kept: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        application(["experiment"]), ["experiment", str(kept), "-o", str(tmp_path / "again"), "--score-again"]
    )
    assert done.exit_code == 0, done.output
    before, after = _results(kept), _results(tmp_path / "again")
    assert list(before) == list(after)
    for volatile in ("versions", "machine"):
        before.pop(volatile), after.pop(volatile)
    assert before == after
    for name in UNCHANGED:
        assert (kept / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    score_again(kept, kept)  # in place
    assert {path.name for path in kept.iterdir()} == set(FILES)


def test_another_answer_gives_another_score(kept: Path, tmp_path: Path) -> None:
    with lzma.open(kept / "answers.jsonl.xz", "rt") as stream:
        head, first, *rest = map(json.loads, stream)
    place = head["stages"].index("test-lors-s0")
    assert (first["task"], first["language"]) == ("transcribe", "ca")
    first["answers"][place] += " zzz"
    with lzma.open(kept / "answers.jsonl.xz", "wt") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in (head, first, *rest))
    score_again(kept, tmp_path / "again")
    before, after = (_results(place)["models"] for place in (kept, tmp_path / "again"))
    for label in before:
        assert (before[label] == after[label]) == (label != "lors"), label
    worse, better = (side["lors"]["cells"]["transcribe/ca"]["wer_raw"] for side in (after, before))
    words = sum(
        len(row["reference"].split())
        for row in Answers.read(kept / "answers.jsonl.xz").rows("test-base")
        if row["language"] == "ca"
    )
    assert worse - better == pytest.approx(100 / words)


def test_the_bytes_depend_on_the_answers_alone(finished: Path) -> None:
    stages = {stage.name: stage.directory(finished) for stage in build_stages(cut_config())}
    packed = pack(stages)
    assert packed == pack(stages) == (finished / "answers.jsonl.xz").read_bytes()
    lines = (stages["test-lors-s0"] / "answers.jsonl").read_text().splitlines()
    rows = Answers.read(finished / "answers.jsonl.xz").rows("test-lors-s0")
    assert [row["hypothesis"] for row in rows] == [json.loads(line)["hypothesis"] for line in lines]


def test_stages_that_answered_other_utterances(finished: Path, tmp_path: Path) -> None:
    stages = {stage.name: stage.directory(finished) for stage in build_stages(cut_config())}
    shutil.copytree(stages["test-lors-s0"], tmp_path / "other")
    lines = (tmp_path / "other" / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other" / "answers.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(LorsError, match="test-lors-s0: expected answers to the utterances of test-base, it has others"):
        pack({**stages, "test-lors-s0": tmp_path / "other"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda place: (place / "answers.jsonl.xz").unlink(), "not there; results from before answers were kept"),
        (lambda place: (place / "answers.jsonl.xz").write_bytes(b"{}"), "expected the answers of an experiment"),
        (
            lambda place: _cut(place / "answers.jsonl.xz", 99),
            "expected the answers of an experiment: Compressed file ended",
        ),
        (lambda place: _written(place / "answers.jsonl.xz", '{"lors": "else"}\n'), "its lines do not go together"),
        (
            lambda place: _written(place / "answers.jsonl.xz", '{"lors": "answers", "stages": ["test-base"]}\n'),
            "expected those of stage test-task_arithmetic-s0|expected results",
        ),
        (lambda place: (place / "results.json").unlink(), "cannot read .*results.json"),
        (lambda place: (place / "results.json").write_text("{}"), "results.json: expected results of an experiment"),
    ],
)
def test_damaged_results(kept: Path, tmp_path: Path, damage: Any, said: str) -> None:
    damage(kept)
    with pytest.raises(LorsError, match=said) as error:
        score_again(kept, tmp_path / "again")
    assert not (tmp_path / "again").exists() and "\n" not in str(error.value)


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _written(path: Path, text: str) -> None:
    path.write_bytes(lzma.compress(text.encode()))


@pytest.mark.parametrize(
    "option", [("--seeds", "1"), ("--data", "x"), ("--criterion", "wer"), ("--list",), ("--stage", "x")]
)
def test_score_again_takes_no_other_option(kept: Path, tmp_path: Path, option: tuple[str, ...]) -> None:
    done = CliRunner().invoke(
        application(["experiment"]), ["experiment", str(kept), "-o", str(tmp_path / "x"), "--score-again", *option]
    )
    assert isinstance(done.exception, LorsError) or done.exit_code == 2
    assert f"got {option[0]}" in str(done.exception) + done.output and not (tmp_path / "x").exists()


# --------------------------------------------------------------------------------------------------------- tables


def test_tables_hold_the_numbers(finished: Path) -> None:
    results = _results(finished)
    rows = list(csv.DictReader((finished / "scores.csv").open(newline="")))
    found = {(r["model"], r["task"], r["language"], r["metric"]): float(r["value"]) for r in rows}
    for label, model in results["models"].items():
        for cell, scores in model["cells"].items():
            for metric, value in scores.items():
                assert found[(label, *cell.split("/"), metric)] == value
        assert found[label, "transcribe", "experts", "wer"] == model["means"]["transcribe/experts"]["mean"]
        assert found[label, "", "experts", "normalised"] == model["normalised"]["mean"]
    (first, second) = csv.DictReader((finished / "comparisons.csv").open(newline=""))
    assert (first["merge"], first["languages"], second["languages"]) == ("lors", "experts", "others")
    assert float(second["p_holm"]) == results["comparisons"][1]["p_holm"]

    text = (finished / "tables.tex").read_text()
    lors = results["models"]["lors"]
    cells = [f"{lors['cells'][f'transcribe/{code}']['wer']:.1f}" for code in ("ca", "es", "pt")]
    cells += [f"{lors['means'][f'transcribe/{group}']['mean']:.1f}" for group in ("experts", "others")]
    assert f"lors & {' & '.join(cells)} \\\\\n" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2


def test_latex_names_are_text(finished: Path) -> None:
    """No label can be a command, end a row or hide the rest of a line."""
    results = _results(finished)
    strange = "a_b & 50% {x} \\input{y} $ # ~ ^\nz"
    models = {(strange if label == "lors" else label): model for label, model in results["models"].items()}
    renamed = {**results, "models": models, "comparisons": [{**results["comparisons"][0], "merge": strange}]}
    plain, odd = latex(results), latex(renamed)
    escaped = r"a\_b \& 50\% \{x\} \textbackslash{}input\{y\} \$ \# \textasciitilde{} \textasciicircum{} z"
    assert odd.count(escaped) == 2
    separators = [len(re.findall(r"(?<!\\)&", line)) for line in odd.splitlines()]
    assert (
        separators[: len(plain.splitlines())][:8] == [len(re.findall(r"(?<!\\)&", x)) for x in plain.splitlines()][:8]
    )
    assert scores_csv(renamed).count('"a_b & 50%') and comparisons_csv(renamed).count('"a_b & 50%') == 1
