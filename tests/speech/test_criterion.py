"""How dev chooses: the criteria, choices at an edge, and one expert for each task."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from cut import cut_config
from lors.errors import LorsError
from lors.speech.data.utterance import Corpus, by_task
from lors.speech.experiment.config import Config, Grid
from lors.speech.experiment.criterion import CRITERIA
from lors.speech.experiment.page import page
from lors.speech.experiment.plan import build_stages
from lors.speech.experiment.report import write_report
from lors.speech.experiment.tables import latex
from lors.speech.experiment.tried import at_edge, tried
from lors.speech.model.tokens import labels
from lors.speech.model.whisper import load_model, load_processor
from lors.speech.scoring.evaluation import Decoder
from lors.speech.scoring.loss import mean_loss


def test_normalised_is_the_mean_over_tasks_of_a_ratio_of_sums() -> None:
    base = {"transcribe ca": 60.0, "transcribe es": 40.0, "translate ca": 10.0, "translate es": 20.0}
    own = {"transcribe ca": 20.0, "transcribe es": 40.0, "translate ca": 40.0, "translate es": 30.0}
    cells = {"transcribe ca": 50.0, "transcribe es": 30.0, "translate ca": 20.0, "translate es": 25.0}
    total = CRITERIA["normalised"].total
    assert total(cells, base, own) == pytest.approx((20 / 40 + 15 / 40) / 2)
    assert total(base, base, own) == 0 and total(own, base, own) == 1
    with pytest.raises(LorsError, match=r"they gained nothing in transcribe \(\+0.00 WER\)"):
        total(cells, base, {**own, "transcribe ca": 60.0})
    with pytest.raises(LorsError, match=r"nothing in translate \(-5.00 BLEU\)"):
        total(cells, base, {**own, "translate ca": 5.0, "translate es": 20.0})


@pytest.mark.parametrize(
    ("name", "values", "best"),
    [("normalised", [0.1, 0.5, 0.5], 1), ("wer", [9, 3, 3], 1), ("bleu", [1, 2, 0], 1), ("loss", [2, 1, 3], 1)],
)
def test_the_best(name: str, values: list[float], best: int) -> None:
    assert CRITERIA[name].ranked(values)[0] == best


def test_the_loss_is_that_of_a_forward_pass_for_each_utterance(catalan: Corpus, tmp_path: Path) -> None:
    model, processor = load_model("tiny"), load_processor("tiny")
    decoder = Decoder.of(model, processor, tmp_path, batch_size=4)
    for task in ("transcribe", "translate"):
        part = by_task(catalan, task)[:10]
        total, count = 0.0, 0
        for utterance in part:
            mel = torch.from_numpy(decoder.features.of(utterance.audio)[None]).float()
            ids = torch.tensor([labels(processor.tokenizer, utterance, task)])
            with torch.no_grad():
                total += float(model(input_features=mel, labels=ids).loss) * ids.numel()
            count += ids.numel()
        assert mean_loss(decoder, part, task) == pytest.approx(total / count, rel=1e-5)
    longest = max(len(labels(processor.tokenizer, u, "transcribe")) for u in catalan)
    config, whole = model.config, model.config.max_target_positions
    try:
        config.max_target_positions = longest - 1  # what does not fit is left out, as in training
        fitting = [u for u in catalan if len(labels(processor.tokenizer, u, "transcribe")) < longest]
        assert 0 < len(fitting) < len(catalan)
        assert mean_loss(decoder, catalan, "transcribe") == pytest.approx(
            mean_loss(decoder, fitting, "transcribe"), rel=1e-5
        )
        config.max_target_positions = 2
        with pytest.raises(LorsError, match="expected utterances with references that fit the decoder"):
            mean_loss(decoder, catalan, "transcribe")
    finally:
        config.max_target_positions = whole


def test_choices_at_an_edge() -> None:
    lams = [{"lam": lam, "density": d, "rank": 8} for lam in (0.1, 0.2, 0.3) for d in (0.5, 1.0)]
    assert at_edge({"lam": 0.2, "density": 0.5, "rank": 8}, lams, "lors") == ["density"]
    assert at_edge({"lam": 0.3, "density": 1.0, "rank": 8}, lams, "lors") == ["lam"], "there is no density beyond 1"
    ranks = [{"rank": rank, "lam": 1.0} for rank in (1, 8, 128)]
    assert [at_edge(setting, ranks, "svp", 128) for setting in ranks] == [[], [], []], (
        "a matrix has no other ranks beyond"
    )
    assert at_edge(ranks[2], ranks, "svp", 256) == ["rank"] == at_edge(ranks[2], ranks, "svp")
    depth = [{"lam": [0.1, 0.2], "normalize": True}, {"lam": [0.2, 0.1], "normalize": False}]
    assert at_edge(depth[0], depth, "ties") == [], "these have no order"
    assert at_edge({"low": 1.0}, [{"low": 1.0}, {"low": 2.0}], "lors_scaled") == ["low"]


def _small(**changes: Any) -> Config:
    """One expert or one per task, of a few steps; a grid of three."""
    grids = {"task_arithmetic": Grid(method="task_arithmetic", parameters={"lam": [0.2, 0.6, 1.0]})}
    common: dict[str, Any] = {
        **cut_config().model_dump(), "data": {**cut_config().data.model_dump(), "dev": 6, "test": 6}, "experts": ("ca",), "languages": ("ca", "es"), "rest_lambda": (),
        "tasks": ("transcribe", "translate"), "training": {"max_steps": 12, "learning_rate": 4e-4}, "grids": grids,
    }  # fmt: skip
    return Config(**{**common, **changes})


def _done(config: Config, root: Path, *kinds: str) -> dict[str, Path]:
    """Stages of these kinds, done in this process; the directories of all."""
    stages = build_stages(config)
    for stage in stages:
        if stage.name.startswith(kinds) and not stage.done(root):
            stage.run(root)
    return {stage.name: stage.directory(root) for stage in stages}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The expert is trained once for all."""
    return tmp_path_factory.mktemp("criteria")


@pytest.mark.parametrize("criterion", ["wer", "bleu", "loss", "normalised"])
def test_every_criterion_chooses_its_best(root: Path, criterion: str) -> None:
    config = _small(criterion=criterion)
    stages = _done(config, root, "expert-", "bounds-", "dev-")
    assert ("bounds-s0" in stages) == (criterion == "normalised")
    grid = tried(config, "task_arithmetic", stages)
    means = [record["mean"] for record in grid["tried"]]
    best = max(means) if CRITERIA[criterion].higher else min(means)
    assert len(set(means)) == 3 and grid["chosen"][0][criterion] == best
    assert grid["chosen"][0]["setting"] == grid["tried"][means.index(best)]["setting"]
    cells = json.loads((stages["dev-task_arithmetic-s0"] / "grid.json").read_text())["best"]["cells"]
    tasks = ["translate"] if criterion == "bleu" else ["transcribe", "translate"]
    assert list(cells) == [f"{task} ca" for task in tasks]


def test_a_search_in_two_rounds(root: Path) -> None:
    """The first round is a search on a sample of dev, the second one on all of it among the first one's best."""
    few = _small(data={**_small().data.model_dump(), "dev": 5})
    halving = _small(halving={"dev": 5, "keep": 2})
    found = {}
    for name, config in (("few", few), ("all", _small()), ("both", halving)):
        stages = _done(config, root, "expert-", "bounds-", "dev-")
        found[name] = tried(config, "task_arithmetic", stages)
    assert found["both"]["tried"] == found["few"]["tried"] != found["all"]["tried"]
    means = [record["mean"] for record in found["few"]["tried"]]
    leading = sorted(range(3), key=lambda i: -means[i])[:2]
    assert [f["setting"] for f in found["both"]["finalists"]] == [found["few"]["tried"][i]["setting"] for i in leading]
    on_all = {str(record["setting"]): record["mean"] for record in found["all"]["tried"]}
    for finalist in found["both"]["finalists"]:
        assert finalist["normalised"] == on_all[str(finalist["setting"])]
    chosen = found["both"]["chosen"][0]
    assert chosen["normalised"] == max(finalist["normalised"] for finalist in found["both"]["finalists"])
    assert "finalists" not in found["all"]
    with pytest.raises(ValidationError, match="halving: expected fewer than the 6 utterances of dev, got 6"):
        _small(halving={"dev": 6, "keep": 2})


def test_all_tasks_share_what_the_encoder_makes(catalan: Corpus, tmp_path: Path) -> None:
    model, counted = load_model("tiny"), []
    model.get_encoder().register_forward_hook(lambda *_: counted.append(1))
    decoder = Decoder.of(model, load_processor("tiny"), tmp_path, batch_size=len(catalan))
    tasks = ("transcribe", "translate")
    both = decoder.results("", catalan, tasks)
    assert len(counted) == 1
    apart = [decoder.results("", catalan, [task])[0] for task in tasks]
    assert len(counted) == 3 and [r.answers for r in both] == [r.answers for r in apart]
    counted.clear()
    # A reference is missing: each task has the utterances that have one.
    some = [replace(catalan[0], translation=None), *catalan[1:]]
    parted = decoder.results("", some, tasks)
    assert len(counted) == 2 and [len(r.answers) for r in parted] == [len(catalan), len(catalan) - 1]


def test_an_expert_for_each_task(tmp_path: Path) -> None:
    config = _small(experts_per="language_task")
    assert [expert.name for expert in config.trained()] == ["ca-transcribe", "ca-translate"]
    stages = _done(config, tmp_path, "")
    write_report(config, tmp_path, stages)
    trained = json.loads((stages["expert-ca-translate-s0"] / "model" / "training.json").read_text())
    assert (trained["languages"], trained["tasks"]) == (["ca"], ["translate"])
    models = json.loads((tmp_path / "results.json").read_text())["models"]
    for task in config.tasks:
        own, expert = models["own expert"]["cells"][f"{task}/ca"], models[f"expert ca-{task}"]["cells"][f"{task}/ca"]
        assert own == expert
    assert models["own expert"]["cells"]["transcribe/ca"] != models["expert ca-translate"]["cells"]["transcribe/ca"]
    bounds = json.loads((stages["bounds-s0"] / "bounds.json").read_text())
    assert list(bounds["dev"]["own"]) == ["transcribe ca", "translate ca"] == list(bounds["dev"]["base"])
    assert "one for each task" in (tmp_path / "report.html").read_text()


def test_calibrated_methods_are_named_as_such(tmp_path: Path, finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    results["config"]["grids"]["lors"]["calibrated"] = "100 unlabelled utterances"
    shown = page(results)
    assert shown.count("lors (calibrated)") >= 3 and "Calibrated: lors on 100 unlabelled utterances." in shown
    assert "lors (calibrated) &" in latex(results) and "task_arithmetic (calibrated)" not in shown
