"""`python -m benchmarks PART`: measure, or render what was measured."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path

from . import chart, table
from .errors import BenchmarkError
from .generate import DELTAS, DTYPES, Spec, generate
from .machine import ROOT
from .results import Results
from .run_operation import OPERATIONS
from .run_operation import run as run_operation
from .shapes import SIZES

PARTS = (*OPERATIONS, "certificate", "compute", "merge", "integrations", "scaling", "experts", "speech")


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parts = main.add_subparsers(dest="part", required=True, metavar="PART")
    for name in (*PARTS, "all"):
        part = parts.add_parser(
            name.replace("_", "-"), aliases=[name] if "_" in name else [], help=HELP.get(name, "kernel operation")
        )
        part.set_defaults(part=name)
        part.add_argument(
            "--quick", action="store_true", help="smallest sizes, to try the harness; never in the tables"
        )
        part.add_argument("--label", default="", help="name of the result file (default: the date)")
        part.add_argument("--resume", action="store_true", help="keep the finished pieces of the result file")
        part.add_argument("--data", type=Path, default=ROOT / "bench-data", help="generated checkpoints, outputs")
        part.add_argument("--repeats", type=int, default=None, help="repeats of the fast commands (default 5; quick 1)")
        part.add_argument("--no-peers", action="store_true", help="merge: only our own commands and the floor")
        part.add_argument("--sample", type=int, help="compute: time this many matrices per shape for rivals, and scale")
    made = parts.add_parser("generate", help="write Whisper-shaped checkpoints")
    made.add_argument("--size", choices=SIZES, default="small")
    made.add_argument("--experts", type=int, default=5)
    made.add_argument("--dtype", choices=DTYPES, default="float32")
    made.add_argument("--deltas", choices=DELTAS, default="powerlaw")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("-o", "--out", type=Path, default=ROOT / "bench-data")
    parts.add_parser("counts", help="machine code and calls of the GPU backends, counted without a GPU")
    shown = parts.add_parser("table", help="print the tables")
    shown.add_argument("--check", action="store_true", help="fail if README.md or docs/measurements.md differs")
    shown.add_argument(
        "--write", action="store_true", help="put the tables into README.md and docs/measurements.md, draw the chart"
    )
    return main


HELP = {
    "certificate": "20,000 hard matrices per backend: does what truncated_svd claims hold?",
    "compute": "computing only: the released procedure, torch's faster forms, ours",
    "merge": "whole commands: lors, mergekit, as released, floor",
    "integrations": "mergekit's TIES with and without our selection, and ours",
    "scaling": "time and memory by experts, rank, density, size; a plot",
    "experts": "expert files: bytes, error and time of every option",
    "speech": "evaluation and fine-tuning, one thread; loading with worker processes",
    "all": "every part, each in a process of its own",
}


def run_part(options: argparse.Namespace) -> None:
    repeats = options.repeats or (1 if options.quick else 5)
    settings = {"repeats": repeats}
    if options.part == "compute":
        settings["sample"] = options.sample
    elif options.part == "merge":
        settings["peers"] = not options.no_peers
    results = Results(options.part, label=options.label, quick=options.quick, resume=options.resume, settings=settings)
    data = options.data.resolve()
    if options.part in OPERATIONS:
        run_operation(results, options.part)
    elif options.part == "certificate":
        from .bench_certificate import run as run_certificate

        run_certificate(results, *([500] if options.quick else []))
    elif options.part == "compute":
        from .bench_compute import run as run_compute

        run_compute(results, data, repeats, sample=options.sample)
    elif options.part == "merge":
        from .bench_merge import run as run_merge

        run_merge(results, data, repeats, peers=not options.no_peers)
    elif options.part == "experts":
        from .bench_experts import run as run_experts

        run_experts(results, data, repeats)
    elif options.part == "integrations":
        from .bench_integrations import run as run_integrations

        run_integrations(results, data, repeats)
    elif options.part == "speech":
        from .bench_speech import run as run_speech

        run_speech(results, repeats)
    else:
        from .bench_scaling import run as run_scaling

        run_scaling(results, data, repeats)
    print(f"results: {results.path.relative_to(ROOT)}", flush=True)


def run_all(arguments: list[str]) -> None:
    """Every part as a process: memory, threads and a crash of one do not reach the next."""
    failed = []
    for part in PARTS:
        print(f"== {part}", flush=True)
        if subprocess.run([sys.executable, "-m", "benchmarks", part, *arguments], cwd=ROOT).returncode:
            failed.append(part)
    if failed:
        raise BenchmarkError(f"parts that failed: {', '.join(failed)}")


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a measured command ends with us
    try:
        if options.part == "generate":
            spec = Spec(options.size, options.dtype, options.deltas, options.seed)
            for path in generate(options.out, spec, options.experts).directories:
                print(path)
        elif options.part == "counts":
            from . import counts

            counts.write()
        elif options.part == "table":
            if options.check:
                table.check()
                chart.check()
            elif options.write:
                table.update()
                chart.write()
            else:
                print(table.render())
        elif options.part == "all":
            run_all(arguments[1:])
        else:
            run_part(options)
    except (BenchmarkError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
