"""Stages: pieces of work with named inputs, each done once, each in a process of its own.

A stage's key is a hash of its kind, its parameters and the keys of the stages it needs, so a changed parameter redoes
exactly what depends on it. A finished stage is a directory ``stages/<name>-<key>``; an unfinished one ends in
``.partial`` and is continued. Killing any process at any time costs at most the work since its last own checkpoint. No
process of a run outlives it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ... import keeper
from ...errors import LorsError, SettingError, nearest
from ...files.lock import flock
from ...files.writing import writing
from ...public import public_text

__all__ = ["Stage", "exclusive", "run_stage", "run_stages"]

_PRELOAD = [
    "torch",
    "transformers.models.whisper.modeling_whisper",
    "transformers.trainer_seq2seq",
    "lors.merging.on_disk",
    "lors.speech.training.trainer",
    "lors.speech.scoring.evaluation",
]


@dataclass(frozen=True)
class Stage:
    """`work(directory, inputs, **parameters)` fills its directory; `inputs` are the directories of `needs`, by name.

    `identity` says what else the result depends on: digests of the files that parameters name. `version` is that of the
    work's code: raise it when the code changes what it writes.
    """

    name: str
    work: Callable[..., None]
    parameters: Mapping[str, Any]
    needs: tuple[Stage, ...] = field(default=())
    identity: str = ""
    version: int = 1

    @cached_property  # or else it takes twice as long with every stage below that two others need
    def key(self) -> str:
        # With "_": functions of an earlier module had it, and a name that changes is no reason to do the work again.
        what = [
            self.version,
            f"_{self.work.__name__}",
            self.parameters,
            self.identity,
            [stage.key for stage in self.needs],
        ]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]

    def directory(self, root: Path) -> Path:
        return root / "stages" / f"{self.name}-{self.key}"

    def done(self, root: Path) -> bool:
        return self.directory(root).is_dir()

    def run(self, root: Path) -> None:
        """Does the work here and now; its needs must be done."""
        final = self.directory(root)
        partial = final.with_name(f"{final.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        began = time.time()
        self.work(partial, {stage.name: stage.directory(root) for stage in self.needs}, **self.parameters)
        record = {"name": self.name, "seconds": round(time.time() - began, 1), "parameters": dict(self.parameters)}
        (partial / "stage.json").write_text(public_text(json.dumps(record, indent=1)) + "\n", "utf-8")
        partial.rename(final)


@contextmanager
def exclusive(root: Path, *, shared: bool = False) -> Iterator[None]:
    """One run at a time in a directory, or any number of `shared` ones; the lock dies with the process."""
    with _locked(root / ".lock", "another experiment is running here", shared):
        yield


@contextmanager
def _locked(path: Path, said: str, shared: bool = False) -> Iterator[None]:
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("w")
    with stream:
        try:
            flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB, path.parent)
        except BlockingIOError:
            raise LorsError(f"{path.parent}: {said}") from None
        yield


def run_stage(stages: Sequence[Stage], name: str, root: Path, report: Callable[[str], None]) -> None:
    """Runs one stage alone, in this process, unless it is done."""
    by_name = {stage.name: stage for stage in stages}
    if name not in by_name:
        raise SettingError("stage", f"no {name!r}{nearest(name, by_name)}")
    stage = by_name[name]
    missing = [need.name for need in stage.needs if not need.done(root)]
    if missing:
        raise LorsError(f"stage {name}: needs {', '.join(missing)} first")
    if stage.done(root):
        report(f"stage {name} was already done: {stage.directory(root)}")
        return
    began = time.monotonic()
    with _locked(root / f".{name}.lock", f"stage {name} is running here already"), writing(root):
        stage.run(root)
    report(f"{name}: {time.monotonic() - began:.0f} s -> {stage.directory(root)}")


def run_stages(
    stages: Sequence[Stage], root: Path, jobs: int, report: Callable[[str], None], gpus: Sequence[str] = ()
) -> None:
    """Runs what is not done yet, `jobs` processes at a time. The first failure lets the others finish and is raised.

    gpus: with any (names for CUDA_VISIBLE_DEVICES, at least `jobs`) every process sees one that no other one has.

    The processes are another one's, which a keeper ends with us: an orphan would write into the directory that the next run
    continues.
    """
    ours, theirs = multiprocessing.Pipe()
    command = keeper.python(f"{__name__}:_serve", str(theirs.fileno()))
    with ours, keeper.running(command, pass_fds=[theirs.fileno()]):
        theirs.close()
        try:
            places: list[str | None] = [*gpus[:jobs]] or [None] * jobs
            ours.send((stages, root, places))
            while isinstance(said := ours.recv(), str):
                report(said)
        except (EOFError, OSError):
            raise LorsError(
                "the process that runs the stages has ended; run the same command again to continue"
            ) from None
    if said is not None:
        raise said


def _serve(fd: str) -> None:
    """Runs stages for another process: its pipe brings them, and takes lines, at the end None or the LorsError."""
    from multiprocessing.connection import Connection

    with Connection(int(fd)) as link:
        stages, root, places = link.recv()
        try:
            _run_here(stages, root, places, link.send)
        except LorsError as error:
            link.send(error)
        else:
            link.send(None)


def _run_here(stages: Sequence[Stage], root: Path, places: list[str | None], report: Callable[[str], None]) -> None:
    """places: for each process at a time its GPU, or None."""
    # A fork server imports torch and transformers once; stages start in milliseconds and share no state.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    waiting = [stage for stage in stages if not stage.done(root)]
    done = len(stages) - len(waiting)
    if done:
        report(f"{done} of {len(stages)} stages were already done")
    running: dict[Any, tuple[Stage, Any, float, str | None]] = {}
    failure: str | None = None
    while waiting or running:
        while failure is None and places and (stage := _ready(waiting, root)) is not None:
            waiting.remove(stage)
            gpu = places.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(stage, root, sender, gpu), daemon=True)
            process.start()
            sender.close()
            running[process.sentinel] = (stage, (process, receiver), time.monotonic(), gpu)
        if not running:
            break
        for sentinel in wait(list(running)):
            stage, (process, receiver), began, gpu = running.pop(sentinel)
            process.join()
            places.append(gpu)
            if process.exitcode == 0:
                done += 1
                report(f"[{done}/{len(stages)}] {stage.name}: {time.monotonic() - began:.0f} s")
            elif failure is None:
                said = _last_words(receiver, process.exitcode)
                failure = f"stage {stage.name}: {said}; run the same command again to continue"
    if failure is not None:
        raise LorsError(failure)


def _last_words(receiver: Any, exit_code: int) -> str:
    """What a failed stage sent; one that was killed, by a user or for its memory, sent nothing."""
    try:
        return str(receiver.recv())
    except EOFError:
        if exit_code >= 0:
            return f"ended with exit code {exit_code}"
        return f"killed by {signal.Signals(-exit_code).name}" + (
            ", as systems do that are out of memory" if -exit_code == signal.SIGKILL else ""
        )


def _ready(waiting: Sequence[Stage], root: Path) -> Stage | None:
    return next((stage for stage in waiting if all(need.done(root) for need in stage.needs)), None)


def _child(stage: Stage, root: Path, sender: Any, gpu: str | None) -> None:
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read when CUDA starts, which importing torch does not do
    import torch

    from ..model.whisper import quiet

    torch.set_num_threads(1)
    quiet()
    (root / "logs").mkdir(exist_ok=True)
    with (root / "logs" / f"{stage.name}.log").open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            stage.run(root)
        except LorsError as error:
            sender.send(str(error))
            sys.exit(2)
        except BaseException as error:
            traceback.print_exc()
            sender.send(f"{type(error).__name__}: {error} (see {log.name})")
            sys.exit(1)
