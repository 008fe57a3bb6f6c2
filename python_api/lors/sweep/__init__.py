"""Sweeps: many settings of one merge, each merged and scored."""
