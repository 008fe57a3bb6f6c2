"""Numbers among the arguments, checked as the arrays are: the argument, what was expected, what came."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from .types import Threshold

LARGEST = (2 - 2**-23) * 2.0**127  # of float32
FAR = 2**62  # no index of an entry reaches it


def check_whole(x: Any, name: str, low: int, high: int, of: str = "") -> int:
    """A whole number from `low` to `high`; `of` says what the range belongs to."""
    if type(x) is not int and (isinstance(x, bool) or not isinstance(x, Integral)):
        raise TypeError(f"{name}: expected an integer, got {type(x).__name__} {x!r}")
    if not low <= int(x) <= high:
        raise ValueError(f"{name}: expected {low} to {high}{of}, got {x}")
    return int(x)


def check_number(x: Any, name: str) -> float:
    """A finite number that float32 can hold."""
    if type(x) is not float and (isinstance(x, bool) or not isinstance(x, Real)):
        raise TypeError(f"{name}: expected a number, got {type(x).__name__} {x!r}")
    if not abs(float(x)) <= LARGEST:
        raise ValueError(f"{name}: expected a finite float32 number, got {x}")
    return float(x)


def check_threshold(x: Any, name: str) -> Threshold:
    """Its value a magnitude of float32 or infinity, its cut an index."""
    if not isinstance(x, Threshold):
        raise TypeError(f"{name}: expected a Threshold, got {type(x).__name__}")
    if not 0 <= x.value <= LARGEST and x.value != math.inf:
        raise ValueError(f"{name}.value: expected a magnitude of float32, got {x.value}")
    check_whole(x.cut, f"{name}.cut", 0, 2**63 - 1)
    return x
