"""The `lors` command: options in, lines out. Computes nothing."""

from __future__ import annotations

from .app import main

__all__ = ["main"]
