"""Scores: word errors, BLEU, intervals, and the decoding that they judge."""
