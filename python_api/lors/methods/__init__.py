"""Merge methods: one short file each, and what they see of their operands. Knows no engine.

Registered here; CONTRIBUTING.md has the recipe for adding one.
"""

from __future__ import annotations

from . import (
    breadcrumbs,
    breadcrumbs_ties,
    dare_linear,
    dare_ties,
    della,
    della_linear,
    iso_c,
    iso_cts,
    linear,
    lors,
    lors_parts,
    magnitude_prune,
    model_stock,
    regmean,
    slerp,
    svp,
    task_arithmetic,
    ties,
    tsv,
    wudi,
)
from .base import Method, Reduction, rest_of

_MODULES = (
    *(linear, task_arithmetic, magnitude_prune, svp, lors, ties, dare_linear, dare_ties, della, della_linear),
    *(breadcrumbs, breadcrumbs_ties, model_stock, slerp, tsv, iso_c, iso_cts, wudi, regmean, lors_parts),
)
METHODS: dict[str, Method] = {module.METHOD.spec.name: module.METHOD.complete() for module in _MODULES}
SPECS = {name: method.spec for name, method in METHODS.items()}

__all__ = ["METHODS", "SPECS", "Method", "Reduction", "rest_of"]
