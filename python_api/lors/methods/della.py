"""DELLA: drop at random, small entries more often than large ones of their row, then TIES (arXiv 2406.11617)."""

from __future__ import annotations

from .della_linear import ranked

METHOD = ranked("della", elect=True, normalize=True)
