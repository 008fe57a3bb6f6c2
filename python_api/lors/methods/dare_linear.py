"""DARE: drop entries at random and rescale the rest, then task arithmetic (arXiv 2311.03099)."""

from __future__ import annotations

from .sparsified import at_random, sparsified

METHOD = sparsified("dare_linear", at_random, elect=False, normalize=False, rescale=True)
