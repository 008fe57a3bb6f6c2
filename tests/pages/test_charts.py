"""Drawings for pages: text that is text, colours of the scheme, no reference out of them, numbers beside them."""

from __future__ import annotations

import re
import warnings
import xml.etree.ElementTree as ElementTree

import pytest

from helpers import module
from lors.errors import LorsWarning
from lors.pages import charts, colours, html

SERIES = {"lors": [(1.0, 20.5), (2.0, 21.25), (4.0, 19.75)], "t$x^2$ <b>&": [(1.0, 30.0), (4.0, float("nan"))]}
STYLES = colours.of_names(SERIES)
BARS = {
    "tsv": charts.Bar(18.5, "18.50 ± 0.30", STYLES["lors"], 18.2, 18.8),
    "base": charts.Bar(28.8, "28.80", STYLES["lors"]),
}


@pytest.fixture(autouse=True)
def _library() -> None:
    module("matplotlib", "plot")


def drawings() -> dict[str, charts.Drawing]:
    return {
        "lines": charts.lines(SERIES, STYLES, "rank", "WER, %"),
        "log": charts.lines(SERIES, STYLES, "rank", "WER, %", log=True),
        "scatter": charts.scatter(SERIES, STYLES, "rank", "WER, %", ringed="t$x^2$ <b>&"),
        "bars": charts.bars(BARS, "WER, %"),
        "marks": charts.bars(BARS, "difference", zero=False),
    }


def texts(svg: str) -> list[str]:
    return [each.text or "" for each in ElementTree.fromstring(svg).iter("text")]


@pytest.mark.parametrize("name", drawings())
def test_a_drawing_is_part_of_the_page(name: str) -> None:
    svg = drawings()[name].svg
    root = ElementTree.fromstring(svg)
    assert root.attrib.keys() == {"viewBox"} and not {"metadata", "style", "script", "image"} & {
        e.tag for e in root.iter()
    }
    assert "http" not in svg and "font-family" not in svg
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) == set(), "every colour is the scheme's"
    names = re.findall(r' id="([^"]+)"', svg)
    assert len(names) == len(set(names)) and set(names) == set(re.findall(r'(?:"|\()#([\w-]+)', svg))
    assert any("WER, %" in text or "difference" in text for text in texts(svg))


def test_axes_have_round_ticks() -> None:
    shown = texts(drawings()["lines"].svg)
    numbers = [float(text) for text in shown if re.fullmatch(r"-?[\d.]+", text)]
    assert len(numbers) >= 6 and {1.0, 2.0, 0.0, 30.0} & set(numbers) == {1.0, 2.0, 0.0, 30.0}
    assert {"1", "2"} <= set(texts(drawings()["log"].svg))


def test_names_are_text_and_nothing_else() -> None:
    assert "t$x^2$ <b>&" in texts(drawings()["lines"].svg), "neither mathematics nor markup"
    assert "\\x1b[2J" in texts(
        charts.lines({"\x1b[2J": [(1, 2)], "b": [(1, 2)]}, colours.of_names(["\x1b[2J", "b"]), "x", "y").svg
    )
    long = "x" * 80
    (cut,) = [text for text in texts(charts.bars({long: BARS["tsv"]}, "x").svg) if text.startswith("xxx")]
    assert len(cut) == 34 and cut.endswith("…")


def test_the_same_drawing_twice_is_the_same_text() -> None:
    assert {name: each.svg for name, each in drawings().items()} == {
        name: each.svg for name, each in drawings().items()
    }


def test_nothing_to_draw() -> None:
    for empty in (
        charts.lines({}, {}, "x", "y"),
        charts.scatter({"a": [(1.0, float("inf"))]}, STYLES, "x", "y"),
        charts.bars({}, "x"),
    ):
        assert empty == charts.Drawing("", "No values.")


def test_a_figure_has_a_label_and_its_numbers() -> None:
    drawn = drawings()["lines"]
    table = html.table("Numbers", ("rank", "lors"), [("1", "20.5")])
    shown = html.figure("WER <over> rank", drawn, table)
    assert 'role="img" aria-label="WER &lt;over&gt; rank. Horizontal: rank. Vertical: WER, %."' in shown
    assert "<details><summary>Numbers</summary>" in shown and "<td>20.5</td>" in shown
    assert '<a href="#trials">Numbers</a>' in html.figure("x", drawn, "#trials")


def test_without_the_library_the_numbers_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "absent", lambda: True)
    with pytest.warns(
        LorsWarning, match=r"no drawings: matplotlib is not installed: pip install 'lors-merging\[plot\]'"
    ):
        drawn = charts.bars(BARS, "x")
    with warnings.catch_warnings(record=True):
        shown = html.figure("WER", drawn, html.table("Numbers", ("m", "w"), [("tsv", "18.5")]))
    assert (
        "<svg" not in shown and "<details>" not in shown and "<td>18.5</td>" in shown and "lors-merging[plot]" in shown
    )
