"""Scoring one merged model in a process of its own, so that a scorer that hangs or crashes costs one trial only."""

from __future__ import annotations

import json
import math
import os
import re
import selectors
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from .. import keeper
from ..errors import LorsError, printable

__all__ = ["Interrupted", "Objective", "Score", "Scorer"]

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
# What a module:function scorer runs as; its own prints may come before the last line.
_CALL = (
    "import importlib, json, sys; sys.path.insert(0, ''); module, name = sys.argv[1].split(':'); "
    "print(); print(json.dumps(getattr(importlib.import_module(module), name)(sys.argv[2])))"
)
_TAIL = 1 << 16  # bytes that are kept of what a scorer prints, of each stream
_SHOWN = 300  # characters of an error
_TICK = 0.1  # seconds until it is noticed that the sweep was stopped
_GRACE = 2.0  # seconds for a scorer that has printed its score to end, when the sweep is stopped
# Scores of which everybody knows that more is better: to minimise one is a slip, unless it is said.
_HIGHER = ("accuracy", "bertscore", "bleu", "chrf", "chrf++", "comet", "f1", "meteor", "rouge")


@dataclass(frozen=True)
class Objective:
    """A number that a scorer reports and which way is better."""

    name: str
    maximize: bool = False

    @property
    def wanted(self) -> str:
        """Which of its values is the best, in a word."""
        return "highest" if self.maximize else "lowest"

    @classmethod
    def parse(cls, text: str) -> Objective:
        """ "wer", "wer:min" or "bleu:max": the least is the best where nothing is said."""
        name, _, direction = text.partition(":")
        if not name or direction not in ("", "min", "max"):
            raise LorsError(f"--objective: expected NAME, NAME:min or NAME:max, got {text!r}")
        if not direction and name.lower() in _HIGHER:
            raise LorsError(
                f"--objective: expected {name}:max (or {name}:min), for the least is taken otherwise, got {text!r}"
            )
        return cls(name, direction == "max")


@dataclass(frozen=True)
class Score:
    """state: "complete", or why there are no values: "failed", "timeout", "nan"."""

    state: Literal["complete", "failed", "timeout", "nan"]
    values: tuple[float, ...] = ()
    error: str = ""

    @classmethod
    def failed(cls, error: str) -> Score:
        """error: may be what another program printed."""
        return cls("failed", (), printable(error[:_SHOWN]))


class Interrupted(Exception):
    """The sweep was stopped before this was done."""


@dataclass(frozen=True)
class Scorer:
    """A command ("score.sh {model}", the path is put last without {model}) or "module:function".

    "speech DATA LANGUAGES [TASKS]" is the speech harness: wer and bleu on the dev split.

    The command's last line of output is the score: a number, or a JSON object with a number per objective. A function
    gets the path and returns the same. Whatever it started ends with it.
    """

    command: str
    objectives: tuple[Objective, ...]
    timeout: float | None = None

    def __post_init__(self) -> None:
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise LorsError(f"--score {self.command}: {error}") from None
        if not words or "\0" in self.command:
            raise LorsError(f"--score: expected a command or module:function, got {self.command!r}")
        if self.timeout is not None and not 0 < self.timeout < math.inf:
            raise LorsError(f"--timeout: expected seconds above 0, got {self.timeout}")

    def __call__(self, model: Path, stop: threading.Event | None = None) -> Score:
        """Interrupted when `stop` is set before the scorer has ended by itself, without an error."""
        stop = stop or threading.Event()
        try:
            with keeper.running(self._arguments(model), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
                out, err = _Tail(process.stdout), _Tail(process.stderr)
                in_time = _follow(process, (out, err), stop, self.timeout)
                if stop.is_set() and self.read(out.last_line()).state == "complete":
                    _follow(process, (out, err), threading.Event(), _GRACE)
                keeper.end(process)
                _follow(process, (out, err), threading.Event(), keeper.PATIENCE)  # what is left in the pipes
        except LorsError as error:
            return Score.failed(str(error))
        if (code := process.returncode) != 0:
            if stop.is_set():
                raise Interrupted
            if not in_time:
                return Score("timeout", (), f"no score after {self.timeout:g} s")
            return Score.failed(f"exit code {code}: {err.last_line() or out.last_line() or 'no output'}")
        return self.read(out.last_line())

    def data(self) -> Path | None:
        """The manifest that the built-in scorer reads, if it is a file of this machine."""
        words = shlex.split(self.command)
        if _FUNCTION.fullmatch(self.command) or len(words) < 2 or words[0] != "speech":
            return None
        place = Path(words[1])
        manifest = place / "manifest.tsv" if place.is_dir() else place
        return manifest if manifest.is_file() else None

    def _arguments(self, model: Path) -> list[str]:
        if _FUNCTION.fullmatch(self.command):
            return [sys.executable, "-c", _CALL, self.command, str(model)]
        words = shlex.split(self.command)
        if words[:1] == ["speech"]:  # the built-in scorer
            return [sys.executable, "-m", "lors.speech.dev_score", *words[1:], str(model)]
        if any("{model}" in word for word in words):
            return [word.replace("{model}", str(model)) for word in words]
        return [*words, str(model)]

    def read(self, line: str) -> Score:
        """The score in a line of output."""
        try:
            data = json.loads(line)
        except (ValueError, RecursionError):
            return Score.failed(f"expected a number or a JSON object in the last line, got {line[:80]!r}")
        if not isinstance(data, (dict, list, str)) and len(self.objectives) == 1:
            data = {self.objectives[0].name: data}
        if not isinstance(data, dict):
            return Score.failed(f"expected an object with {self._names()}, got {line[:80]!r}")
        values = []
        for objective in self.objectives:
            value = _float(data.get(objective.name))
            if value is None:
                return Score.failed(f"expected a number for {objective.name!r}, got {line[:80]!r}")
            if not math.isfinite(value):
                return Score("nan", (), f"{objective.name} is {value}")
            values.append(value)
        return Score("complete", tuple(values))

    def _names(self) -> str:
        return ", ".join(objective.name for objective in self.objectives)


def _float(value: Any) -> float | None:
    """A number of JSON; None when it is none, or an integer beyond float64."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


class _Tail:
    """The end of what a stream has brought."""

    def __init__(self, stream: IO[bytes] | None) -> None:
        assert stream is not None
        self.stream, self._kept, self._cut = stream, b"", False

    def take(self, data: bytes) -> None:
        whole = self._kept + data
        self._kept, self._cut = whole[-_TAIL:], self._cut or len(whole) > _TAIL

    def last_line(self) -> str:
        """The last that is not empty; "[...]" stands for the beginning of one that is too long."""
        lines = self._kept.decode("utf-8", "replace").split("\n")
        lines[0] = f"[...]{lines[0]}" if self._cut else lines[0]
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _follow(
    process: subprocess.Popen[bytes], tails: Sequence[_Tail], stop: threading.Event, seconds: float | None
) -> bool:
    """Takes in what a process prints until it has ended; False when it is to be stopped or the time is up before."""
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        for tail in tails:
            selector.register(tail.stream, selectors.EVENT_READ, tail)
        while selector.get_map():
            if stop.is_set() or time.monotonic() > deadline:
                return False
            ready = selector.select(_TICK)
            for key, _ in ready:
                if data := os.read(key.fd, _TAIL):
                    key.data.take(data)
                else:
                    selector.unregister(key.fileobj)
            if not ready and process.poll() is not None:  # another user's process holds the pipe
                break
    return True
