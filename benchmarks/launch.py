"""Start one command, wait, write what it cost: `python -I -S launch.py REPORT.json COMMAND...`

A separate small process, because Linux counts the memory of the process that forked into the child's ru_maxrss
(exec keeps the high-water mark of the old address space): started from a driver that has torch and gigabytes of
tensors loaded, every command would seem to need as much as the driver.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time


def anonymous_bytes(pid: int) -> int:
    """Memory of `pid` that is not file pages; 0 where /proc does not tell or the process is gone."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
            fields = dict(line.split(":", 1) for line in status if ":" in line)
    except OSError:
        return 0
    return sum(int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "RssShmem") if key in fields)


def main() -> int:
    report, command = sys.argv[1], sys.argv[2:]
    anonymous = [0]
    done = threading.Event()
    start = time.perf_counter()
    child = subprocess.Popen(command)

    def sample() -> None:
        while not done.wait(0.02):
            anonymous[0] = max(anonymous[0], anonymous_bytes(child.pid))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - start
    done.set()
    sampler.join()
    with open(report, "w", encoding="ascii") as stream:
        json.dump(
            {
                "wall_s": wall,
                "user_s": usage.ru_utime,
                "system_s": usage.ru_stime,
                "peak_rss": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
                "peak_anonymous": anonymous[0],
                "code": os.waitstatus_to_exitcode(status),
            },
            stream,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
