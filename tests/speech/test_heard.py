"""Calibrated methods in the experiment: what they are given of recordings comes before dev, and goes into every merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lors.errors import LorsError
from lors.experts.statistics import read_statistics
from lors.speech import run_experiment
from lors.speech.demo import RECORDINGS
from lors.speech.experiment import work
from lors.speech.experiment.config import Config, Data, Grid, load_config
from lors.speech.experiment.plan import build_stages

WORDS = "4 unlabelled training utterances per language"
LAMBDAS = {"lam": [0.5, 1.0]}
GRIDS: dict[str, Any] = {
    "task_arithmetic": {"method": "task_arithmetic", "parameters": LAMBDAS},
    "regmean": {
        "method": "regmean", "parameters": LAMBDAS, "calibrated": WORDS, "heard": {"gives": "statistics", "utterances": 4},
    },
    "learned": {
        "method": "lors_parts", "parameters": LAMBDAS, "calibrated": WORDS,
        "heard": {"gives": "weights", "utterances": 4, "parts": "apart", "steps": 2},
    },
}  # fmt: skip


def config(**changes: Any) -> Config:
    return Config(
        name="heard",
        base="tiny",
        data=Data(source=str(RECORDINGS), train=8, dev=2, test=3),
        experts=("ca", "es"),
        languages=("ca", "es"),
        training={"max_steps": 2, "per_device_train_batch_size": 2},
        rest="average",
        criterion="loss",
        grids={label: Grid(**grid) for label, grid in GRIDS.items()},
        **changes,
    )


def test_calibrated_methods_run_whole(tmp_path: Path) -> None:
    run_experiment(config(), tmp_path, jobs=1, report=lambda line: None)
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"regmean", "learned"} < set(results["models"])
    assert "regmean (calibrated)" in (tmp_path / "report.html").read_text()
    assert results["normaliser"] == "whisper"
    assert results["units"] == {"transcribe/ca": "WER", "transcribe/es": "WER"}
    stages = {stage.name: stage for stage in build_stages(config())}
    (given,) = (stages[name].directory(tmp_path) for name in stages if name == "heard-regmean-s0")
    name = "model.encoder.layers.0.fc1.weight"
    for expert in ("expert-ca-s0", "expert-es-s0"):
        assert read_statistics(str(given / f"{expert}.stats.safetensors"), name, (512, 128)).any()
    settings = json.loads((stages["heard-learned-s0"].directory(tmp_path) / "settings.json").read_text())
    assert settings["orthogonal"] is False and len(settings["sparse_weight"]["expert-ca-s0"]) == 32
    for label in ("regmean", "learned"):
        needs = {need.name for need in stages[f"test-{label}-s0"].needs}
        assert {f"heard-{label}-s0", f"dev-{label}-s0"} < needs
    assert "heard-regmean-s0" not in {need.name for need in stages["test-task_arithmetic-s0"].needs}


def test_what_was_heard_is_a_setting_of_the_merge(tmp_path: Path) -> None:
    directory = tmp_path / "heard-x-s0"
    directory.mkdir()
    assert work._heard({"dev-x-s0": tmp_path}, "average") == {}
    (directory / "settings.json").write_text('{"weight": {"a": [{"filter": "w", "value": 2}]}}')
    said = work._heard({"heard-x-s0": directory}, "average")
    assert said == {"weight": {"a": [{"filter": "w", "value": 2}]}, "rest": "average"}
    (directory / "a.stats.safetensors").touch()
    assert work._heard({"heard-x-s0": directory}, "average") == {
        "statistics": {"a": str(directory / "a.stats.safetensors")}
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibrated": None}, "heard: expected calibrated, which says in words what was heard"),
        ({"method": "task_arithmetic", "parameters": {}}, "weights of apart are of lors_parts, not task_arithmetic"),
    ],
)
def test_grids_that_do_not_fit_what_is_heard(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    import yaml

    document = config().model_dump(mode="json")
    document["grids"] = {"learned": GRIDS["learned"] | change, "task_arithmetic": GRIDS["task_arithmetic"]}
    (tmp_path / "c.yml").write_text(yaml.safe_dump(document))
    with pytest.raises(LorsError, match=message):
        load_config(tmp_path / "c.yml")
