"""Shared fixtures, and the rule that no skip may hide what was asked for.

LORS_REQUIRE=cpu,peers,chromium,... names backends and other optional things (`helpers.OPTIONAL`) whose absence is a
failure instead of a skip.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# The matrices here are small, and BLAS threads that spin for each other are slower than one; before numpy is loaded.
for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
# Hundreds of processes are started here; each would compile our modules anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest
import torch
from hypothesis import HealthCheck, settings

import cuda_emulation
from helpers import BACKENDS, OPTIONAL, REQUIRED, require, require_backend

settings.register_profile(
    "lors",
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("lors")


HERE = Path(__file__).parent
# On several workers (`make test`) a file stays on one of them, and with it those that share what takes minutes to make, or
# look for processes of a kind among all that are there. The longest come first: what is short fills the end.
TOGETHER = {
    "speech/test_experiment.py": "experiment and clusters",
    "speech/test_ray_experiment.py": "experiment and clusters",
    "speech/test_sweep.py": "experiment and clusters",
    "merging/test_on_cluster.py": "experiment and clusters",
    "kernels/test_cuda_emulated.py": "emulation",
    "benchmarks/test_gpu.py": "emulation",
    "kernels/test_triton_interpreted.py": "interpreter",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def group(item: pytest.Item) -> str:
        path = item.path.as_posix().removeprefix(f"{HERE.as_posix()}/")
        return TOGETHER.get(path, path)

    first = list(dict.fromkeys(TOGETHER.values()))
    items.sort(key=lambda item: first.index(group(item)) if group(item) in first else len(first))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))


def pytest_configure() -> None:
    if unknown := sorted(REQUIRED - OPTIONAL):
        raise pytest.UsageError(f"LORS_REQUIRE: unknown {', '.join(unknown)}; known: {', '.join(sorted(OPTIONAL))}")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return require_backend(request.param)


@pytest.fixture
def linux() -> None:
    require("linux", sys.platform == "linux", "promised on Linux")


@pytest.fixture(autouse=True)
def _isolated(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing a test does reaches the user's cache, the hub, or the next test (bits depend on torch's threads)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `base` and the experts `ca`, `de`, `es`: complete tiny Whispers in the Hugging Face format."""
    from benchmarks.generate import Spec, generate

    return generate(tmp_path_factory.mktemp("whisper"), Spec("micro", seed=3), 3).base.parent


@pytest.fixture(scope="session")
def emulated() -> Path:
    """The CUDA module built for the emulation; kept, because a build takes half a minute."""
    require("cuda-emulation", cuda_emulation.compiler() is not None, "no C++ compiler")
    require("cuda-emulation", Path(cuda_emulation.library("libasan.so")).is_absolute(), "no AddressSanitizer")
    return cuda_emulation.build(cuda_emulation.ROOT / "build" / "cuda-emulation")
