"""Which colour, shape and dash a method has, on every page and in every plot, and the two schemes.

Colour and shape are those of a method's family, fill and dash its own, so that nothing hangs on the colour alone. Hues are told apart
by people who confuse red and green, or blue and yellow, in the light and the dark scheme (`tests/pages/test_colours.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["DARK", "LIGHT", "Style", "of_methods", "of_names"]

# name -> colour; c0 ... c5 are hues of families, c6 is that of what is no merge
LIGHT = {
    "ink": "#16191f", "soft": "#4d5562", "paper": "#ffffff", "panel": "#f3f5f8", "rule": "#c9d0da", "accent": "#1d5fc4",
    "c0": "#2b47c6", "c1": "#962904", "c2": "#02855f", "c3": "#7f1b8d", "c4": "#9b8c19", "c5": "#0297bc", "c6": "#525053",
}  # fmt: skip
DARK = {
    "ink": "#e9ecf1", "soft": "#aeb6c3", "paper": "#14171c", "panel": "#1d2128", "rule": "#3b4350", "accent": "#7db0ff",
    "c0": "#6a83f7", "c1": "#e95803", "c2": "#8efd7c", "c3": "#c6719d", "c4": "#e7aa0f", "c5": "#37c0eb", "c6": "#e2d9de",
}  # fmt: skip
HUES = 6  # of those that are shared out in turn

SHAPES = "os^DvPX"  # of a hue
FILLS = ("full", "none", "left", "top")  # of its members, as their dashes
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))

_FAMILIES = (  # the hue of each is its place
    ("lors", "svp", "magnitude_prune"),
    ("task_arithmetic", "linear", "slerp", "model_stock"),
    ("ties", "dare_ties", "della", "breadcrumbs_ties"),
    ("tsv", "iso_c", "iso_cts"),
    ("breadcrumbs", "dare_linear", "della_linear"),
    ("regmean", "wudi"),
    ("base", "own expert", "multi_task", "sequential"),
)


@dataclass(frozen=True)
class Style:
    """How something is drawn: colour and shape of a hue, fill and dash of its members; the fifth of them starts over."""

    hue: int
    mark: int = 0

    @property
    def colour(self) -> str:
        return LIGHT[f"c{self.hue}"]

    @property
    def shape(self) -> str:
        return SHAPES[self.hue]

    @property
    def fill(self) -> str:
        return FILLS[self.mark % len(FILLS)]

    @property
    def dash(self) -> str | tuple[int, tuple[float, ...]]:
        return DASHES[self.mark % len(DASHES)]


METHODS = {
    name: Style(hue, mark) for hue, family in enumerate(_FAMILIES) for mark, name in enumerate(family)
}  # always the same


def of_methods(labels: Mapping[str, str]) -> dict[str, Style]:
    """Label -> style, from label -> method: that of the method, but a second label of one, and a variant that begins with the
    name of one (`lors_scaled`), has its hue and a mark of its own."""
    found: dict[str, Style] = {}
    for label, method in sorted(labels.items(), key=lambda item: item[0] != item[1]):
        style = METHODS.get(method)
        if style is None or style in found.values():
            hue = next((METHODS[known].hue for known in _prefixes(method) if known in METHODS), 6)
            free = (Style(hue, mark) for mark in itertools.count(sum(known.hue == hue for known in METHODS.values())))
            style = next(each for each in free if each not in found.values())
        found[label] = style
    return {label: found[label] for label in labels}


def _prefixes(method: str) -> Iterable[str]:
    parts = method.split("_")
    return ("_".join(parts[:count]) for count in range(len(parts), 0, -1))


def of_names(names: Iterable[str]) -> dict[str, Style]:
    """Styles for what is no method: experts, measures; in turn."""
    return {name: Style(index % HUES, index // HUES) for index, name in enumerate(dict.fromkeys(names))}
