"""A real local Ray cluster: the same bits as without it, also when a worker is killed in the middle."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

import tiny
from helpers import module
from lors.checkpoints.reader import open_checkpoint
from lors.errors import LorsError
from lors.files.remote import cache
from lors.merging.on_disk import merge_recipe
from lors.methods import SPECS
from lors.recipes.recipe import Recipe
from lors.sweep.run import sweep
from processes import LORS, gone, marked, wait_for

psutil, ray = module("psutil", "ray"), module("ray", "ray")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two workers; the address of the cluster."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))  # of the workers too
    context = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Matrices with a flat spectrum, whose decomposition takes long enough to be interrupted."""
    root = tmp_path_factory.mktemp("family")
    shapes = {f"model.encoder.layers.{i}.fc1.weight": (768, 512) for i in range(10)}
    base = {
        n: np.random.default_rng(i).standard_normal(s).astype(np.float32) for i, (n, s) in enumerate(shapes.items())
    }
    tiny.write(root / "base", base)
    for seed, name in enumerate(("ca", "de"), start=1):
        noise = np.random.default_rng(100 + seed)
        tiny.write(
            root / name, {n: x + 1e-3 * noise.standard_normal(x.shape).astype(np.float32) for n, x in base.items()}
        )
    path = root / "recipe.yml"
    path.write_text("merge_method: lors\nbase_model: base\nmodels: [{model: ca}, {model: de}]\nparameters: {rank: 5}\n")
    return Recipe.load(path, SPECS)


def digest(path: Path) -> str:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.sha256()["model.safetensors"]


@contextlib.contextmanager
def killed_worker(task: str) -> Iterator[None]:
    """Kills the first worker that is seen at a task within the block; there must be one."""
    killed: list[int] = []
    stop = threading.Event()

    def kill() -> None:
        while not killed and not stop.is_set():
            for process in psutil.process_iter(["name", "cmdline"]):
                if f"ray::{task}" in " ".join(process.info["cmdline"] or [process.info["name"] or ""]):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                    return
            time.sleep(0.002)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield
    finally:
        stop.set()
        killer.join()
    assert killed, f"a worker was killed at {task}"


def at_urls(recipe: Recipe) -> Recipe:
    """The same inputs by URLs that every process of this machine sees and that are copied like those of any store: file:// and local://
    alone would be paths."""
    data = recipe.to_dict(resolved=True)
    data["base_model"] = f"simplecache::file://{data['base_model']}"
    for entry, label in zip(data["models"], recipe.labels, strict=True):
        entry |= {"model": f"simplecache::file://{entry['model']}", "name": label}
    return Recipe.from_yaml(yaml.safe_dump(data), SPECS)


def test_a_merge_with_a_killed_worker_has_the_same_bits(cluster: str, recipe: Recipe, tmp_path: Path) -> None:
    merge_recipe(recipe, tmp_path / "local")
    with killed_worker("decompose_group"):
        merge_recipe(recipe, tmp_path / "ray", ray="local")
    assert digest(tmp_path / "ray") == digest(tmp_path / "local")
    merge_recipe(at_urls(recipe), f"simplecache::file://{tmp_path}/url", ray="local")
    assert digest(tmp_path / "url") == digest(tmp_path / "local")


def test_a_sweep_on_the_cluster_is_the_local_one(cluster: str, recipe: Recipe, tmp_path: Path) -> None:
    script = tmp_path / "score.sh"
    script.write_text('#!/bin/sh\nsum=$(cksum < "$1/model.safetensors" | cut -d" " -f1)\necho $sum\n')
    script.chmod(0o755)
    options = {"rank": "2,4", "lambda": "0.2,1.0"}
    local = sweep(recipe, options, str(script), tmp_path / "local")
    with killed_worker("remote_trial"):
        far = sweep(recipe, options, str(script), tmp_path / "far", jobs=2, threads=2, ray="local")
    url = sweep(
        at_urls(recipe), options, str(script), f"simplecache::file://{tmp_path}/url", jobs=2, threads=2, ray="local"
    )
    want = {trial.number: trial.values for trial in local.trials}
    assert len(set(want.values())) == 4
    for found in (far, url):
        assert {trial.number: trial.values for trial in found.trials} == want
    for home in (tmp_path / "far", tmp_path / "url"):
        assert (home / "index.html").exists() and not (home / "trials").exists() and not list(home.glob("cache/*"))
    assert not [path for path in cache().iterdir() if path.name.startswith(("work-", "sweep-", "out-"))]
    with pytest.raises(LorsError, match="expected a command"):
        sweep(recipe, options, lambda path: None, tmp_path / "no", ray="local")  # type: ignore[arg-type, return-value]


def test_errors_of_tasks_are_lines(cluster: str, recipe: Recipe, tmp_path: Path) -> None:
    with open_checkpoint(recipe.sources[0]) as checkpoint:
        broken = {name: checkpoint.read(name) for name in checkpoint.tensors}
    broken["model.encoder.layers.3.fc1.weight"][0, :3] = np.nan
    bad = tiny.write(tmp_path / "bad", broken)
    other = Recipe.from_arguments(recipe.base_source, {"bad": bad}, "lors", methods=SPECS, rank=5)
    with pytest.raises(LorsError, match=r"bad: tensor 'model.encoder.layers.3.fc1.weight'.*3 NaN") as caught:
        merge_recipe(other, tmp_path / "out", ray="local")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_task_that_no_node_can_run_is_refused(cluster: str, recipe: Recipe, tmp_path: Path) -> None:
    """Ray would wait for such a node forever."""
    with pytest.raises(LorsError, match="needs 64 cores on one node, expected such a node, the most is 2"):
        sweep(recipe, {"rank": "1"}, "true", tmp_path / "s", threads=64, ray="local")


@contextlib.contextmanager
def answering(answer: bytes | None, pause: float = 0.0) -> Iterator[str]:
    """The address of a server that sends an answer, byte after byte, to whoever connects; None: it never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = []

        def serve() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                except OSError:
                    return
                with contextlib.suppress(OSError):
                    kept[-1].recv(100)
                    for byte in answer or b"":
                        kept[-1].send(bytes([byte]))
                        time.sleep(pause)
                    if answer is not None:
                        kept[-1].close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.timeout(60)
def test_addresses_that_are_no_cluster(recipe: Recipe, tmp_path: Path) -> None:
    """Ray itself would wait for minutes."""
    if ray.is_initialized():
        ray.shutdown()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        _refused(recipe, tmp_path, f"127.0.0.1:{unused.getsockname()[1]}", "cannot be reached")
    for address in ("nowhere", ":1", "127.0.0.1:x", "ray://"):
        _refused(recipe, tmp_path, address, "expected local, HOST:PORT")
    for answer, pause, message in (
        (None, 0, "no answer within 5 s"),
        (b"HTTP/1.1 400 Bad Request\r\n", 2, "no answer within 5 s"),
        (b"HTTP/1.1 400 Bad Request\r\n", 0, "expected a Ray cluster, which would answer in HTTP/2, got b'HTTP'"),
        (b"", 0, "expected a Ray cluster, which would answer in HTTP/2, got b''"),
    ):
        with answering(answer, pause) as address:
            _refused(recipe, tmp_path, address, message)
            _refused(recipe, tmp_path, f"ray://{address}", message)


def _refused(recipe: Recipe, tmp_path: Path, address: str, message: str) -> None:
    begun = time.monotonic()
    with pytest.raises(LorsError, match=message) as caught:
        merge_recipe(recipe, tmp_path / "out", ray=address)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begun < 10 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda signum: signum.name)
def test_a_cluster_ends_with_the_command_that_started_it(
    recipe: Recipe, tmp_path: Path, signum: signal.Signals
) -> None:
    assert recipe._directory
    command = [
        *LORS, "sweep", str(recipe._directory / "recipe.yml"), "-o", str(tmp_path / "s"), "--lambda", "0.1", "--ray", "local",
        "--score", f"sh -c 'setsid sleep 1000 & sleep 0.5; touch {tmp_path}/up; wait'",
    ]  # fmt: skip
    with marked(command, tmp_path / "log") as found:
        wait_for(tmp_path / "up")
        below = psutil.Process(found.process.pid).children(recursive=True)
        names = {process.name() for process in below}
        assert {"raylet", "gcs_server", "sleep"} <= names, names
        assert found.end(signum) < 5
        assert found.process.returncode == {signal.SIGINT: 130, signal.SIGKILL: -9}.get(signum, 128 + signum)
        assert gone(found), found.alive()
        _, alive = psutil.wait_procs(below, timeout=1)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_a_signal_ends_a_merge_that_waits_for_its_cluster(tmp_path: Path) -> None:
    base = {f"model.encoder.layers.{i}.fc1.weight": np.zeros((2000, 1500), np.float32) for i in range(8)}
    noise = np.random.default_rng(0)
    tiny.write(tmp_path / "base", base)
    tiny.write(tmp_path / "ca", {n: noise.standard_normal(x.shape).astype(np.float32) for n, x in base.items()})
    options = ["--base", str(tmp_path / "base"), "--expert", f"ca={tmp_path}/ca", "--rank", "200", "--threads", "1"]
    with marked([*LORS, "merge", str(tmp_path / "out"), *options, "--ray", "local"], tmp_path / "log") as found:
        command, deadline = psutil.Process(found.process.pid), time.monotonic() + 100
        while not any("decompose_group" in p.name() for p in command.children(recursive=True)):
            assert time.monotonic() < deadline and found.process.poll() is None
        time.sleep(0.5)
        assert found.end(signal.SIGTERM) < 5 and found.process.returncode == 128 + signal.SIGTERM
        assert gone(found)
    assert sorted(os.listdir(tmp_path)) == ["base", "ca", "log"]


def test_a_cluster_that_cannot_be_started(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if ray.is_initialized():
        ray.shutdown()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 200)))  # too long for a socket in it
    with pytest.raises(LorsError, match="--ray local: cannot be started: ") as caught:
        merge_recipe(recipe, tmp_path / "out", ray="local")
    assert "\n" not in str(caught.value)
