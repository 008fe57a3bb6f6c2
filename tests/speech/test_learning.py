"""Weights that are learned: they make the loss smaller, and a merge by the recipe is the network that was trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import lors
from lors import LorsError
from lors.methods import SPECS
from lors.recipes.recipe import Recipe
from lors.speech import learning
from lors.speech.data.corpus import load_corpus
from lors.speech.learning import FORMS, Learning, Weighted, learn
from lors.speech.model.whisper import SHIPPED, load_model

LANGUAGES = {"ca": "ca", "de": "de"}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two models that differ from the base in every tensor, and from each other."""
    found = {}
    for seed, name in enumerate(LANGUAGES):
        model = load_model("tiny")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in model.parameters():
                value += 0.02 * value.std() * torch.randn(value.shape, generator=generator)
        path = tmp_path_factory.mktemp("experts") / name
        model.save_pretrained(path)
        for file in SHIPPED["tiny"].iterdir():
            if not (path / file.name).exists():
                (path / file.name).write_bytes(file.read_bytes())
        found[name] = str(path)
    return found


def learned(experts: Mapping[str, str], out: Path, recordings: Path, **options: Any) -> Path:
    options = {"how": Learning(steps=2), **options}
    return learn("tiny", experts, out, data=str(recordings), languages=LANGUAGES, split="dev", limit=3, **options)


@pytest.mark.parametrize("parts", FORMS)
def test_a_merge_by_the_recipe_is_the_network_that_was_trained(
    parts: str, experts: dict[str, str], tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[str, Any] = {}
    train = Weighted.train
    monkeypatch.setattr(Weighted, "train", lambda self, *rest: (held.update(it=self), train(self, *rest))[1])
    out = learned(experts, tmp_path / "r.yml", recordings, how=Learning(parts, steps=3, learning_rate=0.1))
    out.write_text(out.read_text() + "out_dtype: float32\n")  # the base's is float16
    lors.merge_recipe(Recipe.load(out, SPECS), tmp_path / "merged", durable=False)
    merged = load_model(tmp_path / "merged")
    trained, base = held["it"].network, load_model("tiny")
    start = FORMS[parts].starts["weight"](2)
    for name, value in base.named_parameters():
        got, want = (model.get_submodule(name.rpartition(".")[0]) for model in (merged, trained))
        got, want = (getattr(module, name.rpartition(".")[2]) for module in (got, want))
        assert (got - want).norm() <= 1e-5 * (value - want).norm() + 1e-6 * value.norm(), name
    weights = [w for of in held["it"].values()["weight"].values() for w in of.values()]
    moved = sum(0.05 < abs(w - start) < 0.35 for w in weights)
    assert moved > 0.8 * len(weights), "by about the learning rate in every step"


def test_the_loss_becomes_smaller(experts: dict[str, str], tmp_path: Path, recordings: Path) -> None:
    """From weights that spoil the experts' words, on the recordings that are learned from."""
    losses: list[float] = []
    train = Weighted.train

    def spoilt(self: Weighted, *rest: Any) -> list[float]:
        with torch.no_grad():
            for factors in self.factors.values():
                factors.fill_(6.0)
        losses.extend(train(self, *rest))
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Weighted, "train", spoilt)
        learned(experts, tmp_path / "r.yml", recordings, how=Learning(steps=20, batch_size=6, learning_rate=0.3))
    assert len(losses) == 20 and losses[-1] < 0.7 * losses[0]


def test_texts_are_not_read_and_what_experts_hear_is(recordings: Path, tmp_path: Path, experts: dict[str, str]) -> None:
    seen: list[Any] = []
    of = learning.labels
    corpus = [u for language in LANGUAGES for u in load_corpus(recordings, languages=language, split="dev", limit=2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            learning, "labels", lambda tokenizer, u, task: (seen.append((u, task)), of(tokenizer, u, task))[1]
        )
        options: dict[str, Any] = {
            "languages": LANGUAGES,
            "how": Learning(steps=1),
            "tasks": ("transcribe", "translate"),
        }
        first = learn("tiny", experts, tmp_path / "a.yml", data=corpus, **options).read_text()
        blank = [type(u)(u.id, u.audio, "?", None, u.language) for u in corpus]
        again = learn("tiny", experts, tmp_path / "b.yml", data=blank, **options).read_text()
    assert first == again
    assert {task for _, task in seen} == {"transcribe", "translate"}
    assert {u.language for u, _ in seen} == {"ca", "de"} and not {u.text for u, _ in seen} & {"?"}


def test_the_command(experts: dict[str, str], tmp_path: Path, recordings: Path) -> None:
    from typer.testing import CliRunner

    from lors.cli.app import application

    app = application(["learn"])
    line = ["learn", "tiny", f"ca={experts['ca']}", f"x={experts['de']}", "--data", str(recordings), "--device", "cpu"]
    line += ["--language", "x=de", "--limit", "1", "--split", "dev", "--steps", "1", "-o", str(tmp_path / "r.yml")]
    said = CliRunner().invoke(app, line)
    assert said.exit_code == 0, said.output
    assert (
        (tmp_path / "r.yml").read_text().startswith("# lors learn: 1 steps on up to 1 recordings of each of ca, de\n")
    )
    with pytest.raises(LorsError, match="exists already; --force replaces it"):
        CliRunner().invoke(app, line, catch_exceptions=False)
    (tmp_path / "r.yml").write_text("merge_method: lors\n")
    with pytest.raises(LorsError, match="only a recipe of `lors learn` may be replaced"):
        CliRunner().invoke(app, [*line, "--force"], catch_exceptions=False)
    with pytest.raises(LorsError, match="parts: expected delta, apart, orthogonal, got 'deltas', did you mean 'delta'"):
        CliRunner().invoke(app, [*line, "--parts", "deltas"], catch_exceptions=False)
    with pytest.raises(LorsError, match="learning_rate: expected a positive number, got -1"):
        CliRunner().invoke(app, [*line, "--learning-rate", "-1"], catch_exceptions=False)


def test_what_no_recipe_could_hold_is_refused_before_the_work(
    experts: dict[str, str], tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning.strict_yaml, "MAX_VALUES", 6 * 63)
    with pytest.raises(LorsError, match="learn: expected at most 63 weights, which a recipe can hold, got 64"):
        learned(experts, tmp_path / "r.yml", recordings)
    assert not list(tmp_path.iterdir())
