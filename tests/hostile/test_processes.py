"""Nothing that a command starts outlives it, whatever it does and however the command ends; and what is finished is kept.

LORS_KILLS=N sends N signals at random moments.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

import hostile_jobs
import tiny
from helpers import require
from lors import keeper
from lors.sweep.score import Interrupted, Objective, Scorer
from processes import LORS, gone, heed_ctrl_c, marked, unlucky, wait_for, wait_until, with_argument

KILLS = int(os.environ.get("LORS_KILLS", "8"))
require("linux", sys.platform == "linux", "promised on Linux")

# Ignores every signal that can be ignored, and leaves behind: a child, a daemon (a session of its own, forked twice, nothing
# open), a stopped process, and one without any environment.
STUBBORN = """
import os, signal, subprocess, sys, time
for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
    signal.signal(signum, signal.SIG_IGN)
subprocess.Popen(["sleep", "1000"])
subprocess.Popen(["env", "-i", "setsid", "sleep", sys.argv[2]])
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    os.closerange(0, 100)
    time.sleep(1000)
os.kill(subprocess.Popen(["sleep", "1000"], start_new_session=True).pid, signal.SIGSTOP)
print(7, flush=True)
open(sys.argv[1], "w").close()
time.sleep(float(sys.argv[3]))
"""
BARE = f"1000.{os.getpid()}"  # what the one without an environment is known by


@pytest.fixture
def stubborn(tmp_path: Path) -> list[str]:
    """A command; it makes tmp_path/up when all of it is there. Its last word may be replaced: the seconds it takes."""
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    return [sys.executable, str(tmp_path / "stubborn.py"), str(tmp_path / "up"), BARE, "1000"]


# --- the keeper


def test_exit_codes() -> None:
    for command, code in (
        (["true"], 0),
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -15 $$"], 143),
        (["no such program"], 127),
        (["/"], 127),
    ):
        with keeper.running(command, stderr=subprocess.PIPE) as process:
            assert process.stderr is not None
            said = process.stderr.read()
            assert process.wait(10) == code
        assert (said == b"") == (code != 127), said


def test_a_command_finds_itself_as_if_started_without_a_keeper() -> None:
    """An empty standard input, no ignored signal, no descriptor too many, the environment and the directory."""
    script = "cat; pwd; echo $PATH; grep -E 'SigIgn|SigBlk' /proc/self/status; ls /proc/self/fd"
    outputs = []
    for start in (
        lambda *a, **k: keeper.running(*a, **k),
        lambda *a, **k: subprocess.Popen(*a, stdin=subprocess.DEVNULL, preexec_fn=heed_ctrl_c, **k),
    ):
        with start(["sh", "-c", script], stdout=subprocess.PIPE) as process:
            outputs.append(process.stdout.read())
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(("how", "code"), [("the command ends", 0), ("the block ends", 0), ("we are killed", -9)])
def test_all_that_a_command_started_ends(stubborn: list[str], tmp_path: Path, how: str, code: int) -> None:
    command = [*stubborn[:-1], "0.5"] if how == "the command ends" else stubborn
    body = {"the block ends": f"while not os.path.exists({str(tmp_path / 'up')!r}): pass"}.get(how, "process.wait()")
    script = f"import os\nfrom lors import keeper\nwith keeper.running({command!r}) as process:\n  {body}\n"
    with marked([sys.executable, "-c", script], tmp_path / "log") as found:
        wait_for(tmp_path / "up")
        if how == "we are killed":
            # us, the keeper, the command, two sleeping, the daemon, which may still be forking
            assert wait_until(lambda: len(found.alive()) == 6) and with_argument(BARE)
            found.process.kill()
        assert found.process.wait(20) == code
        assert gone(found) and not with_argument(BARE), (tmp_path / "log").read_text()


def test_a_chain_of_processes_that_fork_and_end_is_caught(tmp_path: Path) -> None:
    """None lives for longer than a millisecond or two."""
    chain = "import os\nopen({!r}, 'w').close()\nfor _ in range(100000):\n if os.fork(): os._exit(0)\n os.setsid()"
    command = [sys.executable, "-c", chain.format(str(tmp_path / "up"))]
    script = f"from lors import keeper\nwith keeper.running({command!r}) as process: process.wait()"
    with marked([sys.executable, "-c", script], tmp_path / "log") as found:
        wait_for(tmp_path / "up")
        assert found.process.wait(10) == 0 and gone(found)


# --- sweeps


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("family")
    tiny.family(root, ("ca",))
    (root / "recipe.yml").write_text("merge_method: lors\nbase_model: base\nmodels: [{model: ca}]\n")
    return root / "recipe.yml"


@pytest.mark.parametrize(
    "signals",
    [
        (signal.SIGTERM,),
        (signal.SIGHUP,),
        (signal.SIGINT,),
        (signal.SIGKILL,),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGINT, signal.SIGTERM),
        (signal.SIGHUP, signal.SIGKILL),
    ],
    ids=lambda signals: "-".join(signal.Signals(signum).name for signum in signals),
)
def test_a_signal_ends_a_sweep_and_its_scorers(
    recipe: Path, stubborn: list[str], tmp_path: Path, signals: tuple[int, ...]
) -> None:
    command = [
        *LORS, "sweep", str(recipe), "-o", str(tmp_path / "s"), "--lambda", "0.1,0.2,0.3", "-j", "2",
        "--score", shlex.join(stubborn),
    ]  # fmt: skip
    with marked(command, tmp_path / "log") as found:
        wait_for(tmp_path / "up")
        assert len(found.alive()) > 4
        assert found.end(*signals) < 5
        first, killed = signals[0], signal.SIGKILL in signals
        assert found.process.returncode == (-9 if killed else 130 if first == signal.SIGINT else 128 + first)
        assert gone(found) and not with_argument(BARE), (tmp_path / "log").read_text()
    assert not (tmp_path / "s" / "trials.jsonl").exists(), "the scorer had printed 7 and not ended"
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_scores_that_are_finished_when_the_signal_comes_are_kept(recipe: Path, tmp_path: Path) -> None:
    """The scorer sends the signal itself, as the last but one thing that it does; another is under way meanwhile."""
    script = tmp_path / "score.sh"
    script.write_text(
        f'#!/bin/sh\ncase "$1" in *-0) touch {tmp_path}/up; exec sleep 1000;; esac\n'
        f"while ! [ -e {tmp_path}/up ]; do sleep 0.01; done\n"
        f"echo 5; kill -$SIGNAL $(cat {tmp_path}/pid); sleep $REST\n"
    )
    script.chmod(0o755)
    for number, (signum, rest, kept) in enumerate((("TERM", 0, True), ("INT", 0.5, True), ("HUP", 100, False))):
        out = tmp_path / f"s{number}"
        (tmp_path / "up").unlink(missing_ok=True)
        command = [
            *LORS, "sweep", str(recipe), "-o", str(out), "--lambda", "0.1,0.2,0.3", "-j", "2",
            "--score", f"env SIGNAL={signum} REST={rest} {script}",
        ]  # fmt: skip
        with marked(["sh", "-c", f'echo $$ > {tmp_path}/pid; exec "$@"', "sh", *command], tmp_path / "log") as found:
            assert found.process.wait(60) > 128 and gone(found), (tmp_path / "log").read_text()
        log = out / "trials.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        assert [(line["number"], line["values"]) for line in lines] == ([(1, [5.0])] if kept else [])


def test_a_scorer_that_is_stopped_is_no_failed_trial(tmp_path: Path) -> None:
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    begun = time.monotonic()
    with pytest.raises(Interrupted):
        Scorer("sh -c 'trap \"\" TERM; echo not a score; sleep 100'", (Objective("score"),))(tmp_path, stop)
    assert time.monotonic() - begun < 2


def test_what_a_scorer_prints_takes_no_memory(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        scorer = Scorer(
            "sh -c 'head -c 300000000 /dev/zero >&2; head -c 300000000 /dev/zero; echo; echo 3'", (Objective("x"),)
        )
        assert scorer(tmp_path).values == (3.0,)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_a_process_that_leaves_its_group_in_time_is_killed() -> None:
    """A child that starts a session of its own when it has been looked at, and was the last of its group."""
    script = (
        "import os, subprocess\n"
        "from lors import keeper\n"
        "def gone(*_): raise ProcessLookupError\n"
        "os.killpg = gone\n"
        "child = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        "keeper._end_all(0, ended := {})\n"
        "assert ended == {child.pid: 9}, ended\n"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_signals_at_random_moments(recipe: Path, tmp_path: Path) -> None:
    """A sweep that is ended again and again: within 5 s, nothing outlives it, no score is lost, and it comes to its end."""
    script, finished, token = tmp_path / "score.sh", tmp_path / "finished", f"1000.{secrets.randbelow(10**18)}"
    script.write_text(
        "#!/bin/sh\ntrap '' TERM INT HUP\nsetsid sleep $2 >&- 2>&- &\n"
        f'cksum < "$1/model.safetensors" | cut -d" " -f1\necho "${{1##*-}}" >> {finished}\n'
    )
    script.chmod(0o755)

    def start(out: Path) -> BaseProcess:
        values = ["--rank", "1,2", "--lambda", "0.2,0.4,0.8", "--jobs", "2", "--threads", "2", "--quiet"]
        return hostile_jobs.start(
            "command", "sweep", str(recipe), "-o", str(out), *values, "--score", f"{script} {{model}} {token}"
        )

    def scores(out: Path) -> list[tuple[int, list[float]]]:
        log = out / "trials.jsonl"
        content = log.read_text() if log.exists() else ""
        lines = [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith("\n")]
        return [(line["number"], line["values"]) for line in lines]

    start(tmp_path / "want").join()  # starts the server too
    want = dict(scores(tmp_path / "want"))
    begun = time.monotonic()
    start(tmp_path / "again").join()
    span, hits, rounds, slowest, lost = time.monotonic() - begun, 0, 0, 0.0, 0
    finished.unlink()
    for number in range(KILLS):
        rng, out = random.Random(number), tmp_path / f"s{rounds}"
        (signals, pause), before = unlucky(rng), scores(out)
        process = start(out)
        time.sleep(rng.uniform(0, span))
        ended = time.monotonic()
        for index, signum in enumerate(signals):
            time.sleep(pause if index else 0)
            if process.is_alive():
                os.kill(process.pid, signum)
        process.join(20)
        slowest = max(slowest, time.monotonic() - ended)
        assert process.exitcode is not None and slowest < 5, (number, signals)
        hits += process.exitcode != 0
        assert wait_until(lambda: not with_argument(token)), (number, signals)
        after = scores(out)
        assert after[: len(before)] == before and len(dict(after)) == len(after)
        assert all(want[trial] == values for trial, values in after)
        missing = (
            {int(line) for line in finished.read_text().split()} - dict(after).keys() if finished.exists() else set()
        )
        lost += len(missing)
        assert not missing or signal.SIGKILL in signals, (number, signals, missing)
        finished.unlink(missing_ok=True)
        finished.write_text("".join(f"{trial}\n" for trial, _ in after))
        if (out / "index.html").exists() or number == KILLS - 1:
            start(out).join()
            assert dict(scores(out)) == want and not (out / "trials").exists() and not (out / "cache").exists()
            finished.unlink()
            rounds += 1
    print(
        f"{hits} of {KILLS} signals came before the end, the slowest end took {slowest:.2f} s, {rounds} sweeps came to their end, {lost} scores lost to SIGKILL"
    )
    assert hits > KILLS // 4
