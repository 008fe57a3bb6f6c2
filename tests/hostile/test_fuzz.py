"""Mutants of every input format. LORS_FUZZ=N runs N per format (CI: 10000), LORS_FUZZ_SEED starts elsewhere."""

from __future__ import annotations

import os
import resource
import time
import tracemalloc
from pathlib import Path

import pytest

from fuzz.targets import Corpus, survives
from helpers import module

COUNT, SEED = int(os.environ.get("LORS_FUZZ", "150")), int(os.environ.get("LORS_FUZZ_SEED", "0"))
SLOWEST = 5.0  # seconds of processor time for one mutant
SPARE = 32 << 20  # bytes that reading anything may take, besides twice the file
RESIDENT = 200 << 20  # bytes by which all mutants of a format together may raise the peak of the process
FORMATS = (
    "checkpoint",
    "expert",
    "sealed",
    "torch",
    "nemo",
    "tokenizer",
    "tokens",
    "generation",
    "recipe",
    "ledger",
    "trials",
    "index",
    "adapter",
    "config",
    "card",
    "manifest",
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", FORMATS)
def test_mutants(corpus: Corpus, name: str) -> None:
    if name == "manifest":
        module("soundfile", "speech")
    target = corpus.targets[name]
    for data, _ in corpus.seeds[name]:
        if name not in ("manifest", "index"):
            assert survives(target, data), "the seed itself is good"
    refused, resident = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Tracing makes deep recursion 30 times as slow, and lengths that lie are a matter of the binary formats.
    if name in ("checkpoint", "expert", "torch", "nemo"):
        tracemalloc.start()
    try:
        for number in range(SEED, SEED + COUNT):
            data, header = corpus.seeds[name][number % len(corpus.seeds[name])]
            mutant = corpus.mutators[name](data, number, header)
            tracemalloc.reset_peak()
            before, begun = tracemalloc.get_traced_memory()[0], time.process_time()
            try:
                refused += not survives(target, mutant)
            except BaseException as error:
                kept = Path(os.environ.get("LORS_FUZZ_KEEP", str(corpus.root))) / f"{name}-{number}"
                kept.write_bytes(mutant)
                raise AssertionError(f"{name} mutant {number} ({kept}): {type(error).__name__}: {error}") from error
            peak = tracemalloc.get_traced_memory()[1] - before
            assert time.process_time() - begun < SLOWEST, f"{name} mutant {number} took too long"
            assert peak < 2 * len(mutant) + SPARE, f"{name} mutant {number}: {peak} bytes for a file of {len(mutant)}"
    finally:
        tracemalloc.stop()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) * 1024
    assert grown < RESIDENT, f"{name}: {grown} bytes more resident memory"
    print(f"{name}: {refused} of {COUNT} refused")
    assert refused > COUNT // 10 or name == "card", "most mutants are damaged; a card never ends a merge"
