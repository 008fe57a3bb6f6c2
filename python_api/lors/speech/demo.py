"""The demonstration: ``python -m lors.speech.demo [DIR]`` runs the experiment `quick` and prints its tables.

Speech comes from espeak-ng; on a machine without it, from a small set of recordings that it made and that come with
the package.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from ..errors import LorsError, print_lines
from .experiment.config import Config, Data, load_config

__all__ = ["RECORDINGS", "demo", "demo_config"]

RECORDINGS = Path(__file__).parent / "recordings"


def demo_config() -> Config:
    """`quick`, on fresh speech if espeak-ng is there and on the shipped recordings if it is not."""
    config = load_config("quick")
    if shutil.which("espeak-ng") is not None:
        return config
    print("espeak-ng is not installed: using the recordings that come with the package (fewer utterances)")
    return config.model_copy(update={"data": Data(source=str(RECORDINGS), dev=config.data.dev)})


def demo(out: Path) -> Path:
    """Runs the experiment in `out` and prints what came out; returns the report."""
    from .commands import require_extra
    from .experiment.plan import run_experiment
    from .experiment.report import print_tables

    require_extra()
    began = time.monotonic()
    report = run_experiment(demo_config(), out, report=print_lines)
    print_tables(out)
    print_lines(f"{time.monotonic() - began:.0f} s -> {report}")
    return report


def main() -> None:
    try:
        demo(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out"))
    except LorsError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
