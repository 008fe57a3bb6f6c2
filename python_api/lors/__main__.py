"""The `lors` command, as a script and as ``python -m lors``. Importing what it needs takes longer than a finger on Ctrl-C."""

from __future__ import annotations

import os
import signal
from types import FrameType


def main() -> None:
    """Entry point."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, and stays so
        signal.signal(signal.SIGINT, _leave)
    from .cli import main as command

    command()


def _leave(signum: int, frame: FrameType | None) -> None:
    """Before a command begins and after it has ended there is nothing to clean up; an exception would be a traceback."""
    os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
