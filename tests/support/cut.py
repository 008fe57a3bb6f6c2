"""The experiment that the tests run; importable by processes they start."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from lors.speech.demo import RECORDINGS
from lors.speech.experiment.config import Config, Data, Grid


def cut_config() -> Config:
    """`quick` on the shipped recordings, cut to fit a test run: two experts, three languages."""
    return Config(
        name="cut",
        base="tiny",
        data=Data(source=str(RECORDINGS), dev=8, test=25),
        experts=("ca", "es"),
        languages=("ca", "es", "pt"),
        training={"max_steps": 60, "learning_rate": 4e-4, "warmup_steps": 5, "save_steps": 30},
        rest="average",
        rest_lambda=(0.7, 1.1),
        grids={
            "task_arithmetic": Grid(method="task_arithmetic", parameters={"lam": [0.3, 0.6]}),
            "lors": Grid(method="lors", parameters={"rank": [4], "density": [0.3], "lam": [0.5, 0.9]}),
        },
    )


def dies(out: Path, inputs: Mapping[str, Path]) -> None:
    """A stage that is killed, as for its memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(out: Path, inputs: Mapping[str, Path], *, up: str) -> None:
    """A stage that never ends by itself and leaves a process behind, in a session of its own; makes a file `up`."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 1000"], start_new_session=True)
    Path(up).touch()
    while True:
        time.sleep(1)


def counts(out: Path, inputs: Mapping[str, Path], *, number: int) -> None:
    """A stage of a few steps: its number and the results of its needs, added up."""
    for step in range(5):
        (out / f"step-{step}").touch()
        time.sleep(0.002)
    total = number + sum(int((path / "total").read_text()) for path in inputs.values())
    (out / "total").write_text(str(total))


def on_gpu(out: Path, inputs: Mapping[str, Path], *, together: str) -> None:
    """A stage that says which GPU it sees, and for a while that it is there."""
    seen = os.environ["CUDA_VISIBLE_DEVICES"]
    here = Path(together) / seen
    here.touch(exist_ok=False)  # another process on this GPU now would be an error
    time.sleep(0.2)
    (out / "seen").write_text(f"{seen} {len(os.listdir(together))}")
    here.unlink()
