"""Merging: a recipe becomes a job, a job a model, with its card, its ledger, edits and a check. Knows no command."""
