"""One colour and shape per method, told apart by everybody, in both schemes."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from lors.methods import METHODS
from lors.pages.colours import DARK, HUES, LIGHT, Style, of_methods, of_names

# Machado, Oliveira, Fernandes (2009), severity 1: linear RGB -> linear RGB as it is seen
SEEN_BY = {
    "everybody": np.eye(3),
    "protanopes": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deuteranopes": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "tritanopes": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
}  # fmt: skip
# Distance in OKLab, where about 0.02 is just told apart side by side.
FAR_ENOUGH = 0.09


def linear(colour: str) -> np.ndarray:
    srgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Ottosson's space, from linear RGB."""
    cones = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                      [0.0883024619, 0.2817188376, 0.6299787005]])  # fmt: skip
    lab = np.array([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                    [0.0259040371, 0.7827717662, -0.8086757660]])  # fmt: skip
    return lab @ np.cbrt(cones @ np.clip(rgb, 0, 1))


def contrast(one: str, other: str) -> float:
    light, dark = sorted((float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
@pytest.mark.parametrize("eyes", SEEN_BY)
def test_hues_are_told_apart(scheme: dict[str, str], eyes: str) -> None:
    seen = {f"c{hue}": oklab(SEEN_BY[eyes] @ linear(scheme[f"c{hue}"])) for hue in range(HUES + 1)}
    near = {pair: float(np.linalg.norm(seen[pair[0]] - seen[pair[1]])) for pair in combinations(seen, 2)}
    assert min(near.values()) >= FAR_ENOUGH, sorted(near.items(), key=lambda item: item[1])[:4]


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_contrast_of_marks_and_text(scheme: dict[str, str]) -> None:
    for ground in ("paper", "panel"):
        assert all(contrast(scheme[f"c{hue}"], scheme[ground]) >= 3 for hue in range(HUES + 1))
        assert all(contrast(scheme[name], scheme[ground]) >= 4.5 for name in ("ink", "soft", "accent"))
    assert LIGHT.keys() == DARK.keys()


def test_every_method_is_drawn_like_no_other() -> None:
    everything = of_methods({name: name for name in (*METHODS, "base", "own expert", "multi_task", "sequential")})
    drawn = [(style.shape, style.fill) for style in everything.values()]
    assert len(set(drawn)) == len(drawn) == len(METHODS) + 4
    assert all(style.hue < HUES for name, style in everything.items() if name in METHODS), "a family has each of them"


def test_a_method_is_drawn_alike_whatever_is_beside_it() -> None:
    alone = of_methods({"tsv": "tsv"})
    beside = of_methods({"lors_depth": "lors", "lors": "lors", "mine": "mine", "tsv": "tsv", "average": "linear"})
    assert alone["tsv"] == beside["tsv"] and list(beside) == ["lors_depth", "lors", "mine", "tsv", "average"]
    assert beside["lors"] == of_methods({"lors": "lors"})["lors"] and beside["lors_depth"].hue == beside["lors"].hue
    assert beside["average"] == of_methods({"linear": "linear"})["linear"]
    assert len(set(beside.values())) == 5 and of_methods({"lors_new": "lors_new"})["lors_new"].hue == beside["lors"].hue


def test_names_take_turns() -> None:
    names = [f"e{i}" for i in range(14)]
    styles = of_names(names)
    assert styles["e0"] == Style(0, 0) and styles["e6"] == Style(0, 1) and len(set(styles.values())) == 14
