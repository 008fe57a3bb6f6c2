"""Merge methods: one short file each, registered here. CONTRIBUTING.md has the recipe for adding one."""

from __future__ import annotations

from . import linear, lors, magnitude_prune, svp, task_arithmetic
from .base import Method, Reduction

METHODS: dict[str, Method] = {
    module.METHOD.spec.name: module.METHOD for module in (linear, task_arithmetic, magnitude_prune, svp, lors)
}
SPECS = {name: method.spec for name, method in METHODS.items()}

__all__ = ["METHODS", "SPECS", "Method", "Reduction"]
