"""Checkpoints: which tensor lies where, reading and writing it, what kind it is. Knows no recipe and no merge."""
