"""What becomes of reading files that may crash, hang or fill the memory: each in a process of its own.

    python tests/support/outcomes.py FILE...        a JSON line for each: {"end", "text", "seconds", "megabytes"}

`end`: "read", "refused" (a LorsError), "raised" (any other exception), "killed" (a signal, 10 s of processor time among
them). `seconds`: of processor time. `megabytes`: what the peak memory of the process grew by.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PATIENCE = 10  # seconds of processor time


def read(path: str) -> str:
    """Everything in a checkpoint, a tensor at a time, and all that is made of names."""
    from lors.checkpoints import layers
    from lors.checkpoints.compatibility import compare
    from lors.checkpoints.reader import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        compare(checkpoint, checkpoint)
        layers.select(checkpoint.tensors, checkpoint.naming, checkpoint.config)
        layers.positions(checkpoint.tensors)
        assert checkpoint.head_is_tied in (True, False)
        for name, info in checkpoint.tensors.items():
            if not info.packed:
                checkpoint.read(name)
        return ", ".join(checkpoint.tensors)


def outcomes(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """One for each path, in order."""
    command = [sys.executable, __file__, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def _outcome(work: Callable[[str], str], path: str) -> dict[str, Any]:
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        resource.setrlimit(resource.RLIMIT_CPU, (PATIENCE, PATIENCE))
        os.write(send, b"%20d" % resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        os.write(send, json.dumps(_run(work, path)).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as stream:
        said = stream.read()
    _, status, usage = os.wait4(child, 0)
    end, text = json.loads(said[20:]) if status == 0 else ("killed", f"status {status}")
    megabytes = (usage.ru_maxrss - int(said[:20])) / 1024
    return {"end": end, "text": text, "seconds": usage.ru_utime + usage.ru_stime, "megabytes": megabytes}


def _run(work: Callable[[str], str], path: str) -> tuple[str, str]:
    from lors.errors import LorsError

    try:
        return "read", work(path)[:2000]
    except LorsError as error:
        return "refused", str(error)
    except BaseException as error:
        return "raised", f"{type(error).__name__}: {str(error)[:200]}"


if __name__ == "__main__":
    import lors.checkpoints.reader  # noqa: F401  (before the forks)

    for argument in sys.argv[1:]:
        print(json.dumps(_outcome(read, argument)), flush=True)
