"""Stages of an experiment on a real local Ray cluster: the bits of a local run, also when a worker is killed."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from cut import cut_config
from helpers import module
from lors.errors import LorsError
from lors.speech.experiment.plan import build_stages
from lors.speech.experiment.ray_stages import memory_of, run_stages
from processes import gone, marked, wait_for, wait_until

module("ray", "ray")
psutil = module("psutil", "ray")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_stage_on_a_cluster_with_a_killed_worker(finished: Path, tmp_path: Path) -> None:
    config = cut_config()
    stages = {stage.name: stage for stage in build_stages(config)}
    killed: list[int] = []
    stop = threading.Event()

    def kill() -> None:
        while not killed and not stop.is_set():
            if list((tmp_path / "stages").glob("expert-ca-*.partial")):
                for process in psutil.process_iter(["name", "cmdline"]):
                    if "ray::_work" in " ".join(process.info["cmdline"] or [process.info["name"] or ""]):
                        os.kill(process.pid, signal.SIGKILL)
                        killed.append(process.pid)
                        return
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    lines: list[str] = []
    try:
        run_stages("local", config, [stages["expert-ca-s0"]], tmp_path, 1, lines.append)
    finally:
        stop.set()
        killer.join()
    assert killed and [line.split(":")[0] for line in lines] == ["[1/1] expert-ca-s0"]
    weights = [stages["expert-ca-s0"].directory(root) / "model" / "model.safetensors" for root in (tmp_path, finished)]
    assert digest(weights[0]) == digest(weights[1]) and (tmp_path / "logs" / "expert-ca-s0.log").exists()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL], ids=lambda signum: signum.name)
def test_a_signal_ends_a_run_and_its_cluster(tmp_path: Path, signum: signal.Signals) -> None:
    script = Path(__file__).parent.parent / "support" / "stages_command.py"
    command = [
        sys.executable,
        str(script),
        "stages",
        str(tmp_path / "out"),
        "hangs",
        str(tmp_path / "up"),
        "--ray",
        "local",
    ]
    with marked(command, tmp_path / "log") as found:
        wait_for(tmp_path / "up", 120)
        ours = psutil.Process(found.process.pid)
        assert wait_until(  # the shell that the stage leaves behind may still be starting its own
            lambda: {"raylet", "gcs_server", "sleep"} <= {process.name() for process in ours.children(recursive=True)},
            60,
        )
        below = ours.children(recursive=True)
        assert found.end(signum) < 5
        assert found.process.returncode == (-9 if signum == signal.SIGKILL else 143), (tmp_path / "log").read_text()
        assert gone(found)
        _, alive = psutil.wait_procs(below, timeout=1)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_memory_that_stages_reserve() -> None:
    stages = {stage.name: stage for stage in build_stages(cut_config())}
    base, expert, search = (memory_of(stages[name], 10**9) for name in ("test-base", "expert-ca-s0", "dev-lors-s0"))
    assert base == 3 * 10**9 and expert == 6 * 10**9 and search == 5 * 10**9  # search: base, merged and two experts


def test_an_unreachable_cluster_leaves_the_experiment_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(LorsError, match="expected local, HOST:PORT"):
        run_stages("nowhere", cut_config(), build_stages(cut_config()), tmp_path, 1, lambda line: None)
    assert not list(tmp_path.glob("stages/*"))
