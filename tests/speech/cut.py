"""The experiment that the tests run; importable by processes they start."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path

from lors.speech.config import Config, Data, Grid
from lors.speech.demo import RECORDINGS


def cut_config() -> Config:
    """`quick` on the shipped recordings, cut to fit a test run: two experts, three languages."""
    return Config(
        name="cut",
        base="tiny",
        data=Data(source=str(RECORDINGS), dev=8, test=25),
        experts=("ca", "es"),
        languages=("ca", "es", "pt"),
        training={"max_steps": 60, "learning_rate": 4e-4, "warmup_steps": 5, "save_steps": 30},
        grids={
            "task_arithmetic": Grid(method="task_arithmetic", parameters={"lam": [0.3, 0.6]}),
            "lors": Grid(method="lors", parameters={"rank": [4], "density": [0.3], "lam": [0.5, 0.9]}),
        },
    )


def dies(out: Path, inputs: Mapping[str, Path]) -> None:
    """A stage that is killed, as for its memory."""
    os.kill(os.getpid(), signal.SIGKILL)
