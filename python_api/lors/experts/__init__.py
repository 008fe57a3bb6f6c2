"""Experts: what a model adds to its base, whatever it is stored in: checkpoint, adapter, expert file. Knows no method."""
