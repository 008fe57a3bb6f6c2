"""Jobs that tests run in processes of their own, to kill them or to set them against each other."""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any


def context() -> ForkServerContext:
    """A server that has everything imported: a job begins within a millisecond, so that a kill can hit any moment."""
    found = get_context("forkserver")
    found.set_forkserver_preload(
        [
            "hostile_jobs",
            "lors.merging.on_disk",
            "lors.merging.ledger",
            "lors.experts.decompose",
            "lors.sweep.run",
            "lors.cli.app",
            "lors.cli.experts",
            "lors.cli.merge",
            "lors.cli.sweep",
            "lors.experts.expert_source",
        ]
    )
    return found


def start(job: str, *arguments: Any) -> BaseProcess:
    """Starts one of the functions below."""
    process = context().Process(target=_run, args=(job, *arguments))
    process.start()
    return process


def _run(job: str, *arguments: Any) -> None:
    """Exit code 0, 2 for a LorsError, whose message goes to the file LORS_JOB_LOG names."""
    from lors.errors import LorsError

    try:
        globals()[job](*arguments)
    except LorsError as error:
        if log := os.environ.get("LORS_JOB_LOG"):
            with open(log, "a", encoding="utf-8") as stream:
                stream.write(f"{error}\n")
        sys.exit(2)


def command(*arguments: str) -> None:
    """The command line, as a shell in the foreground starts it."""
    from lors.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv[:] = ["lors", *arguments]
    main()


def merge(base: str, experts: dict[str, str], out: str, force: bool) -> None:
    import lors

    lors.merge(base, experts, out, force=force, threads=2)


def nothing() -> None: ...


def edit(out: str, expert: str, remove: bool) -> None:
    from lors.merging.edit import edit as run

    run(out, expert, remove=remove, threads=2)


def decompose(base: str, expert: str, out: str) -> None:
    from lors.experts.decompose import decompose as run

    run(base, expert, out, force=True, threads=2)


def sweep(recipe: str, out: str) -> None:
    import zlib
    from pathlib import Path

    from lors.methods import SPECS
    from lors.recipes.recipe import Recipe
    from lors.sweep.run import sweep as run
    from lors.sweep.score import Score

    def bits(model: Path) -> Score:
        return Score("complete", (float(zlib.crc32((model / "model.safetensors").read_bytes())),))

    run(Recipe.load(recipe, SPECS), {"rank": "1,2", "lambda": "0.2,0.4,0.8"}, bits, out, threads=2)
