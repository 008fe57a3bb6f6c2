"""Coverage-guided fuzzing with atheris: python -m tests.support.fuzz.atheris_target expert [corpus] [libFuzzer options]

The first argument names a target of targets.Corpus. From the repository's root, with the package installed and
tests/support on PYTHONPATH.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["lors"]):
        from fuzz.targets import Corpus, survives
    corpus = Corpus(Path(tempfile.mkdtemp(prefix="lors-fuzz-")))
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in corpus.targets:
        sys.exit(f"expected one of {', '.join(corpus.targets)}, got {name!r}")
    seeds = Path(tempfile.mkdtemp(prefix="lors-fuzz-seeds-"))
    for index, (data, _) in enumerate(corpus.seeds[name]):
        (seeds / str(index)).write_bytes(data)
    atheris.Setup([*sys.argv, str(seeds)], lambda data: survives(corpus.targets[name], data) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
