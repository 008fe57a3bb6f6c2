"""Adding experts to a merged model and taking them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lors
import tiny
from experts import EXPERTS, distance, files, refusal, state
from lors.experts.decompose import decompose
from lors.merging.edit import edit
from lors.merging.ledger import Ledger


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny.family(tmp_path_factory.mktemp("family"), EXPERTS)


def test_adding_the_last_expert_gives_what_merging_all_gives(family: dict[str, Path], tmp_path: Path) -> None:
    made = files(family, tmp_path)
    lors.merge(family["base"], made, tmp_path / "all")
    lors.merge(family["base"], {name: made[name] for name in ("ca", "de")}, tmp_path / "grown")
    (tmp_path / "grown" / "tokenizer.json").write_text("kept")
    report = edit(tmp_path / "grown", made["es"])
    grown, whole = state(tmp_path / "grown"), state(tmp_path / "all")
    for name, want in whole.items():
        # both are rounded once at the end; the one that was grown, once before
        assert (np.abs(grown[name].astype(np.float64) - want) <= 1.0001 * np.spacing(np.abs(want)) + 1e-10).all(), name
    assert report.experts == list(EXPERTS) and report.notices[0] == "added es"
    ledger = Ledger.load(tmp_path / "grown")
    assert [expert.name for expert in ledger.experts] == list(EXPERTS) and ledger.edits == 1
    assert (tmp_path / "grown" / "tokenizer.json").read_text() == "kept"
    card = (tmp_path / "grown" / "README.md").read_text()
    assert "3 fine-tuned experts" in card
    recipe = lors.Recipe.load(tmp_path / "grown" / "lors_recipe.yml")
    assert recipe.labels == EXPERTS


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_removing_is_within_the_documented_bound(tmp_path: Path, dtype: str) -> None:
    family = tiny.family(tmp_path / "in", EXPERTS, dtype)
    made = files(family, tmp_path)
    lors.merge(family["base"], made, tmp_path / "shrunk", weight={"de": 0.7})
    lors.merge(family["base"], {name: made[name] for name in ("ca", "es")}, tmp_path / "want")
    edit(tmp_path / "shrunk", made["de"], remove=True)
    got, want = state(tmp_path / "shrunk"), state(tmp_path / "want")
    ulp = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    for name in want:
        w, g = want[name].astype(np.float64), got[name].astype(np.float64)
        # merge, remove and the merge without it each round to dtype (half a unit of a value at most a little above |w|),
        # and the updates to float32
        bound = ulp * (np.abs(w) + 1e-3) + 6 * 2.0**-24 * (np.abs(w) + 1e-3)
        assert (np.abs(g - w) <= bound).all(), name
    assert [expert.name for expert in Ledger.load(tmp_path / "shrunk").experts] == ["ca", "es"]


def test_removing_what_was_merged_as_a_checkpoint(family: dict[str, Path], tmp_path: Path) -> None:
    made = files(family, tmp_path)
    lors.merge(family["base"], {name: family[name] for name in EXPERTS}, tmp_path / "out")
    edit(tmp_path / "out", made["ca"], remove=True)
    lors.merge(family["base"], {name: family[name] for name in ("de", "es")}, tmp_path / "want")
    assert distance(state(tmp_path / "out"), state(tmp_path / "want"), state(family["base"])) < 1e-3


def test_edits_refuse(family: dict[str, Path], tmp_path: Path) -> None:
    made = files(family, tmp_path)
    out = tmp_path / "out"
    lors.merge(family["base"], {"ca": made["ca"]}, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "merged already" in refusal(edit, out, made["ca"])
    assert "not part of this model" in refusal(edit, out, made["de"], remove=True)
    assert "the only expert" in refusal(edit, out, made["ca"], remove=True)
    assert "got a checkpoint" in refusal(edit, out, family["ca"])
    assert "no lors_ledger.json" in refusal(edit, tiny.write(tmp_path / "foreign", tiny.tensors(0, 0.5)), made["de"])
    thin = decompose(family["base"], family["de"], tmp_path / "thin", rank=2, name="de").path
    assert "rank: expected at most 2" in refusal(edit, out, thin)
    odd = tiny.tensors(0, 0.5)
    odd["model.encoder.conv1.weight"] = odd["model.encoder.conv1.weight"] * 2
    foreign = decompose(
        tiny.write(tmp_path / "odd", odd), family["de"], tmp_path / "foreign.lors.safetensors", name="de"
    ).path
    assert "another base" in refusal(edit, out, foreign)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "lors_ledger.json").write_text("{")
    assert "not JSON" in refusal(edit, out, made["de"])


def test_an_average_cannot_be_edited(family: dict[str, Path], tmp_path: Path) -> None:
    made = files(family, tmp_path)
    lors.merge(family["base"], {"ca": made["ca"]}, tmp_path / "out", rest="average")
    assert "depends on the others" in refusal(edit, tmp_path / "out", made["de"])


@pytest.mark.parametrize("boost", [{"boost": {"ca": 0.5}}, {"boost_merged": 0.5}])
def test_a_boosted_model_cannot_be_edited(boost: dict[str, Any], family: dict[str, Path], tmp_path: Path) -> None:
    made = files(family, tmp_path)
    lors.merge(family["base"], {"ca": made["ca"]}, tmp_path / "out", **boost)
    assert "boost: what it adds cannot be taken apart" in refusal(edit, tmp_path / "out", made["de"])


@pytest.mark.parametrize("method", ["wudi", "tsv"])
def test_methods_whose_experts_depend_on_each_other_cannot_be_edited(
    method: str, family: dict[str, Path], tmp_path: Path
) -> None:
    made = files(family, tmp_path)
    lors.merge(family["base"], {"ca": made["ca"], "es": made["es"]}, tmp_path / "out", method)
    assert f"method {method}: one expert's share depends on the others" in refusal(edit, tmp_path / "out", made["de"])


def test_edits_keep_the_lambda_of_the_rest(family: dict[str, Path], tmp_path: Path) -> None:
    made = files(family, tmp_path, values="float32", remainder="float32")
    settings = {"rest_lambda": 0.05, "lam": 0.7}
    lors.merge(family["base"], {"ca": made["ca"]}, tmp_path / "out", **settings)
    edit(tmp_path / "out", made["de"], durable=False)
    experts = {name: state(family[name]) for name in ("ca", "de")}
    want = lors.merge_state_dicts(state(family["base"]), experts, **settings)
    for name, value in state(tmp_path / "out").items():
        assert np.abs(value - want[name]).max() <= 2.0**-23 * np.abs(want[name]).max(), name
