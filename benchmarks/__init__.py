"""Speed and memory of LoRS-Merging against what people use today: `python -m benchmarks --help`."""
