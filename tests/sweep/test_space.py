"""Settings of a sweep."""

from __future__ import annotations

import pytest

from lors.errors import LorsError
from lors.methods import METHODS
from lors.sweep.models import axes
from lors.sweep.space import Axis, Space


def test_axes() -> None:
    rank, density = METHODS["lors"].spec.parameter("rank"), METHODS["lors"].spec.parameter("density")
    assert rank and density
    assert Axis.parse(rank, "1,2,4,2").values == (1, 2, 4)
    assert Axis.parse(density, "0.05:0.5:0.05").values == tuple(round(0.05 * i, 10) for i in range(1, 11))
    assert Axis.parse(density, "0.1:0.9").interval == (0.1, 0.9)
    for spec, text in (
        (rank, "0"),
        (rank, "x"),
        (rank, "'010':1:1"),
        (density, "0.1:2:0.1"),
        (density, "0.5:0.1"),
        (density, "0:1:0"),
        (density, "0:1:1e-9"),
    ):
        with pytest.raises(LorsError, match=f"^{spec.name}: {text}: "):
            Axis.parse(spec, text)


def test_a_grid_changes_lambda_fastest_and_leaves_out_what_a_method_has_not() -> None:
    options = {"lambda": "0.1,0.2", "rank": "1,2", "density": "0.5"}
    grid = list(Space.of("svp", axes("svp"), options).grid())
    assert grid == [{"rank": r, "lambda": x} for r in (1, 2) for x in (0.1, 0.2)]
    assert {"rest", "rest_lambda"} <= axes("ties").keys() and not {"rest", "rest_lambda"} & axes("linear").keys()
    drawn = Space.of("lors", axes("lors"), options | {"lambda": "0.1:0.2"}).random(3)
    again = Space.of("lors", axes("lors"), options | {"lambda": "0.1:0.2"}).random(3)
    first = [next(drawn) for _ in range(20)]
    assert first == [next(again) for _ in range(20)] and len({x["lambda"] for x in first}) == 20
