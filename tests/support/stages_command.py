"""`lors` with a command more: `stages`, which runs stages of `cut` as `lors experiment` runs its own.

python stages_command.py stages OUT hangs UP|counts N [--ray local]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lors.cli.app import application
from lors.command import run

lors = application(())


def say(line: str) -> None:
    print(line, flush=True)


@lors.command()
def stages(out: Path, kind: str, argument: str, ray: Annotated[str | None, typer.Option()] = None) -> None:
    say("begun")
    from cut import counts, cut_config, hangs
    from lors.speech.experiment import ray_stages
    from lors.speech.experiment.stages import Stage, exclusive, run_stages

    chosen: list[Stage] = []
    if kind == "hangs":
        chosen = [Stage("x", hangs, {"up": argument})]
    for number in range(int(argument) if kind == "counts" else 0):
        needs = chosen[(number - 1) // 2 : (number + 1) // 2]
        chosen.append(Stage(f"count-{number}", counts, {"number": number}, tuple(needs)))
    with exclusive(out):
        if ray is None:
            run_stages(chosen, out, 2, say)
        else:
            ray_stages.run_stages(ray, cut_config(), chosen, out.absolute(), 2, say)


if __name__ == "__main__":
    run(lors)
