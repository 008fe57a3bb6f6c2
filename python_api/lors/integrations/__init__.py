"""Bridges to the tools people already merge with: mergekit, PEFT, FusionBench, transformers. Knows no speech.

Each module imports its tool when a function of it is called, not when it is imported itself.
"""
