"""The `lors` command. Knows everything below and computes nothing."""

from __future__ import annotations

from .app import main

__all__ = ["main"]
