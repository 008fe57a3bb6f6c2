"""Shared by tests, benchmarks and `lors validate`: the cases, and the numbers they are judged by. Needs torch."""
