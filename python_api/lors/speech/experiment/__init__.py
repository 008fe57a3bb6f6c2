"""The merging experiment: its stages, what they found, the report."""
