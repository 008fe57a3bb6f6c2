"""The cut `quick` experiment: what it finds, that kernels and reference agree in every word, that it can be cut."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cut import cut_config, dies, on_gpu
from helpers import module
from lors import merge
from lors.errors import LorsError
from lors.speech import evaluate, run_experiment
from lors.speech.experiment import plan
from lors.speech.experiment.config import Grid, load_config, shipped_configs
from lors.speech.experiment.page import page
from lors.speech.experiment.plan import build_stages
from lors.speech.experiment.report import print_tables
from lors.speech.experiment.stages import Stage, exclusive, run_stages
from lors.speech.model.whisper import SHIPPED
from processes import gone, marked, unlucky, wait_for, wait_until

KILLS = int(os.environ.get("LORS_KILLS", "2"))


@pytest.fixture(scope="session")
def results(finished: Path) -> dict[str, Any]:
    return dict(json.loads((finished / "results.json").read_text()))


def _wer(results: dict[str, Any], model: str, group: str = "experts") -> float:
    return float(results["models"][model]["means"][f"transcribe/{group}"]["mean"])


def test_experts_beat_the_base_by_a_wide_margin(results: dict[str, Any]) -> None:
    assert 50 < _wer(results, "base") < 80
    assert _wer(results, "own expert") < 0.7 * _wer(results, "base")


def test_merges_beat_the_base_and_lose_to_each_languages_own_expert(results: dict[str, Any]) -> None:
    for method in ("task_arithmetic", "lors"):
        assert _wer(results, method) < 0.9 * _wer(results, "base"), method
        assert _wer(results, method, "others") < _wer(results, "base", "others"), method
        share = results["models"][method]["normalised"]
        assert 0 < share["low"] < share["mean"] < share["high"], method
        assert share["mean"] < 1.1 and share["flat"] == [], method


def test_kernels_and_reference_give_the_same_words(results: dict[str, Any]) -> None:
    assert results["reference"] == {"utterances": 75, "differing": 0}


def test_chosen_on_dev_with_equal_budgets(results: dict[str, Any]) -> None:
    assert {len(grid["tried"]) for grid in results["grids"].values()} == {4}
    for grid in results["grids"].values():
        chosen, settings = grid["chosen"][0], [record["setting"] for record in grid["tried"]]
        assert chosen["normalised"] == max(record["mean"] for record in grid["tried"])
        assert chosen["edges"] == ["lam", "rest_lambda"], "two values of each: every choice is at an edge"
        assert all(chosen["setting"][name] in (s[name] for s in settings) for name in chosen["setting"])


def test_report_shows_every_number(finished: Path, results: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    shown = (finished / "report.html").read_text()
    for text in (f"{_wer(results, 'lors'):.2f}", "lambda 0.5", "paired bootstrap", "σ(r+1)/σ(r)", "<svg"):
        assert text in shown
    print_tables(finished)
    assert f"{_wer(results, 'base'):.2f}" in capsys.readouterr().out


def test_no_label_is_markup(results: dict[str, Any]) -> None:
    """Every text of the results replaced: the page has the same elements, and none of the text's."""

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key + more if key in results["grids"] else key: renamed(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [renamed(inner) for inner in value]
        return (
            value + more
            if value in (*results["grids"], results["config"]["name"], results["config"]["base"])
            else value
        )

    pages = []
    for more in ("", "<script>'\"&\x1b[2J"):
        changed = renamed(results)
        changed["config"] |= {"rest": "base" + more, "experts": [f"{x}{more}" for x in results["config"]["experts"]]}
        changed["signatures"] = {name + more: text + more for name, text in results["signatures"].items()}
        changed["versions"] = {name + more: text + more for name, text in results["versions"].items()}
        pages.append(page(changed))
    assert "<script>" not in pages[1] and "\x1b" not in pages[1] and "&lt;script&gt;" in pages[1]
    assert pages[0].count("<") == pages[1].count("<")


def test_merging_the_files_gives_the_words_of_the_experiment(
    finished: Path, results: dict[str, Any], tmp_path: Path
) -> None:
    config = cut_config()
    stages = {stage.name: stage.directory(finished) for stage in build_stages(config)}
    setting = results["grids"]["lors"]["chosen"][0]["setting"]
    experts = {language: stages[f"expert-{language}-s0"] / "model" for language in config.experts}
    merge(SHIPPED["tiny"], experts, tmp_path / "merged", "lors", out_dtype="float32", durable=False, **setting)
    evaluation = evaluate(tmp_path / "merged", data=config.data.source or "", languages=config.languages)
    lines = (stages["test-lors-s0"] / "answers.jsonl").read_text().splitlines()
    assert [a.hypothesis for r in evaluation.results for a in r.answers] == [json.loads(x)["hypothesis"] for x in lines]


def test_lora_experts_merge_from_their_adapters(tmp_path: Path) -> None:
    """Adapters are experts as they are: the merge of the expanded models, which the experiment makes, says the same."""
    module("peft", "speech")
    training = {"train": "lora", "lora_rank": 4, "max_steps": 30, "learning_rate": 3e-3, "warmup_steps": 3}
    grids = {"lors": Grid(method="lors", parameters={"rank": [3], "density": [0.2], "lam": [0.6]})}
    changes = {"languages": ("ca", "es"), "training": training, "grids": grids, "against": "lors"}
    config = cut_config().model_copy(update=changes)
    run_experiment(config, tmp_path / "x", jobs=2, report=lambda line: None)
    results = json.loads((tmp_path / "x" / "results.json").read_text())
    assert _wer(results, "own expert") < 0.9 * _wer(results, "base")

    stages = {stage.name: stage.directory(tmp_path / "x") for stage in build_stages(config)}
    adapters = {language: stages[f"expert-{language}-s0"] / "model" / "adapter" for language in config.experts}
    setting = results["grids"]["lors"]["chosen"][0]["setting"]
    merge(SHIPPED["tiny"], adapters, tmp_path / "merged", "lors", out_dtype="float32", durable=False, **setting)
    evaluation = evaluate(tmp_path / "merged", data=config.data.source or "", languages=config.languages)
    lines = (stages["test-lors-s0"] / "answers.jsonl").read_text().splitlines()
    assert [a.hypothesis for r in evaluation.results for a in r.answers] == [json.loads(x)["hypothesis"] for x in lines]


def test_a_finished_experiment_does_nothing_and_a_new_method_only_itself(finished: Path, tmp_path: Path) -> None:
    config = cut_config()
    said: list[str] = []
    run_experiment(config, finished, jobs=1, report=said.append)
    assert said == ["10 of 10 stages were already done"]
    grids = {**config.grids, "svp": Grid(method="svp", parameters={"rank": [4], "lam": [0.5, 0.9]})}
    changed = config.model_copy(update={"grids": grids})
    todo = [stage.name for stage in build_stages(changed) if not stage.done(finished)]
    assert todo == ["dev-svp-s0", "test-svp-s0"]
    # Other test sentences are no reason to train again.
    data = config.data.model_copy(update={"test": 24})
    todo = [s.name for s in build_stages(config.model_copy(update={"data": data})) if not s.done(finished)]
    assert todo == ["test-base", *(f"test-{name}-s0" for name in ("task_arithmetic", "lors", "expert-ca", "expert-es"))]
    other = config.model_copy(update={"training": {**config.training, "learning_rate": 1e-4}})
    assert [stage.name for stage in build_stages(other) if stage.done(finished)] == ["test-base"]


def test_killed_and_started_again(tmp_path: Path) -> None:
    """SIGKILL while an expert trains: the stage dies with the run, the second run keeps what was finished."""
    changes = {"experts": ("ca",), "languages": ("ca",), "grids": {}}
    script = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "if __name__ == '__main__':\n"
        "    from cut import cut_config\n"
        "    from lors.speech import run_experiment\n"
        f"    c = cut_config().model_copy(update={changes!r})\n"
        "    run_experiment(c, sys.argv[1], jobs=2, report=lambda line: print(line, flush=True))\n"
    )
    (tmp_path / "run.py").write_text(script)
    command = [
        sys.executable,
        str(tmp_path / "run.py"),
        str(tmp_path / "out"),
        str(Path(__file__).parent.parent / "support"),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(
        (tmp_path / "out" / "stages").glob("expert-*.partial/model.checkpoints/*/checkpoint-30/trainer_state.json")
    ):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)  # returns when the last process that holds the pipe is gone
    assert not (tmp_path / "out" / "report.html").exists()
    said: list[str] = []
    run_experiment(cut_config().model_copy(update=changes), tmp_path / "out", jobs=2, report=said.append)
    assert "1 of 3 stages were already done" in said and (tmp_path / "out" / "report.html").exists()
    trained = next((tmp_path / "out" / "stages").glob("expert-ca-s0-*/model/training.json"))
    assert json.loads(trained.read_text())["resumed_from"] >= 30


STAGES = [sys.executable, str(Path(__file__).parent.parent / "support" / "stages_command.py"), "stages"]


@pytest.mark.usefixtures("linux")
@pytest.mark.parametrize(
    "signals",
    [(signal.SIGTERM,), (signal.SIGINT, signal.SIGINT), (signal.SIGKILL,)],
    ids=lambda signals: "-".join(signum.name for signum in signals),
)
def test_a_signal_ends_a_run_and_its_stages(tmp_path: Path, signals: tuple[int, ...]) -> None:
    with marked([*STAGES, str(tmp_path / "out"), "hangs", str(tmp_path / "up")], tmp_path / "log") as found:
        wait_for(tmp_path / "up", 120)
        assert len(found.alive()) >= 6
        assert found.end(*signals) < 5
        assert gone(found), (tmp_path / "log").read_text()
        assert found.process.returncode in (128 + signals[0], -signals[0])
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.usefixtures("linux")
def test_a_run_that_is_killed_at_its_beginning_leaves_no_fork_server(tmp_path: Path) -> None:
    """It imports for seconds and looks for its parent only then."""
    with marked([*STAGES, str(tmp_path / "out"), "hangs", str(tmp_path / "up")], tmp_path / "log") as found:
        deadline = time.monotonic() + 60
        while not any(b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in found.alive()):
            assert time.monotonic() < deadline
        found.end(signal.SIGKILL)
        assert gone(found, 1.5)


@pytest.mark.usefixtures("linux")
@pytest.mark.timeout(300 + 60 * KILLS)
def test_signals_at_random_moments(tmp_path: Path) -> None:
    """A run that is ended again and again: within 5 s, nothing outlives it, what is done stays done, and it comes to its end."""
    count, out, log = 30, tmp_path / "out", tmp_path / "log"
    command = [*STAGES, str(out), "counts", str(count)]
    begun = time.monotonic()
    with marked([*STAGES, str(tmp_path / "want"), "counts", str(count)], log) as found:
        assert found.process.wait(120) == 0
    span, hits, rounds, slowest, done = time.monotonic() - begun, 0, 0, 0.0, dict[str, str]()

    def totals(root: Path) -> dict[str, str]:
        return {path.parent.name: path.read_text() for path in root.glob("stages/*[!l]/total")}  # not in .partial

    want = totals(tmp_path / "want")
    assert len(want) == count and len(set(want.values())) > count / 2
    for number in range(KILLS):
        rng = random.Random(number)
        signals, pause = unlucky(rng)
        with marked(command, log) as found:
            assert wait_until(lambda: "begun" in log.read_text(), 60)  # Ctrl-C before that is Python's own affair
            time.sleep(rng.uniform(0, span))
            slowest = max(slowest, found.end(*signals, pause=pause))
            assert gone(found) and slowest < 5, (number, signals)
            hits += found.process.returncode != 0
        assert "Traceback" not in log.read_text(), log.read_text()
        before, done = done, totals(out)
        assert before.items() <= done.items() <= want.items()
        if len(done) == count:
            shutil.rmtree(out)
            done, rounds = {}, rounds + 1
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert totals(out) == want and not list(out.glob("stages/*.partial"))
    print(
        f"{hits} of {KILLS} signals came before the end, the slowest end took {slowest:.2f} s, {rounds} runs came to their end"
    )


def test_a_run_whose_processes_are_killed_says_so(tmp_path: Path) -> None:
    with marked([*STAGES, str(tmp_path / "out"), "hangs", str(tmp_path / "up")], tmp_path / "log") as found:
        wait_for(tmp_path / "up", 120)
        for pid in found.alive():
            if pid != found.process.pid:
                os.kill(pid, signal.SIGKILL)
        assert found.process.wait(10) == 2
    assert "has ended; run the same command again" in (tmp_path / "log").read_text()


# ------------------------------------------------------------------------------------------------------ bad input


def test_shipped_configurations_are_valid() -> None:
    assert shipped_configs() == ["clean", "covost-small", "fleurs", "hard", "quick"]
    for name in shipped_configs():
        config = load_config(name)
        for label, grid in config.grids.items():  # no parameter whose every choice would be at an edge
            assert all(len(set(map(str, values))) != 2 for values in grid.parameters.values()), (name, label)
        assert len(config.rest_lambda) != 2


EARLIER = {  # name, changes -> digest of the keys of all stages, when their results were committed
    ("clean", "task_arithmetic"): "8f56aecef4fbf6d3",
    ("clean-variants", "task_arithmetic"): "a3d94b01f22a8fd1",
    ("hard", "task_arithmetic"): "a228343176015118",
    ("hard", "average"): "fe6a33fc52be922d",
    ("hard-variants", "average"): "c974636ffc8b4faa",
    ("quick-before", "task_arithmetic"): "f1b063a018dd7c1f",
    ("quick-before", "average"): "8f1f69cac2bda7e9",
}


@pytest.mark.parametrize(("name", "rest"), EARLIER)
def test_earlier_results_have_the_keys_that_they_had(name: str, rest: str) -> None:
    """Whoever has their stages goes on from these; whoever has none makes the same."""
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "experiment" / name / "config.yml"
    keys = " ".join(f"{stage.name}-{stage.key}" for stage in build_stages(load_config(path, rest=rest)))
    assert hashlib.sha256(keys.encode()).hexdigest()[:16] == EARLIER[name, rest]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: x\nbase: tiny\ndata: {source: x}\nexperts: [ca]\nlanguages: [de]", "'ca' is missing"),
        ("name: x\nbase: tiny\ndata: {source: x}\nexperts: [ca]\nlanguages: [ca]\nspeed: 9", "speed: Extra inputs"),
        (
            "name: x\nbase: tiny\ndata: {source: x}\nexperts: [ca]\nlanguages: [ca]\ntraining: {steps: 9}",
            "training: .*steps",
        ),
        (
            "name: x\nbase: tiny\ndata: {source: x}\nexperts: [ca]\nlanguages: [ca]\ntraining: {lr_scheduler_type: lineer}",
            "training: lr_scheduler_type: no 'lineer', did you mean 'linear'",
        ),
        (
            "name: x\nbase: tiny\ndata: {source: x}\nexperts: [ca]\nlanguages: [ca]\ngrids:\n"
            "  task_arithmetic: {method: task_arithmetic, parameters: {lam: [1, 2, 3]}}\n"
            "  lors: {method: lors, parameters: {rank: [1, 2], lam: [1, 2]}}",
            "expected the same number of settings for every method",
        ),
        (
            "name: x\nbase: tiny\ndata: {source: x}\nexperts: [ca]\nlanguages: [ca]\ngrids: {a: {method: lorz}}",
            "unknown method 'lorz', did you mean 'lors'",
        ),
        (
            "name: x\nbase: tiny\ndata: {source: x}\nexperts: [ca]\nlanguages: [ca]\ngrids: {a: {method: lors, parameters: {ranks: [1]}}}",
            "lors has no parameter 'ranks', did you mean 'rank'",
        ),
        (
            "name: x\nbase: tiny\ndata: {source: x}\nexperts: [ca]\nlanguages: [ca]\ncriterion: bleu",
            "criterion: 'bleu' is of translate, no task here",
        ),
        ("- 1", "expected a mapping"),
    ],
)
def test_wrong_configurations(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x.yml").write_text(text)
    with pytest.raises(LorsError, match=said) as error:
        load_config(tmp_path / "x.yml")
    assert "x.yml" in str(error.value)


def test_output_named_like_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quick").mkdir()  # by `lors experiment quick -o quick`, which is then run again
    monkeypatch.chdir(tmp_path)
    assert load_config("quick").name == "quick"


def test_configuration_that_is_not_there() -> None:
    with pytest.raises(LorsError, match="shipped configurations: clean, covost-small"):
        load_config("quik")


def test_failing_stage_is_one_line_and_names_the_stage(tmp_path: Path) -> None:
    config = cut_config().model_copy(update={"languages": ("ca", "es", "en")})
    with pytest.raises(LorsError, match=r"stage test-base: .*no 'en' in split 'test'.*run the same command again"):
        run_experiment(config, tmp_path / "x", jobs=1, report=lambda line: None)


def test_languages_that_the_base_lacks(tmp_path: Path) -> None:
    with pytest.raises(LorsError, match="tiny: the model has no language 'fi'"):
        run_experiment(cut_config().model_copy(update={"languages": ("ca", "es", "fi")}), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(LorsError, match="^device: 'cuda' was asked for, and PyTorch"):
        run_experiment(cut_config().model_copy(update={"device": "cuda"}), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_stage_that_is_killed_says_so(tmp_path: Path) -> None:
    with pytest.raises(LorsError, match=r"stage x: killed by SIGKILL, as systems do .*; run the same command again"):
        run_stages([Stage("x", dies, {})], tmp_path, 1, lambda line: None)


def test_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LorsError, match="cannot write .*file"):
        run_experiment(cut_config(), tmp_path / "file")


def test_stages_alone(tmp_path: Path) -> None:
    with pytest.raises(LorsError, match="stage test-lors-s0: needs expert-ca-s0, expert-es-s0, dev-lors-s0 first"):
        run_experiment(cut_config(), tmp_path / "x", stage="test-lors-s0")
    with pytest.raises(LorsError, match="no 'test-bass', did you mean 'test-base'"):
        run_experiment(cut_config(), tmp_path / "x", stage="test-bass")
    config = cut_config().model_copy(update={"languages": ("ca", "es")})
    said: list[str] = []
    for _ in range(2):
        run_experiment(config, tmp_path / "x", stage="test-base", report=said.append)
    assert said[0].startswith("test-base: ") and said[1].startswith("stage test-base was already done")


def test_two_runs_in_one_directory(finished: Path) -> None:
    with (
        exclusive(finished),
        pytest.raises(LorsError, match=f"{finished.name}: another experiment is running here"),
    ):
        run_experiment(cut_config(), finished)
    with exclusive(finished, shared=True):  # as a stage alone does
        run_experiment(cut_config(), finished, stage="test-base", report=lambda line: None)
        with pytest.raises(LorsError, match="another experiment is running here"):
            run_experiment(cut_config(), finished)


def test_keys_of_stages_that_many_need() -> None:
    """Remembered: with 60 stages one upon the other, each needing the one below twice, it would take years."""
    stage = Stage("0", print, {})
    for depth in range(60):
        stage = Stage(str(depth + 1), print, {}, (stage, stage))
    assert len(stage.key) == 12 and stage.key == dataclasses.replace(stage).key != stage.needs[0].key


def test_every_stage_has_a_gpu_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "together").mkdir()
    stages = [Stage(f"s{number}", on_gpu, {"together": str(tmp_path / "together")}) for number in range(8)]
    run_stages(stages, tmp_path, 2, lambda line: None, ["3", "5", "7"])
    seen = [(stage.directory(tmp_path) / "seen").read_text().split() for stage in stages]
    assert {gpu for gpu, _ in seen} == {"3", "5"}, "two jobs take two of three GPUs"
    assert "2" in {count for _, count in seen}, "and both are busy at a time"


def test_gpus_of_an_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(plan, "run_stages", lambda stages, root, jobs, report, gpus: taken.append((jobs, gpus)))
    monkeypatch.setattr("lors.speech.experiment.report.write_report", lambda *_: tmp_path / "report.html")
    config = cut_config().model_copy(update={"device": "cuda"})
    for visible, jobs, want in (
        (None, None, (2, ["0", "1"])),
        ("4,6", None, (2, ["4", "6"])),
        ("GPU-a1,GPU-b2", 1, (1, ["GPU-a1", "GPU-b2"])),
    ):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        run_experiment(config, tmp_path, jobs=jobs)
        assert taken.pop() == want
    with pytest.raises(LorsError, match="--jobs: expected at most 2 with --device cuda, a stage per GPU, got 3"):
        run_experiment(config, tmp_path, jobs=3)


def test_decoding_has_a_dtype(tmp_path: Path) -> None:
    config = cut_config()
    keys = {stage.name: stage.key for stage in build_stages(config)}
    half = {stage.name: stage for stage in build_stages(config.model_copy(update={"dtype": "bfloat16"}))}
    changed = {name for name, stage in half.items() if stage.key != keys[name]}
    assert changed == {name for name in keys if name.startswith(("bounds-", "dev-", "test-"))}
    root = tmp_path / "stages"
    half["test-base"].run(tmp_path)
    assert (
        json.loads((half["test-base"].directory(tmp_path) / "scores.json").read_text())[0]["wer"] > 0 and root.is_dir()
    )
    with pytest.raises(ValueError, match="dtype"):
        type(config).model_validate({**config.model_dump(), "dtype": "int8"})
