"""Processes that write, for tests to kill and to set against each other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def run(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """A Python process with `code`, its output as text."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    # a background job inherits an ignored SIGINT; the program must see a real one
    options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
