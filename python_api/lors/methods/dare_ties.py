"""DARE with the sign election of TIES (arXiv 2311.03099)."""

from __future__ import annotations

from .sparsified import at_random, sparsified

METHOD = sparsified("dare_ties", at_random, elect=True, normalize=False, rescale=True)
