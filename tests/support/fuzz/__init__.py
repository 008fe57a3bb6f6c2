"""Mutated inputs: refused in one line or read correctly, never a traceback, a hang, or more memory than they are worth."""
