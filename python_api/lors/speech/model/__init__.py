"""Whisper: loading it, its tokens, and the tiny ones that are trained here."""
