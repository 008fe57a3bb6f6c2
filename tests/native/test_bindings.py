"""The compiled module's own checks: one of everything per expert. All else is checked in Python before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from helpers import require_backend
from lors_kernels.backends import cpu
from lors_kernels.types import ALWAYS, KEEP_ALL, KEEP_NONE

X = np.ones((3, 4), np.float32)
MATRIX = cpu._matrix(X)
NONE = (0, *MATRIX[1:])
ONE: dict[str, Any] = {"factors": (0, 0, 0), "thresholds": tuple(KEEP_ALL), "weights": 1.0}
ONE["keeps"] = (tuple(KEEP_ALL), tuple(KEEP_NONE), 0, ALWAYS, 1.0)


def merge(**change: Any) -> Any:
    one = {"tuned": [MATRIX]} | {name: [ONE[name]] for name in ("factors", "thresholds", "weights")} | change
    return cpu.library().merge_update(cpu._matrix(np.zeros_like(X)), NONE, *one.values(), 1)


def ties(**change: Any) -> Any:
    one = {"tuned": [MATRIX]} | {name: [ONE[name]] for name in ("keeps", "weights")} | change
    return cpu.library().ties_update(cpu._matrix(np.zeros_like(X)), NONE, *one.values(), (True, True, 1.0, 1.0), 0, 1)


@pytest.mark.parametrize("call", [merge, ties])
def test_one_of_everything_per_expert(call: Any) -> None:
    require_backend("cpu")
    assert len(call()) == 1
    names = ("factors", "thresholds", "weights") if call is merge else ("keeps", "weights")
    for name in names:
        for count in (0, 2):
            with pytest.raises(ValueError, match=f"{name}: expected one per expert, got {count} for 1"):
                call(**{name: [ONE[name]] * count})
    with pytest.raises(ValueError, match=f"{names[0]}: expected one per expert, got 1 for 0"):
        call(tuned=[])
