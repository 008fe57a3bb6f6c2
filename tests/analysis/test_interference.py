"""The interference report: numbers with known answers, words that follow from them, a page without layout faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import browser
import tiny
from lors.analysis.interference import interference
from lors.analysis.interference_page import findings, render
from lors.errors import LorsError
from lors.experts.decompose import decompose

NAME = "model.encoder.layers.0.fc1.weight"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ca and de are unrelated, twin is ca doubled, anti is ca's negative."""
    root = tmp_path_factory.mktemp("family")
    found = tiny.family(root, ("ca", "de"))
    base, delta = tiny.tensors(0, 0.5), tiny.tensors(1, 1e-4)
    for name, factor in (("twin", 2.0), ("anti", -1.0)):
        found[name] = tiny.write(
            root / name, {key: value + np.float32(factor) * delta[key] for key, value in base.items()}
        )
    return found


def measured(family: dict[str, Path], *experts: str, **options: Any) -> Any:
    return interference(family["base"], {name: family[name] for name in experts}, **options)


def test_related_experts(family: dict[str, Path]) -> None:
    report = measured(family, "ca", "twin", "anti", "de")
    cosine, left, conflict = report.cosine(), report.mean("left"), report.mean("conflict")
    assert cosine["ca, twin"] == pytest.approx(1, abs=1e-3) and cosine["ca, anti"] == pytest.approx(-1, abs=1e-3)
    assert abs(cosine["ca, de"]) < 0.1
    assert left["ca, twin"] == pytest.approx(1, abs=1e-2) and report.mean("right")["twin, anti"] == pytest.approx(
        1, abs=1e-2
    )
    assert conflict["ca, twin"] < 0.02 and conflict["ca, anti"] > 0.98 and 0.3 < conflict["ca, de"] < 0.7
    support = report.mean("support")
    assert support["ca, twin"] > 0.9 and support["ca, de"] < 0.2
    norms = report.norms()
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-3)
    text = " ".join(findings(report))
    assert (
        "twin moved 2.0 times" in text
        and "ca and twin have most in common" in text
        and "pull against each other" in text
    )


def test_numbers_of_one_matrix(family: dict[str, Path]) -> None:
    report = measured(family, "ca", rank=3, density=0.1, match=NAME)
    (row,) = report.matrices
    base, delta = tiny.tensors(0, 0.5)[NAME], tiny.tensors(1, 1e-4)[NAME]
    delta = (base + delta) - base
    sigma = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
    energy = float((sigma**2).sum())
    assert row.norm[0] == pytest.approx(energy**0.5, rel=1e-5) and row.sigma[0][:3] == pytest.approx(
        sigma[:3], rel=1e-4
    )
    assert row.low[0] == pytest.approx(float((sigma[:3] ** 2).sum()) / energy, rel=1e-4)
    assert row.effective_rank[0] == pytest.approx(energy**2 / float((sigma**4).sum()), rel=1e-4)
    u, s, v = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    rest = np.sort(np.abs(delta - (u[:, :3] * s[:3]) @ v[:3]).ravel())[::-1][: int(0.1 * delta.size)]
    assert row.sparse[0] == pytest.approx(float((rest**2).sum()) / energy, rel=1e-3)


def test_an_expert_file_stands_for_its_parts(family: dict[str, Path], tmp_path: Path) -> None:
    path = decompose(family["base"], family["ca"], tmp_path / "ca.lors.safetensors", density=1.0).path
    report = interference(family["base"], {"file": path, "ca": family["ca"]})
    assert report.cosine()["file, ca"] == pytest.approx(1, abs=1e-4)


def test_refusals(family: dict[str, Path]) -> None:
    for options, message in (
        ({"rank": 0}, "rank: expected"),
        ({"rank": 33}, "rank: expected at most"),
        ({"density": 2}, r"density: expected a number in \[0, 1\]"),
        ({"match": "("}, "not a regular expression"),
        ({"match": "nowhere"}, "no decomposed matrix has a name like"),
    ):
        with pytest.raises(LorsError, match=message):
            measured(family, "ca", **options)
    with pytest.raises(LorsError, match="at least one expert"):
        interference(family["base"], {})


def test_the_data_beside_the_page(family: dict[str, Path]) -> None:
    report = measured(family, "ca", "de")
    data = json.loads(json.dumps(report.to_dict()))
    assert len(data["matrices"]) == 32 and data["matrices"][0]["cosine"].keys() == {"ca, de"}
    assert "&lt;b&gt;" in render(interference(family["base"], {"<b>": family["ca"]})), "names are escaped"


# One fault of each kind that the probe looks for.
BROKEN = """<!DOCTYPE html><html><body style="background:#fff;color:#000"><p style="width:2000px">wide</p>
<p style="color:#999">pale</p><p style="margin-top:-30px">over</p><a href="#gone">link</a>
<div class="scroll" aria-label="box" style="overflow:auto"></div><svg viewBox="0 0 100 50" width="300" style="background:#fff">
<text x="0" y="20">one</text><text x="5" y="20">two</text><text x="95" y="40">cut off</text>
<text x="0" y="45" style="font-size:2px">small</text></svg></body></html>"""


def test_the_probe_sees_faults(tmp_path: Path) -> None:
    browser.chromium()
    faults = " ".join(browser.inspect({"broken": BROKEN}, tmp_path, dark=False, widths=(360,))["broken 360"]["faults"])
    for fault in (
        "wide in a window",
        "cut label",
        "labels overlap",
        "too small",
        "boxes overlap",
        "contrast",
        "no key",
        "nowhere",
    ):
        assert fault in faults, (fault, faults)
