"""Exporting: a Whisper in the formats of the programs that run it. Knows no recipe, and of merging only the files beside a model."""
