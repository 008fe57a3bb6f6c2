"""Scoring one merged model in a process of its own, so that a scorer that hangs or crashes costs one trial only."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from .errors import LorsError

__all__ = ["Objective", "Score", "Scorer"]

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
# What a module:function scorer runs as; its own prints may come before the last line.
_CALL = (
    "import importlib, json, sys; sys.path.insert(0, ''); module, name = sys.argv[1].split(':'); "
    "print(); print(json.dumps(getattr(importlib.import_module(module), name)(sys.argv[2])))"
)
_TAIL = 1 << 16


@dataclass(frozen=True)
class Objective:
    """A number that a scorer reports and which way is better."""

    name: str
    maximize: bool = False

    @classmethod
    def parse(cls, text: str) -> Objective:
        """ "wer", "wer:min" or "bleu:max"."""
        name, _, direction = text.partition(":")
        if not name or direction not in ("", "min", "max"):
            raise LorsError(f"--objective: expected NAME, NAME:min or NAME:max, got {text!r}")
        return cls(name, direction == "max")


@dataclass(frozen=True)
class Score:
    """state: "complete", or why there are no values: "failed", "timeout", "nan"."""

    state: Literal["complete", "failed", "timeout", "nan"]
    values: tuple[float, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Scorer:
    """A command ("score.sh {model}", the path is put last without {model}) or "module:function".

    "speech DATA LANGUAGES [TASKS]" is the speech harness: wer and bleu on the dev split.

    The command's last line of output is the score: a number, or a JSON object with a number per objective. A function
    gets the path and returns the same.
    """

    command: str
    objectives: tuple[Objective, ...]
    timeout: float | None = None

    def __call__(self, model: Path) -> Score:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            try:
                process = subprocess.Popen(
                    self._arguments(model), stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
                )
            except OSError as error:
                return Score("failed", (), f"{self.command}: {error.strerror or error}")
            try:
                code = process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                return Score("timeout", (), f"no score after {self.timeout:g} s")
            finally:
                _end(process)
            if code:
                return Score("failed", (), f"exit code {code}: {_last_line(err) or _last_line(out) or 'no output'}")
            return self.read(_last_line(out))

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
        except ValueError:
            return Score("failed", (), f"expected a number or a JSON object in the last line, got {line[:80]!r}")
        if isinstance(data, (int, float)) and not isinstance(data, bool) and len(self.objectives) == 1:
            data = {self.objectives[0].name: data}
        if not isinstance(data, dict):
            return Score("failed", (), f"expected an object with {self._names()}, got {line[:80]!r}")
        values = []
        for objective in self.objectives:
            value = data.get(objective.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                return Score("failed", (), f"expected a number for {objective.name!r}, got {str(value)[:40]!r}")
            if not math.isfinite(value):
                return Score("nan", (), f"{objective.name} is {value}")
            values.append(float(value))
        return Score("complete", tuple(values))

    def _names(self) -> str:
        return ", ".join(objective.name for objective in self.objectives)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the scorer and what it started: it has a process group of its own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all of it has ended
    process.wait()


def _last_line(stream: IO[bytes]) -> str:
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - _TAIL))
    lines = stream.read().decode("utf-8", "replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
