"""Everything there is to know about the GPU backends, on a machine that has one and nothing of this project installed:

    python -m benchmarks.gpu --out DIRECTORY

Stages run one after the other, each a process of its own with a time limit, all of them in `--seconds`: what cannot be
reached in that time is named at the end, and `--stages` takes it up. DIRECTORY holds `rows.jsonl` (every measurement as it
was made), `log.txt` (all output) and `gpu.json` (both put together); running again over it goes on where it ended.
`--dry-run` goes through the same code on the CPU with tiny sizes; its numbers say nothing and its file says so.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from .errors import BenchmarkError
from .machine import describe_machine
from .stages import Recorder, Rows, choose, run_one, run_stages

# name -> seconds, in the order of what would be missed most. The functions are in gpu_stages.py.
STAGES: dict[str, float] = {
    "machine": 60, "build": 240, "smoke": 120, "bandwidth": 60, "eigenproblems": 60, "merges": 150, "operations": 180,
    "accuracy": 90, "profile": 90, "rivals": 150, "resident": 90, "files": 120, "tests": 400, "sanitizer": 400,
}  # fmt: skip
FIRST = ("machine", "build")  # in every run: the machine may be a new one


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    try:
        return stage(options) if options.stage else run(options)
    except (BenchmarkError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    main.add_argument("--out", type=Path, required=True, metavar="DIRECTORY")
    main.add_argument("--stages", default="", help=f"separated by commas, of {','.join(STAGES)}")
    main.add_argument("--seconds", type=float, default=570, help="for all of them (default 570)")
    main.add_argument("--again", action="store_true", help="try rows again on which a process hung or died")
    main.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, to try the harness")
    main.add_argument("--stage", help=argparse.SUPPRESS)  # inside a stage's process
    return main


def stage(options: argparse.Namespace) -> int:
    from . import gpu_stages

    bench = gpu_stages.Bench(options.dry_run)
    recorder = Recorder(Rows(options.out), options.stage, options.again)
    return run_one(lambda record: vars(gpu_stages)[options.stage](bench, record), recorder)


def run(options: argparse.Namespace) -> int:
    chosen = choose(options.stages, STAGES)
    chosen = [name for name in STAGES if name in chosen or name in FIRST]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stage under way ends with us
    options.out = options.out.resolve()
    flags = [flag for flag, on in (("--dry-run", options.dry_run), ("--again", options.again)) if on]
    child = [sys.executable, "-m", "benchmarks.gpu", "--out", str(options.out), *flags, "--stage"]
    begun = time.monotonic()
    try:
        run_stages(child, STAGES, chosen[:1], options.out, options.seconds)
        if Rows(options.out).outcomes()["machine"]["outcome"] != "done":
            said = (options.out / "log.txt").read_text().strip().splitlines()[-1]
            raise BenchmarkError(said.removeprefix("error: "))
        left = run_stages(child, STAGES, chosen[1:], options.out, options.seconds - (time.monotonic() - begun))
    finally:
        data = assemble(options.out, options.dry_run)
    print("\n".join(table(data)))
    if left:
        print(f"out of time; the rest: --stages {','.join(left)}")
    ended = data["outcomes"]
    return 0 if not left and all(ended[name]["outcome"] == "done" for name in chosen) else 1


def assemble(directory: Path, dry: bool) -> dict[str, Any]:
    """`gpu.json` from the rows that are there."""
    rows = Rows(directory)
    results = rows.results()
    device = results.get("machine", {}).get("device", {}).get("name", "unknown device")
    data = {
        "machine": describe_machine(), "device": device, "dry_run": dry,
        "outcomes": rows.outcomes(), "results": results,
    }  # fmt: skip
    (directory / "gpu.json").write_text(json.dumps(data, indent=1) + "\n")
    return data


def table(data: dict[str, Any]) -> list[str]:
    """The short table, last."""
    results, lines = data["results"], ["", data["device"]]
    copy = results.get("bandwidth", {}).get("copy", {}).get("GB/s")
    for name, rows in results.items():
        for key, row in rows.items():
            if "failed" in row:
                lines.append(f"{name}: {key}: FAILED: {row['failed'][:200]}")
                continue
            parts = []
            if "ms" in row:
                parts.append(f"{row['ms']['median']:10.3f} ms")
            if "GB/s" in row:
                parts.append(f"{row['GB/s']:8.0f} GB/s" + (f" {row['GB/s'] / copy:5.0%} of copy" if copy else ""))
            if "seconds" in row:
                parts.append(
                    f"{row['seconds']:8.3f} s" + (" (scaled)" if row.get("measured") != row.get("matrices") else "")
                )
            if "error" in row:
                parts.append(f"error of L {row['error']:.1e}")
            if parts:
                lines.append(f"{name + ': ' + key:72s} {' '.join(parts)}")
    lines += [f"{name}: {row['outcome']}" for name, row in data["outcomes"].items() if row["outcome"] != "done"]
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
