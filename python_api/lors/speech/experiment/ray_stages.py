"""The stages of `lors experiment` as tasks of a Ray cluster.

A stage is a task of one core (and one GPU where the configuration's device is cuda), in a worker process of its own,
with the memory that its models take. It reads and writes the experiment's directory, which every node must see under the
same path. A lost worker's stage is started again by Ray, up to RETRIES times, and continues from its own checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cluster import RETRIES, TICK_SECONDS, connected, environment, failure_of, require_fitting
from ...errors import LorsError

if TYPE_CHECKING:
    from .config import Config
    from .stages import Stage

__all__ = ["memory_of", "run_stages"]

LIBRARIES = 1_000_000_000  # torch, transformers and the data of one stage
TRAINING = 5  # float32 copies of the weights: weights, gradients, two moments, activations of a batch of its size


def run_stages(
    address: str, config: Config, stages: Sequence[Stage], root: Path, jobs: int, report: Callable[[str], None]
) -> None:
    """Runs what is not done yet; the first failure lets the others finish and is raised.

    jobs: cores of the cluster that "local" starts; on any other Ray decides how many stages run at a time.
    """
    weights = _weights(config)
    gpus = 1 if config.device.startswith("cuda") else 0
    waiting = [stage for stage in stages if not stage.done(root)]
    done = len(stages) - len(waiting)
    if done:
        report(f"{done} of {len(stages)} stages were already done")
    (root / "logs").mkdir(exist_ok=True)
    with connected(address, jobs) as ray:
        require_fitting(ray, 1, gpus, max((memory_of(stage, weights) for stage in waiting), default=0))
        # max_calls=1: a process per stage, so that stages share no state and their memory goes with them.
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES, max_calls=1, runtime_env=environment())(_work)
        running: dict[Any, tuple[Stage, float]] = {}
        failure: str | None = None
        while waiting or running:
            for stage in [stage for stage in waiting if all(need.done(root) for need in stage.needs)]:
                if failure is None:
                    waiting.remove(stage)
                    reference = task.options(memory=memory_of(stage, weights)).remote(stage, str(root))
                    running[reference] = (stage, time.monotonic())
            if not running:
                break
            finished = _one_of(ray, list(running))
            stage, began = running.pop(finished)
            if (said := failure_of(ray, finished)) is None:
                done += 1
                report(f"[{done}/{len(stages)}] {stage.name}: {time.monotonic() - began:.0f} s")
            elif failure is None:
                failure = f"stage {stage.name}: {said}; run the same command again to continue"
    if failure is not None:
        raise LorsError(failure)


def _one_of(ray: Any, running: Sequence[Any]) -> Any:
    """The first that has ended. A signal during `ray.wait` would become Ray's SystemExit(1), so it is not waited for there."""
    while not (ended := ray.wait(running, timeout=0)[0]):
        time.sleep(TICK_SECONDS)
    return ended[0]


def memory_of(stage: Stage, weights: int) -> int:
    """Bytes to reserve for a stage, of a model of `weights` bytes in float32."""
    if "training" in stage.parameters:
        return LIBRARIES + TRAINING * weights
    merges = sum(need.name.startswith("expert-") for need in stage.needs) if "method" in stage.parameters else 0
    return LIBRARIES + (2 + merges) * weights  # base and merged model, and every expert


def _weights(config: Config) -> int:
    from ...checkpoints.reader import open_checkpoint
    from ..model.whisper import resolve_model

    with open_checkpoint(resolve_model(config.base)) as base:
        return 4 * sum(info.numel for info in base.tensors.values())


def _work(stage: Stage, root: str) -> None:
    """One stage; runs on a worker."""
    import torch

    home = Path(root)
    if not (home / "logs").is_dir():
        raise LorsError(f"--ray: {home}: not there on node {os.uname().nodename}; every node must see it")
    torch.set_num_threads(1)
    with _logged(home / "logs" / f"{stage.name}.log"):
        if not stage.done(home):  # a worker may have been lost after its last step
            stage.run(home)


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """What is printed, also by libraries, goes to the stage's log as it does on one machine."""
    kept = [os.dup(1), os.dup(2)]
    with path.open("a", encoding="utf-8") as log:
        try:
            _point([log.fileno()] * 2)
            yield
        finally:
            _point(kept)
            for copy in kept:
                os.close(copy)


def _point(files: Sequence[int]) -> None:
    for stream, target, source in zip((sys.stdout, sys.stderr), (1, 2), files, strict=True):
        stream.flush()
        os.dup2(source, target)
