"""The one error of the harness."""

from __future__ import annotations


class BenchmarkError(Exception):
    """What went wrong, in one line: what, where, expected, got."""
