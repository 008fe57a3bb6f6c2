"""TIES: trim each task vector to its largest entries, elect a sign per entry, average what agrees (arXiv 2306.01708)."""

from __future__ import annotations

from .sparsified import largest, sparsified

METHOD = sparsified("ties", largest, elect=True, normalize=True, rescale=False)
