"""The README's chart: drawn from a result, for light and dark, and refused when it shows other numbers."""

from __future__ import annotations

import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import chart
from benchmarks.errors import BenchmarkError
from benchmarks.results import RESULTS
from helpers import module


def test_the_committed_chart_shows_the_committed_results() -> None:
    chart.check()


def test_a_chart_has_every_bar_and_tells_other_numbers(tmp_path: Path) -> None:
    module("matplotlib", "plot")
    for result in RESULTS.glob("merge-*.json"):
        shutil.copy(result, tmp_path)
    with pytest.raises(BenchmarkError, match=r"merge-light\.svg: expected 'LoRS: low rank"):
        chart.check(tmp_path)
    chart.write(tmp_path)
    chart.check(tmp_path)
    texts = {}
    for scheme in chart.SCHEMES:
        drawn = ElementTree.parse(chart.path(scheme, tmp_path)).getroot()
        texts[scheme] = [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
        assert set(chart.labels(chart.rows(tmp_path))) < set(texts[scheme])
    assert texts["light"] == texts["dark"]
    first = chart.path("dark", tmp_path)
    before = first.read_bytes()
    chart.write(tmp_path)
    assert first.read_bytes() == before, "the same bytes every time"
    seconds = next(label for label in chart.labels(chart.rows(tmp_path)) if label.endswith(" s"))
    first.write_text(first.read_text().replace(f">{seconds}<", ">0.1 s<"))
    with pytest.raises(BenchmarkError, match=f"merge-dark.svg: expected '{seconds}'"):
        chart.check(tmp_path)


def test_a_result_without_the_case_is_told(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="expected a result of `merge` with 'small float32, 5 experts', got none"):
        chart.rows(tmp_path)
