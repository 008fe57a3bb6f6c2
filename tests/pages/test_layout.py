"""Every page in a browser, on a phone and on a desk, light and dark; and how large pages get."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import browser
import tiny
from helpers import module
from lors.analysis import interference_page
from lors.analysis.interference import interference
from lors.speech.experiment import page as experiment_page
from lors.sweep import page as sweep_page
from lors.sweep.score import Objective
from lors.sweep.trials import Sweep, Trial

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "experiment" / "quick" / "results.json"


def sweep(count: int = 6) -> Sweep:
    trials = [
        Trial("lors" if i % 2 else "svp", i, {"rank": 2 ** (i % 6), "lambda": 0.1 * (i % 9)}, "complete", (10.0 - i % 7, i * 0.3), "", 1.0, 2.0)
        for i in range(count)
    ]  # fmt: skip
    trials.append(Trial("ties", 0, {"density": 0.3, "lambda": 0.5}, "failed", (), "exit code 1: " + "x" * 100))
    return Sweep("s", (Objective("wer"), Objective("bleu", True)), trials)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    module("matplotlib", "plot")
    paths = tiny.family(
        tmp_path_factory.mktemp("family"), ("ca", "de", "a much longer name than others have, in the legend")
    )
    report = interference(paths.pop("base"), paths)
    return {
        "report": interference_page.render(report),
        "sweep": sweep_page.render(sweep()),
        "experiment": experiment_page.page(json.loads(RESULTS.read_text("utf-8"))),
    }


@pytest.mark.parametrize("dark", [False, True])
def test_layout(pages: dict[str, str], tmp_path: Path, dark: bool) -> None:
    """No overlap, no cut label, contrast of 4.5, every scrolled box reachable by keys."""
    browser.chromium()
    widths = (360, 390, 1280, 1440)
    found = browser.inspect(pages, tmp_path, dark=dark, widths=widths)
    assert found.keys() == {f"{name} {width}" for name in pages for width in widths}
    for name, seen in found.items():
        assert seen["faults"] == [], (name, seen["faults"])
        assert seen["texts"] > 20 and seen["contrast"] >= 4.5 and seen["dark"] is dark
    for name in pages:
        image = module("PIL.Image", "plot").open(tmp_path / f"{name}.png").convert("L")
        (low, high), corner = image.getextrema(), image.getpixel((1, 1))
        assert (corner < 60) is dark and high - low > 150, "the paper is dark or light, and something is on it"


def test_every_page_is_made_alike(pages: dict[str, str]) -> None:
    for name, text in pages.items():
        for outside in ("http:", "https:", "<script", "<link", "@import", "url(", " src="):
            assert outside not in text, (name, outside)
        assert re.search(r"<main>\s*<section id=\"findings\"", text), "the conclusion comes first"
        figures = re.findall(r"<figure>.*?</figure>", text, re.DOTALL)
        assert figures and all('<svg role="img" aria-label="' in each for each in figures)
        assert all("<table>" in each or '<a href="#' in each for each in figures), "numbers beside each"
        identifiers = re.findall(r' id="([^"]+)"', text)
        assert set(re.findall(r'href="#([^"]+)"', text)) <= set(identifiers)
        assert len(text) < 300_000, name


def test_a_method_has_one_colour_on_all_pages(pages: dict[str, str]) -> None:
    """Of the legends: the colour and the shape of the mark before the name."""
    found = {}
    for name in ("sweep", "experiment"):
        for svg in re.findall(r"<svg.*?</svg>", pages[name], re.DOTALL):
            for style in re.findall(r'<g style="([^"]*)"><use [^>]*/></g></g><g><text[^>]*>svp<', svg):
                found.setdefault(name, set()).add(re.search(r"var\(--c\d\)", style)[0])  # type: ignore[index]
    assert found == {"sweep": {"var(--c0)"}, "experiment": {"var(--c0)"}}


def test_a_page_of_a_thousand_trials_stays_below_a_megabyte() -> None:
    module("matplotlib", "plot")
    assert len(sweep_page.render(sweep(1000)).encode()) < 1_000_000


def test_what_a_sweep_found_is_said_first() -> None:
    said = sweep_page.findings(sweep(24))
    assert said[0] == "Best wer: 4, by svp with rank 1, lambda 0.6."
    assert said[1] == "Other methods at their best: lors 4."
    assert "edge of what was tried" in said[2] and "rank 1" in said[2] and "lambda" not in said[2].partition(": ")[2]
    assert "trade-offs that no other beats" in said[3] and said[4].startswith(
        "1 of 25 trials have no score; the last: ties 0, failed"
    )
