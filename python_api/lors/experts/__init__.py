"""Experts: what a model adds to its base, from whatever it is stored in. Knows no method."""
