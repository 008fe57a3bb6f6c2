"""Sweeps: every setting is merged as a recipe would merge it, failures cost one trial, a kill costs nothing."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import lors
import tiny
from helpers import module
from lors.checkpoints.reader import open_checkpoint
from lors.cli import main
from lors.errors import LorsError
from lors.experts.decompose import decompose
from lors.methods import SPECS
from lors.recipes.recipe import Recipe
from lors.sweep.home import Home
from lors.sweep.models import setting_recipe
from lors.sweep.run import sweep
from lors.sweep.score import Score
from lors.sweep.trials import Sweep, Trial


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    family = tiny.family(tmp_path_factory.mktemp("family"), ("ca", "de"))
    path = family["base"].parent / "recipe.yml"
    path.write_text(
        "merge_method: lors\nbase_model: base\nmodels:\n- model: ca\n- model: de\n  parameters: {weight: 0.5}\n"
    )
    return Recipe.load(path, SPECS)


def weights(path: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def norm(path: Path) -> Score:
    """A score that depends on every weight."""
    return Score("complete", (float(sum(np.abs(value.astype(np.float64)).sum() for value in weights(path).values())),))


# --- merging


@pytest.mark.parametrize(
    ("options", "own", "trials"),
    [
        ({"rest": "task_arithmetic,average,base"}, "", [12, 6, 6]),
        ({"rest": "task_arithmetic,average", "rest_lambda": "0.5,2.0"}, "", [16, 8, 8]),
        ({}, "rest: average\nparameters: {rest_lambda: 0.5}\ntarget: {select: mlp}\n", [4, 2, 2]),
    ],
)
def test_every_trial_is_the_merge_of_its_recipe(
    options: dict[str, str], own: str, trials: list[int], recipe: Recipe, tmp_path: Path
) -> None:
    """Through cached factors and the shared merge at lambda 1, for each method, two at a time."""
    if own:
        recipe = Recipe.from_yaml(recipe.to_yaml(resolved=True) + own, SPECS)
    seen: dict[str, dict[str, np.ndarray]] = {}
    lock = threading.Lock()

    def score(path: Path) -> Score:
        with lock:
            seen[path.name] = weights(path)
        return norm(path)

    options = {"rank": "1,3", "density": "0.3", "lambda": "0.2,1.0", **options}
    methods = ("lors", "magnitude_prune", "task_arithmetic")
    done = sweep(recipe, options, score, tmp_path / "sweep", methods=methods, jobs=2)
    assert [sum(t.method == m for t in done.trials) for m in methods] == trials
    assert all(trial.state == "complete" for trial in done.trials)
    with open_checkpoint(str(recipe.base_source)) as checkpoint:
        base = {name: checkpoint.read(name) for name in checkpoint.tensors}
    for trial in done.trials:
        lors.merge_recipe(setting_recipe(recipe, trial.method, trial.settings), tmp_path / "want", force=True)
        got, want = seen[f"{trial.method}-{trial.number}"], weights(tmp_path / "want")
        off = sum(float(((got[n].astype(np.float64) - want[n]) ** 2).sum()) for n in want)
        moved = sum(float(((want[n].astype(np.float64) - base[n]) ** 2).sum()) for n in want)
        # an update of 1e-4 in weights of 0.5 is rounded to 3e-4 of itself, and an entry or two change sides
        assert (off / moved) ** 0.5 < 5e-3, trial
    assert sorted(os.listdir(tmp_path / "sweep")) == [
        ".lock", "best.yml", "index.html", "sweep.json", "trials.csv", "trials.json", "trials.jsonl",
    ]  # fmt: skip


def test_results(recipe: Recipe, tmp_path: Path) -> None:
    calls: list[str] = []

    def score(path: Path) -> Score:
        calls.append(path.name)
        n = len(calls)
        return Score("complete", (float(abs(n - 3)), float(n)))

    done = sweep(recipe, {"lambda": "0.1:0.5:0.1"}, score, tmp_path / "s", objectives=("wer:min", "bleu:max"))
    best, other = done.best(0), done.best(1)
    assert best and other and best.number == 2 and other.number == 4
    assert [trial.number for trial in done.front()] == [2, 3, 4]
    assert Recipe.load(tmp_path / "s" / "best.yml", SPECS).resolve("lambda", tensor="x") == pytest.approx(0.3)
    assert Recipe.load(tmp_path / "s" / "best-bleu.yml", SPECS).resolve("lambda", tensor="x") == pytest.approx(0.5)
    with (tmp_path / "s" / "trials.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["wer"]) for row in rows] == [2, 1, 0, 1, 2] and rows[0]["lambda"] == "0.1"
    html = (tmp_path / "s" / "index.html").read_text()
    assert "Trade-offs" in html and "<script" not in html and "http" not in html.replace("http-equiv", "")
    again = sweep(recipe, {"lambda": "0.1:0.5:0.1"}, score, tmp_path / "s", objectives=("wer:min", "bleu:max"))
    assert len(calls) == 5 and len(again.trials) == 5, "nothing is left to do"
    lors.merge_recipe(Recipe.load(tmp_path / "s" / "best.yml", SPECS), tmp_path / "out")


def test_tpe_goes_on_as_if_it_had_not_been_interrupted(recipe: Recipe, tmp_path: Path) -> None:
    """Same seed, same finished trials: the same next proposal, random (the first ten) or of the model."""
    module("optuna", "sweep")
    options = {"lambda": "0:1", "rank": "1,2", "rest": "average,base"}
    runs: list[list[Trial]] = []
    for counts, seed in (((14,), 0), ((3, 11, 14), 0), ((14,), 1)):
        out = tmp_path / f"s{len(runs)}"
        for count in counts:
            if out.exists():  # what an older version kept, cut off in the middle
                (out / "optuna.log").write_text('{"op_code": 4, "wor')
            done = sweep(recipe, options, closest, out, sampler="tpe", trials=count, seed=seed)
            assert len(done.trials) == count
        runs.append([replace(trial, merge_seconds=0, score_seconds=0) for trial in done.trials])
    assert runs[0] == runs[1] and runs[0] != runs[2]
    tried = [trial.settings["lambda"] for trial in runs[0]]
    assert len(set(tried)) == 14 and [trial.number for trial in runs[0]] == list(range(14))
    more = sweep(recipe, options, closest, tmp_path / "s0", sampler="tpe", trials=20, jobs=3)
    assert sorted(trial.number for trial in more.trials) == list(range(20))


def closest(path: Path) -> Score:
    """Best at lambda 0.3."""
    text = (path / "lors_recipe.yml").read_text()
    return Score("complete", (abs(float(yaml.safe_load(text)["parameters"]["lambda"]) - 0.3),))


def test_tpe_refuses_trials_of_another_space(recipe: Recipe, tmp_path: Path) -> None:
    module("optuna", "sweep")
    sweep(recipe, {"lambda": "0:1"}, norm, tmp_path / "s", sampler="tpe", trials=1)
    for settings in ({"lambda": 7.0}, {"rank": 1}, {"lambda": "x"}, {}):
        line = {"method": "lors", "number": 0, "settings": settings, "state": "complete", "values": [1.0]}
        (tmp_path / "s" / "trials.jsonl").write_text(json.dumps(line) + "\n")
        with pytest.raises(LorsError, match="trials.jsonl: not a trial of this sweep"):
            sweep(recipe, {"lambda": "0:1"}, norm, tmp_path / "s", sampler="tpe", trials=2)


# --- scorers


def test_bad_trials_are_marked_and_the_sweep_goes_on(recipe: Recipe, tmp_path: Path) -> None:
    script = tmp_path / "score.sh"
    script.write_text(
        '#!/bin/sh\ncase "$1" in *-0) echo NaN;; *-1) exit 1;; *-2) sleep 30;; *) ls "$1/model.safetensors" >&2 && echo 1;; esac\n'
    )
    script.chmod(0o755)
    done = sweep(recipe, {"lambda": "0.1,0.2,0.3,0.4"}, str(script), tmp_path / "s", timeout=0.5)
    assert [trial.state for trial in done.trials] == ["nan", "failed", "timeout", "complete"]
    best = done.best()
    assert best and best.number == 3
    script.write_text("#!/bin/sh\nexit 7\n")
    with pytest.raises(LorsError, match="no trial could be scored.*exit code 7"):
        sweep(recipe, {"lambda": "0.1"}, str(script), tmp_path / "t")


# --- kills and refusals


def test_a_killed_sweep_goes_on_where_it_was(recipe: Recipe, tmp_path: Path) -> None:
    source = str(recipe._directory / "recipe.yml") if recipe._directory else ""
    command = [
        sys.executable, "-c", "from lors.cli import main; main()", "sweep", source, "-o", str(tmp_path / "s"),
        "--rank", "1,2", "--lambda", "0.1:0.5:0.1", "--score", "sh -c 'sleep 0.05; echo 1'",
    ]  # fmt: skip
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout is not None
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    log = tmp_path / "s" / "trials.jsonl"
    before = log.read_text().splitlines()
    assert 2 <= len(before) < 10
    with log.open("a") as stream:
        stream.write('{"method": "lors", "numb')  # cut off by the kill
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    after = log.read_text().splitlines()
    assert after[: len(before)] == before and len(after) == 10
    assert sorted(json.loads(line)["number"] for line in after) == list(range(10))
    assert not (tmp_path / "s" / "trials").exists() and not (tmp_path / "s" / "cache").exists()


def test_refusals(recipe: Recipe, tmp_path: Path) -> None:
    def refused(message: str, options: dict[str, str], **more: Any) -> None:
        with pytest.raises(LorsError, match=message) as caught:
            sweep(recipe, options, norm, more.pop("out", tmp_path / "x"), **more)
        assert "\n" not in str(caught.value)

    refused("^rank: 0: expected an integer", {"rank": "0"})
    refused("a grid needs a step", {"lambda": "0:1"})
    refused("no method has such a parameter, did you mean 'density'", {"densty": "1"})
    refused("method task_arithmetic has no such parameter", {"rank": "1"}, methods=("task_arithmetic",))
    refused("unknown method", {"rank": "1"}, methods=("lros",))
    refused("expected one of grid, random, tpe", {"rank": "1"}, sampler="bayes")
    refused("expected a number of trials", {"rank": "1"}, sampler="random")
    refused("--memory: expected at least", {"rank": "1"}, memory=1000, out=tmp_path / "y")
    refused("rank: expected at most", {"rank": "40"}, out=tmp_path / "z")
    for command, message in (
        ("", "expected a command"),
        (" ", "expected a command"),
        ("sh -c 'x", "No closing quotation"),
        ("a\0", "expected"),
    ):
        with pytest.raises(LorsError, match=message):
            sweep(recipe, {"rank": "1"}, command, tmp_path / "never")
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(LorsError, match="--timeout: expected seconds above 0"):
            sweep(recipe, {"rank": "1"}, "true", tmp_path / "never", timeout=seconds)
    assert not (tmp_path / "never").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    refused("expected a new directory", {"rank": "1"}, out=tmp_path / "full")
    sweep(recipe, {"rank": "1"}, norm, tmp_path / "s")
    refused("holds a sweep of other values of rank; use", {"rank": "2"}, out=tmp_path / "s")
    refused("holds a sweep of other values of lambda; use", {"rank": "1", "lambda": "1"}, out=tmp_path / "s")
    refused("holds a sweep with another seed; use", {"rank": "1"}, out=tmp_path / "s", seed=1)


# --- what it was made from


@pytest.fixture
def own(recipe: Recipe, tmp_path: Path) -> Recipe:
    """The same recipe with files that a test may change."""
    assert recipe._directory
    shutil.copytree(recipe._directory, tmp_path / "own")
    return Recipe.load(tmp_path / "own" / "recipe.yml", SPECS)


def broken_off(recipe: Recipe, out: Path) -> None:
    """A sweep of two trials that ended after the first, with its decompositions on disk."""

    def score(path: Path) -> Score:
        if path.name == "lors-1":
            raise RuntimeError("broken off")
        return Score("complete", (1.0,))

    with pytest.raises(RuntimeError, match="broken off"):
        sweep(recipe, {"rank": "1,2"}, score, out)
    assert len((out / "trials.jsonl").read_text().splitlines()) == 1 and list(out.glob("cache/expert-*"))


def test_inputs_that_changed_are_named(own: Recipe, tmp_path: Path) -> None:
    """A sweep that goes on uses what it began with, or says which file it is not."""
    out, root = tmp_path / "s", tmp_path / "own"
    broken_off(own, out)
    kept = {name: (root / name).read_bytes() for name in ("base/config.json", "de/model.safetensors")}
    os.utime(root / "de" / "model.safetensors")
    os.link(root / "de" / "model.safetensors", tmp_path / "link")

    def refused(message: str) -> None:
        with pytest.raises(LorsError, match=message) as caught:
            sweep(own, {"rank": "1,2"}, norm, out)
        assert "\n" not in str(caught.value) and "use a new directory" in str(caught.value)
        assert len((out / "trials.jsonl").read_text().splitlines()) == 1

    (root / "de" / "model.safetensors").unlink()
    shutil.copy(root / "ca" / "model.safetensors", root / "de" / "model.safetensors")
    refused(f"{out}: expert 'de': {root}/de/model.safetensors has changed since this sweep began; put back")
    (root / "de" / "model.safetensors").write_bytes(kept["de/model.safetensors"])
    (root / "base" / "config.json").write_bytes(kept["base/config.json"] + b"\n")
    refused(f"the base: {root}/base/config.json has changed")
    (root / "base" / "config.json").write_bytes(kept["base/config.json"])
    (root / "base" / "tokenizer.json").write_text("{}")
    refused(f"the base: {root}/base/tokenizer.json is new")
    (root / "base" / "tokenizer.json").unlink()
    assert len(sweep(own, {"rank": "1,2"}, norm, out).trials) == 2


def test_the_data_of_the_built_in_scorer_is_an_input(recipe: Recipe, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "manifest.tsv").write_text("id\taudio\ttext\n")
    for _ in range(2):  # nothing is scored: there is no language in it
        with pytest.raises(LorsError, match="no trial could be scored"):
            sweep(recipe, {"rank": "1"}, f"speech {data} ca", tmp_path / "s")
    (data / "manifest.tsv").write_text("id\taudio\ttext\tlanguage\n")
    with pytest.raises(LorsError, match=f"the scorer's data: {data}/manifest.tsv has changed since this sweep began"):
        sweep(recipe, {"rank": "1"}, f"speech {data} ca", tmp_path / "s", retry=True)


def test_inputs_that_change_during_a_sweep_end_it(own: Recipe, tmp_path: Path) -> None:
    weights = tmp_path / "own" / "de" / "model.safetensors"

    def score(path: Path) -> Score:
        if path.name == "lors-1":
            os.utime(weights)
        if path.name == "lors-2":
            weights.write_bytes((tmp_path / "own" / "ca" / "model.safetensors").read_bytes())
        return Score("complete", (1.0,))

    with pytest.raises(LorsError, match="expert 'de': .*de/model.safetensors changed during the sweep"):
        sweep(own, {"rank": "1,2,3,4"}, score, tmp_path / "s")
    assert len((tmp_path / "s" / "trials.jsonl").read_text().splitlines()) == 2


def test_a_decomposition_of_something_else_is_not_used(own: Recipe, tmp_path: Path) -> None:
    out, root = tmp_path / "s", tmp_path / "own"
    broken_off(own, out)
    options: dict[str, Any] = {"rank": 2, "density": 0, "remainder": "none", "name": "de"}
    for base, expert, whose in (("base", "ca", "expert 'de'"), ("ca", "de", "the base")):
        (cached,) = out.glob("cache/expert-1-*")
        decompose(root / base, root / expert, cached, force=True, **options)
        with pytest.raises(LorsError, match=f"{cached}: decomposed from something else: {whose} has other digests"):
            sweep(own, {"rank": "1,2"}, norm, out)
    cached.unlink()
    assert len(sweep(own, {"rank": "1,2"}, norm, out).trials) == 2


def test_a_sweep_without_digests_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    """Those of version 0.1 have none."""
    broken_off(recipe, tmp_path / "s")
    plan = json.loads((tmp_path / "s" / "sweep.json").read_text())
    for changed, message in (({"inputs"}, "earlier version"), (set(plan), "earlier version")):
        text = json.dumps({key: value for key, value in plan.items() if key not in changed})
        (tmp_path / "s" / "sweep.json").write_text(text)
        with pytest.raises(LorsError, match=message):
            sweep(recipe, {"rank": "1,2"}, norm, tmp_path / "s")
    for inputs in (None, [], {"the base": 1}, {"the base": {}}, {"x": {"y": 1}}):
        (tmp_path / "s" / "sweep.json").write_text(json.dumps(plan | {"inputs": inputs}))
        with pytest.raises(LorsError, match="use a new directory"):
            sweep(recipe, {"rank": "1,2"}, norm, tmp_path / "s")
    for text in ("", "[]", "[" * 100_000, "{"):
        (tmp_path / "s" / "sweep.json").write_text(text)
        with pytest.raises(LorsError, match="sweep.json: "):
            sweep(recipe, {"rank": "1,2"}, norm, tmp_path / "s")


def test_scores_of_two_scorers_are_not_mixed(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(LorsError, match="no trial could be scored"):
        sweep(recipe, {"rank": "1"}, "sh -c 'exit 1'", tmp_path / "s")
    sweep(recipe, {"rank": "1"}, "sh -c 'echo 1'", tmp_path / "s", retry=True)  # it has scored nothing yet
    with pytest.raises(LorsError, match="holds a sweep with another score"):
        sweep(recipe, {"rank": "1"}, "sh -c 'echo 2'", tmp_path / "s")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"number": 1.5}', "number: "),
        ('{"number": true}', "number: "),
        ('{"values": [1.0, 2.0]}', "lors 0: expected 1 values, got 2"),
        ('{"values": []}', "lors 0: expected 1 values, got 0"),
        ('{"values": [NaN]}', r"values\[0\]: "),
        ('{"values": [1e999]}', r"values\[0\]: "),
        ('{"values": "1"}', "values: "),
        ('{"settings": {"lambda": [1]}}', "settings.lambda"),
        ('{"state": "done"}', "state: "),
        ('{"mood": 1}', "mood: "),
        ('{"method": null}', "method: "),
        ("[]", "trial"),
        ("[" * 100_000, "line 2: "),
        ("7" * 5000, "line 2: "),
        ("x", "line 2: "),
        ("", "line 2: "),
    ],
    ids=lambda text: text[:20],
)
def test_trials_that_are_none(recipe: Recipe, tmp_path: Path, line: str, message: str) -> None:
    """A file that somebody has edited is refused in one line, not believed."""
    sweep(recipe, {"rank": "1,2"}, norm, tmp_path / "s", trials=1)
    log = tmp_path / "s" / "trials.jsonl"
    good = log.read_text()
    text = json.dumps({**json.loads(good), **json.loads(line)}) if line.startswith("{") else line
    log.write_text(f"{good}{text}\n{good}")
    with pytest.raises(LorsError, match=message) as caught:
        sweep(recipe, {"rank": "1,2"}, norm, tmp_path / "s")
    assert "trials.jsonl: " in str(caught.value) and "\n" not in str(caught.value)


def test_failed_trials_are_tried_again_when_asked(recipe: Recipe, tmp_path: Path) -> None:
    broken = {"lors-0", "lors-2"}

    def score(path: Path) -> Score:
        return Score("failed", (), "no license") if path.name in broken else Score("complete", (float(path.name[-1]),))

    options = {"rank": "1,2,3"}
    sweep(recipe, options, score, tmp_path / "s")
    broken.clear()
    again = sweep(recipe, options, score, tmp_path / "s")
    assert [trial.state for trial in again.trials] == ["failed", "complete", "failed"], "what is on record stays"
    done = sweep(recipe, options, score, tmp_path / "s", retry=True)
    assert {trial.number: trial.values for trial in done.trials} == {0: (0.0,), 1: (1.0,), 2: (2.0,)}
    assert len((tmp_path / "s" / "trials.jsonl").read_text().splitlines()) == 3


def test_a_scorer_may_do_what_it_likes_with_the_directory(recipe: Recipe, tmp_path: Path) -> None:
    """Models are written over one another: what a scorer keeps by a link stays as it was, what it broke is made anew."""
    seen: dict[str, bytes] = {}

    def score(path: Path) -> Score:
        weights = path / "model.safetensors"
        seen[path.name] = weights.read_bytes()
        assert sorted(p.name for p in path.iterdir()) == ["config.json", "lors_recipe.yml", "model.safetensors"]
        number = int(path.name[-1])
        if number == 0:
            os.link(weights, tmp_path / "kept")
        elif number == 1:
            (path / "cache").mkdir()
            weights.write_bytes(b"junk" * (1 + len(seen[path.name])))
        elif number == 2:
            path.rename(tmp_path / "taken")
        return Score("complete", (1.0,))

    lambdas = (0.2, 0.4, 0.6, 0.8)
    sweep(recipe, {"lambda": ",".join(map(str, lambdas))}, score, tmp_path / "s")
    assert (tmp_path / "kept").read_bytes() == seen["lors-0"] and (tmp_path / "taken").is_dir()
    for number, lam in enumerate(lambdas):
        alone: list[bytes] = []

        def keep(path: Path, alone: list[bytes] = alone) -> Score:
            alone.append((path / "model.safetensors").read_bytes())
            return Score("complete", (1.0,))

        sweep(recipe, {"lambda": str(lam)}, keep, tmp_path / f"fresh-{number}")
        assert alone == [seen[f"lors-{number}"]], "the same bits as in a directory of its own"


def test_one_sweep_at_a_time(recipe: Recipe, tmp_path: Path) -> None:
    messages = []

    def score(path: Path) -> Score:
        try:
            sweep(recipe, {"rank": "1"}, norm, tmp_path / "s")
        except LorsError as error:
            messages.append(str(error))
        return Score("complete", (1.0,))

    done = sweep(recipe, {"rank": "1"}, score, tmp_path / "s")
    assert isinstance(done, Sweep) and isinstance(done.trials[0], Trial)
    assert len(messages) == 1 and "another sweep is running" in messages[0]


def test_what_a_killed_sweep_was_writing_goes(tmp_path: Path) -> None:
    partial = ".{}.12-0123abcd.tmp".format
    (tmp_path / partial("sweep.json")).touch()  # before it began: the directory is as good as new
    home = Home(tmp_path)
    with home.open() as before:
        assert before is None
        home.begin({"a": 1})
    (tmp_path / partial("index.html")).touch()
    (tmp_path / ".mine.tmp").touch()
    with home.open() as before:
        assert before == {"a": 1}
        home.begin(before)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", ".mine.tmp", "sweep.json"}


def test_a_directory_of_something_else_is_no_sweep(tmp_path: Path) -> None:
    name = ".notes.json.12-0123abcd.tmp"
    (tmp_path / name).touch()
    problem = f"expected a new directory or that of a sweep, it has {name!r}"
    with pytest.raises(LorsError, match=problem), Home(tmp_path).open():
        pass


@pytest.mark.parametrize(("objective", "said"), [("size", "size 3 (lowest)"), ("bleu:max", "bleu 4 (highest)")])
def test_the_last_line_says_which_was_the_best(
    objective: str,
    said: str,
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "r.yml").write_text(recipe.to_yaml(resolved=True))
    (tmp_path / "score.sh").write_text("case $1 in *-0*) echo 3;; *) echo 4;; esac\n")
    arguments = ["sweep", tmp_path / "r.yml", "--lambda", "0.1,0.2", "--objective", objective, "-o", tmp_path / "s"]
    monkeypatch.setattr("sys.argv", ["lors", *map(str, arguments), "--score", f"sh {tmp_path}/score.sh"])
    main()
    assert f", {said} -> " in capsys.readouterr().out.splitlines()[-1]
