"""The Triton backend as `dispatch` sees it: on NVIDIA (AMD should work), or on CPU tensors under TRITON_INTERPRET=1.

A module of its own, because the package's submodules carry the names of the operations.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from ...group import GroupKeepStats, GroupStats, GroupThreshold, MatrixGroup
from ...types import Consensus, Keep
from ..single import Single

NAME = "triton"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
NUMPY = False


def probe() -> tuple[bool, str]:
    if find_spec("triton") is None:
        return False, "triton not installed (pip install triton)"
    import triton

    if INTERPRETED:
        return True, f"triton {triton.__version__}, interpreted on the CPU (TRITON_INTERPRET=1): for tests"
    import torch

    if not torch.cuda.is_available():
        return False, f"triton {triton.__version__} installed, no device"
    if torch.version.cuda and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return False, f"needs compute capability 8.0, got {major}.{minor}"
    return True, f"triton {triton.__version__} on {torch.cuda.get_device_name()}"


class Grouped:
    """The kernels, imported when first used: importing Triton takes a second."""

    name = NAME
    width = 16  # one tensor core tile: eight vectors would cost the same

    def gram_apply(self, group: MatrixGroup, x: Any, *, side: str, product: bool = False) -> tuple[Any, Any]:
        from .gram_apply import gram_apply

        return gram_apply(group, x, side=side, product=product)

    def first_pass(self, group: MatrixGroup, x: Any, *, side: str) -> tuple[Any, Any, Any, Any]:
        return self.gram_apply(group, x, side=side)[0], *self.measure(group)

    def measure(self, group: MatrixGroup) -> tuple[Any, Any, Any]:
        from .merge_update import measure

        return measure(group)

    def residual_threshold(self, group: MatrixGroup, left: Any, right: Any, k: int) -> GroupThreshold:
        from .residual_threshold import residual_threshold

        return residual_threshold(group, left, right, k)

    def merge_update(
        self, group: MatrixGroup, out: Any, left: Any, right: Any, threshold: GroupThreshold, weight: list[float]
    ) -> GroupStats:
        from .merge_update import merge_update

        return merge_update(group, out, left, right, threshold, weight)

    def ties_update(
        self, group: MatrixGroup, out: Any, keep: list[Keep], weight: list[float], rule: Consensus
    ) -> GroupKeepStats:
        from .ties_update import ties_update

        return ties_update(group, out, keep, weight, rule)


GROUPED = Grouped()
_single = Single(GROUPED)
gram_apply = _single.gram_apply
residual_threshold = _single.residual_threshold
merge_update = _single.merge_update
ties_update = _single.ties_update
truncated_svd = _single.truncated_svd
