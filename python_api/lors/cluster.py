"""Work on more machines than one, by Ray: a connection, tasks, and their errors in one line.

A worker that dies is replaced and its task runs again, up to RETRIES times.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from . import keeper
from .errors import LorsError, first_line

__all__ = ["connected", "submit"]

RETRIES = 3
CONNECT_SECONDS = 5.0
TICK_SECONDS = 0.2
START_SECONDS = 120.0  # of a cluster on this machine, which takes 3 on an idle one


@contextlib.contextmanager
def connected(address: str, cpus: int) -> Iterator[Any]:
    """Ray, connected: "local" starts a cluster of `cpus` workers for this command, anything else is an address.

    A connection that the program has already is used and left open. No process of a cluster that is started here outlives
    the block, nor this process. LorsError when Ray is missing or cannot be reached.
    """
    try:
        import ray
    except ImportError:
        raise LorsError("--ray: needs Ray: pip install 'lors-merging[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    with contextlib.ExitStack() as stack:
        if address == "local":
            _share_token(ray)
            found = stack.enter_context(_started(cpus))
        else:
            _require_answer(address)
            found = address
        ours = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=found, log_to_driver=False, logging_level="error")
        except Exception as error:  # Ray raises ConnectionError, RuntimeError, ValueError ... with many lines
            raise LorsError(f"--ray {address}: cannot connect: {first_line(error)}") from error
        except SystemExit:  # is what Ray makes of SIGTERM
            raise SystemExit(128 + signal.SIGTERM) from None
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, ours)  # which Ray takes for itself
        stack.callback(ray.shutdown)
        yield ray


def _share_token(ray: Any) -> None:
    """New versions of Ray let in who has the cluster's token; only who starts the cluster gets one without being asked."""
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        if hasattr(ray._raylet, "Config"):
            ray._raylet.Config.initialize("")  # reads them again


@contextlib.contextmanager
def _started(cpus: int) -> Iterator[str]:
    """A cluster on this machine, below a keeper; its address."""
    ours, theirs = os.pipe()
    command = keeper.python(f"{__name__}:_head", str(cpus), str(theirs))
    with open(ours, "rb", buffering=0) as stream, keeper.running(command, pass_fds=[theirs]):
        os.close(theirs)
        ready, _, _ = select.select([stream], [], [], START_SECONDS)
        outcome, _, text = (stream.read(1 << 12) if ready else b"").decode("utf-8", "replace").partition(" ")
        if outcome != "at":
            raise LorsError(f"--ray local: cannot be started: {text or 'no answer'}")
        yield text


def _head(cpus: str, fd: str) -> None:
    """The program that a cluster on this machine belongs to, until it is ended; tells where the cluster is, or why not."""
    import ray

    with open(int(fd), "w", encoding="utf-8") as stream:
        try:
            options: dict[str, Any] = {"num_cpus": int(cpus), "include_dashboard": False, "log_to_driver": False}
            context = ray.init(address="local", logging_level="error", **options)
        except Exception as error:
            stream.write(f"failed {first_line(error)}")
            return
        stream.write(f"at {context.address_info['gcs_address']}")
    while True:
        signal.pause()


def _require_answer(address: str) -> None:
    """Ray itself waits for minutes and then prints a page.

    It speaks gRPC, so HTTP/2: whoever is greeted answers with a SETTINGS frame, whose fourth byte is 4 (RFC 9113, 3.4).
    With TLS (RAY_USE_TLS) any answer will do.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise LorsError(f"--ray {address}: expected local, HOST:PORT or ray://HOST:PORT")
    greeting = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
    try:
        with socket.create_connection((host, int(port)), CONNECT_SECONDS) as connection:
            connection.sendall(greeting)
            answer = _first_bytes(connection, 4)
    except TimeoutError:
        raise LorsError(f"--ray {address}: no answer within {CONNECT_SECONDS:g} s") from None
    except (OSError, OverflowError) as error:
        raise LorsError(f"--ray {address}: cannot be reached: {getattr(error, 'strerror', None) or error}") from None
    if answer[3:] != b"\x04" and os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        raise LorsError(f"--ray {address}: expected a Ray cluster, which would answer in HTTP/2, got {answer!r}")


def _first_bytes(connection: socket.socket, count: int) -> bytes:
    """What comes first, fewer bytes when no more come; TimeoutError after CONNECT_SECONDS."""
    deadline, found = time.monotonic() + CONNECT_SECONDS, b""
    while len(found) < count:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        if not (more := connection.recv(count - len(found))):
            break
        found += more
    return found


def environment() -> dict[str, Any]:
    """Same vector unit, same bits."""
    from lors_kernels.backends.cpu import instruction_set

    return {"env_vars": {"LORS_ISA": instruction_set()}}


# --- decompositions


def require_fitting(ray: Any, cpus: int, gpus: int, memory: int) -> None:
    """LorsError unless one node could run such a task: Ray itself would wait for one forever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name, wanted, unit, scale in (
        ("CPU", cpus, "cores", 1),
        ("GPU", gpus, "GPUs", 1),
        ("memory", memory, "GB", 1e9),
    ):
        nodes = [node for node in nodes if node.get(name, 0) >= wanted] or _too_small(nodes, name, wanted, unit, scale)


def _too_small(nodes: Sequence[Mapping[str, float]], name: str, wanted: float, unit: str, scale: float) -> Any:
    most = max((node.get(name, 0) for node in nodes), default=0)
    raise LorsError(
        f"--ray: a task needs {wanted / scale:.3g} {unit} on one node, expected such a node, the most is {most / scale:.3g}"
    )


def failure_of(ray: Any, reference: Any) -> str | None:
    """Why a finished task failed, in one line; None if it did not."""
    try:
        result_of(ray, reference)
    except LorsError as error:
        return str(error)
    return None


def result_of(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(getattr(error, "cause", None), LorsError) else None
        if cause is not None:
            raise LorsError(str(cause)) from None
        raise LorsError(f"--ray: a task failed: {str(error).strip().splitlines()[-1]}") from error
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise LorsError(f"--ray: a task was lost {RETRIES + 1} times, or its result: {reason}") from error


def submit(
    ray: Any,
    cpus: int,
    memory: int,
    then: Callable[[Callable[[], Any]], None],
    work: Callable[..., Any],
    *arguments: Any,
) -> None:
    """A function as a task; `then` is called with what returns its result, or raises, when it has ended."""
    require_fitting(ray, cpus, 0, memory)
    task = ray.remote(num_cpus=cpus, memory=memory, max_retries=RETRIES, runtime_env=environment())(work)
    reference = task.remote(*arguments)
    reference.future().add_done_callback(lambda _: then(lambda: result_of(ray, reference)))


def on_every_node(ray: Any, work: Callable[..., None], *arguments: Any) -> None:
    """Calls a function once on every node; a node that is lost meanwhile has lost what it kept too."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(work)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    ray.wait(
        [task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n, soft=True)).remote(*arguments) for n in nodes],
        num_returns=len(nodes), timeout=CONNECT_SECONDS * 6,
    )  # fmt: skip
