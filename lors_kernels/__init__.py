"""Kernels for merging task vectors: low-rank plus sparse reduction of delta = tuned - base, and its sum over experts.

Tensors in, tensors out (torch or numpy). Nothing here knows about Whisper, files or merge methods. Importing loads no
compiled code and no torch; `python -m lors_kernels` says which backends run here.
"""

from __future__ import annotations

from .apply_update import apply_update
from .counter_random import keep_limit, random_key
from .dispatch import Availability, BackendUnavailable, available_backends
from .gram_apply import gram_apply
from .lors_delta import lors_delta
from .merge_update import merge_update
from .residual_threshold import residual_threshold
from .sparse_part import SparsePart, sparse_part
from .sparse_update import sparse_update
from .threads import thread_count
from .ties_update import ties_update
from .topk_mask import topk_mask
from .truncated_svd import truncated_svd
from .types import (
    ALWAYS,
    KEEP_ALL,
    KEEP_NONE,
    FactorOverflowError,
    Keep,
    KeepStats,
    NonFiniteError,
    Threshold,
    TruncatedSVD,
    UpdateStats,
)

__version__ = "0.1.0"  # of the distribution; pyproject.toml and lors.__version__ read it here

__all__ = [
    "ALWAYS",
    "KEEP_ALL",
    "KEEP_NONE",
    "Availability",
    "BackendUnavailable",
    "FactorOverflowError",
    "Keep",
    "KeepStats",
    "NonFiniteError",
    "SparsePart",
    "Threshold",
    "TruncatedSVD",
    "UpdateStats",
    "__version__",
    "apply_update",
    "available_backends",
    "gram_apply",
    "keep_limit",
    "lors_delta",
    "merge_update",
    "random_key",
    "residual_threshold",
    "sparse_part",
    "sparse_update",
    "thread_count",
    "ties_update",
    "topk_mask",
    "truncated_svd",
]
