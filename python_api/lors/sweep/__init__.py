"""Sweeps: many settings of one merge, each merged, and scored by a process of its own."""
