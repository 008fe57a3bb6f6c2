"""Every method, and every kind of expert, on devices as on the CPU: from files and from memory, on one and on two."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lors
import tiny
from calibrated import statistics
from experts import EXPERTS, files, state
from fake_cuda import late, two_devices
from lors.engine import batches, gpu
from lors.engine.cpu import Engine
from lors.engine.gpu import DeviceRun
from lors.engine.work import Piece, Work
from lors.errors import LorsError
from lors.experts.source import Spec
from lors.merging.on_disk import merge_recipe
from lors.methods import METHODS, SPECS
from lors.recipes.recipe import Recipe

WEIGHT = {"ca": 1.0, "de": -0.5, "es": 0.7}
SETTINGS: dict[str, dict[str, Any]] = {
    "lors": {"rank": 3, "density": 0.25, "lam": 0.5, "weight": WEIGHT},
    "svp": {"rank": 3, "weight": WEIGHT},
    "magnitude_prune": {"density": 0.3, "weight": WEIGHT},
    "linear": {"weight": WEIGHT},
    "task_arithmetic": {"weight": WEIGHT},
    "ties": {"density": 0.4, "weight": WEIGHT},
    "dare_linear": {"density": 0.5, "weight": WEIGHT},
    "dare_ties": {"density": 0.5, "weight": WEIGHT},
    "della": {"density": 0.5, "weight": WEIGHT},
    "della_linear": {"density": 0.5, "weight": WEIGHT},
    "breadcrumbs": {"density": 0.5, "gamma": 0.05, "weight": WEIGHT},
    "breadcrumbs_ties": {"density": 0.5, "gamma": 0.05, "weight": WEIGHT},
    "model_stock": {"filter_wise": True},
    "slerp": {"t": 0.3},
    "tsv": {"weight": WEIGHT},
    "iso_c": {"weight": WEIGHT},
    "iso_cts": {"weight": WEIGHT},
    "wudi": {"weight": WEIGHT},
    "lors_parts": {"weight": WEIGHT, "sparse_weight": {"ca": 0.1, "de": 0.0, "es": -0.4}, "rank": 5},
}
ON_DEVICE = [name for name, method in METHODS.items() if method.on_device]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny.family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Small tensors go to devices as large ones do; the names of those that have been computed there."""
    done: list[str] = []
    store = DeviceRun.store
    monkeypatch.setattr(gpu, "SMALL", 0)

    def watch(self: Any, index: int, *arguments: Any) -> Any:
        done.append(self.pieces[index].work.name)
        return store(self, index, *arguments)

    monkeypatch.setattr(DeviceRun, "store", watch)
    return done


def experts_of(method: str, sources: Mapping[str, Any]) -> dict[str, Any]:
    return {name: sources[name] for name in EXPERTS[: 1 if method == "slerp" else None]}


def settings_of(method: str, family: Mapping[str, Path]) -> dict[str, Any]:
    if method == "regmean":
        return {"statistics": statistics(family["base"].parent, EXPERTS, tiny.shapes()), "weight": WEIGHT}
    return SETTINGS.get(method, {})


def assert_close(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], base: Mapping[str, Any]) -> None:
    """L is promised to 1e-5 of its norm; the rest to rounding."""
    assert found.keys() == wanted.keys()
    changed = 0
    for name, x in wanted.items():
        moved = float(np.linalg.norm(x.astype(np.float64) - base[name]))
        apart = float(np.linalg.norm(found[name].astype(np.float64) - x))
        assert apart <= 2e-5 * moved + 1e-7 * float(np.linalg.norm(x)), name
        changed += moved > 0
    assert changed


@pytest.mark.parametrize("method", ON_DEVICE)
def test_every_method_from_files_on_two_devices(
    method: str, family: dict[str, Path], tmp_path: Path, everything: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts, settings = family["base"], experts_of(method, family), settings_of(method, family)
    lors.merge(base, experts, tmp_path / "cpu", method, **settings)
    cuda = two_devices(monkeypatch)
    compute = gpu.rounded
    monkeypatch.setattr(gpu, "rounded", lambda *arguments: late(compute(*arguments), cuda))
    monkeypatch.setattr(batches, "MOST", 60_000)
    report = lors.merge(base, experts, tmp_path / "gpu", method, device="cuda:0,cuda:1", **settings)
    assert_close(state(tmp_path / "gpu"), state(tmp_path / "cpu"), state(base))
    assert "on cuda:0, cuda:1" in report.backend
    sums = METHODS[method].combine is None and METHODS[method].everywhere  # at the speed of the files: on the CPU
    assert bool(everything) != sums


@pytest.mark.parametrize("method", ON_DEVICE)
@pytest.mark.parametrize("count", [1, 2])
def test_every_method_where_the_tensors_are(method: str, count: int, family: dict[str, Path]) -> None:
    """count: chunks of a tensor that is looked at as a whole."""
    from lors.engine import device_operands
    from lors_kernels.arrays import to_torch

    states = {name: state(path) for name, path in family.items()}
    there = {name: {key: to_torch(x.copy()) for key, x in values.items()} for name, values in states.items()}
    settings = settings_of(method, family)
    wanted = lors.merge_state_dicts(states["base"], experts_of(method, states), method, **settings)
    with pytest.MonkeyPatch.context() as patch:
        if count > 1:
            patch.setattr(device_operands, "CHUNK", 4000)
        found = lors.merge_state_dicts(there["base"], experts_of(method, there), method, device="cpu", **settings)
    assert_close({name: x.numpy() for name, x in found.items()}, wanted, states["base"])


@pytest.mark.parametrize("method", ["ties", "della", "model_stock", "slerp"])
@pytest.mark.parametrize("memory", [None, 200_000], ids=["all at once", "one at a time"])
def test_a_tensor_that_does_not_fit_is_looked_at_in_parts(
    method: str, memory: int | None, everything: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    base = {"embed.weight": rng.standard_normal((40, 70)).astype(np.float32)}
    experts = {t: {"embed.weight": base["embed.weight"] + 0.01 * rng.standard_normal((40, 70))} for t in EXPERTS}
    experts = {t: {name: x.astype(np.float32) for name, x in tensors.items()} for t, tensors in experts.items()}
    experts, settings = experts_of(method, experts), dict(SETTINGS[method])
    wanted = lors.merge_state_dicts(base, experts, method, **settings)
    brought: list[int] = []
    bring = DeviceRun.bring
    monkeypatch.setattr(DeviceRun, "bring", lambda self, *part: (brought.append(1), bring(self, *part))[1])
    two_devices(monkeypatch)
    found = lors.merge_state_dicts(base, experts, method, device="cuda:1", device_memory=memory, **settings)
    assert_close(found, wanted, base)
    assert bool(brought) == (memory is not None and method != "slerp") and everything == ["embed.weight"]


def test_a_method_that_runs_out_of_memory_looks_at_parts(
    everything: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    states = {name: {"embed.weight": np.float32(i) + np.eye(9, dtype=np.float32)} for i, name in enumerate("abc")}
    experts = {name: states[name] for name in "bc"}
    wanted = lors.merge_state_dicts(states["a"], experts, "ties", density=0.5)
    operands, failed = DeviceRun.operands, []

    def scarce(self: Any, work: Any, sources: Any, there: Any) -> Any:
        if there is not None:
            failed.append(1)
            raise torch.cuda.OutOfMemoryError("tried to allocate")
        return operands(self, work, sources, there)

    monkeypatch.setattr(DeviceRun, "operands", scarce)
    two_devices(monkeypatch)
    found = lors.merge_state_dicts(states["a"], experts, "ties", density=0.5, device="cuda:0")
    assert failed == [1] and everything == ["embed.weight"]
    np.testing.assert_array_equal(found["embed.weight"], wanted["embed.weight"])
    monkeypatch.setattr(DeviceRun, "operands", lambda self, work, sources, there: scarce(self, work, sources, ()))
    with pytest.raises(LorsError, match=r"cuda:0: out of memory for tensor 'embed.weight' \[9, 9\] alone"):
        lors.merge_state_dicts(states["a"], experts, "ties", density=0.5, device="cuda:0")


# --- experts whose deltas are stored in parts, or known by factors


@pytest.fixture(scope="module")
def stored(family: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return files(family, tmp_path_factory.mktemp("stored"), rank=4, density=0.3)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lors", {"rank": 4, "density": 0.3, "weight": WEIGHT}),
        ("lors", {"rank": 4, "density": 0.1, "lam": 0.5}),  # fewer entries than the files hold
        ("lors", {"rank": {"ca": 2, "de": 4, "es": 1}, "density": {"ca": 0.2, "de": 0.0, "es": 0.3}}),
        ("svp", {"rank": 4}),
        ("magnitude_prune", {"density": 0.2}),
        ("ties", {"density": 0.5, "weight": WEIGHT}),
        ("della", {"density": 0.5}),
    ],
)
@pytest.mark.parametrize("mixed", [False, True], ids=["files", "files and checkpoints"])
def test_expert_files(
    method: str,
    settings: dict[str, Any],
    mixed: bool,
    family: dict[str, Path],
    stored: dict[str, str],
    tmp_path: Path,
    everything: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experts: dict[str, Any] = dict(stored) | ({"de": family["de"]} if mixed else {})
    lors.merge(family["base"], experts, tmp_path / "cpu", method, **settings)
    two_devices(monkeypatch)
    monkeypatch.setattr(batches, "MOST", 60_000)
    report = lors.merge(family["base"], experts, tmp_path / "gpu", method, device="cuda:0,cuda:1", **settings)
    assert everything
    assert_close(state(tmp_path / "gpu"), state(tmp_path / "cpu"), state(family["base"]))
    assert report.bytes_read and report.kinds


def test_all_that_an_expert_file_knows(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = files(family, tmp_path, rank=4, density=1.0, remainder="float32", values="float32")
    settings: dict[str, Any] = {"target": {"include": ["_proj"]}, "weight": WEIGHT}
    lors.merge(family["base"], whole, tmp_path / "cpu", "task_arithmetic", **settings)
    two_devices(monkeypatch)
    report = lors.merge(family["base"], whole, tmp_path / "gpu", "task_arithmetic", device="cuda:1", **settings)
    assert_close(state(tmp_path / "gpu"), state(tmp_path / "cpu"), state(family["base"]))
    assert report.decomposed


def test_expert_files_are_read_while_the_batch_before_is_computed(
    family: dict[str, Path], stored: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from threading import current_thread

    from lors.experts.expert_source import ExpertSource

    readers = set()
    read = ExpertSource.read
    monkeypatch.setattr(
        ExpertSource, "read", lambda self, name: (readers.add(current_thread().name), read(self, name))[1]
    )
    two_devices(monkeypatch)
    lors.merge(family["base"], stored, tmp_path / "gpu", rank=4, density=0.3, device="cuda:0")
    assert readers and not any(name.startswith("lors") for name in readers), "not by the thread that computes"


def test_a_damaged_expert_file_is_named(
    family: dict[str, Path], stored: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray(Path(stored["ca"]).read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "ca.lors.safetensors").write_bytes(data)
    two_devices(monkeypatch)
    with pytest.raises(LorsError, match="damaged expert file"):
        lors.merge(
            family["base"], dict(stored) | {"ca": tmp_path / "ca.lors.safetensors"}, tmp_path / "out",
            rank=4, density=0.3, device="cuda:0",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def adapter(path: Path, rank: int = 2) -> Path:
    """A PEFT adapter of the query projections."""
    import json

    from safetensors.numpy import save_file

    rng = np.random.default_rng(len(path.name))
    tensors = {}
    for name in (name for name in tiny.shapes() if name.endswith("q_proj.weight") and "encoder." in name):
        module = name.removesuffix(".weight")
        shape = tiny.shapes()[name]
        a, b = rng.standard_normal((rank, shape[1])), 0.01 * rng.standard_normal((shape[0], rank))
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.astype(np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.astype(np.float32)
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lors", {"rank": 1, "density": 0.2, "lam": 0.5}),
        ("lors", {"rank": 4, "density": 0.5}),
        ("magnitude_prune", {"density": 0.2}),
        ("svp", {"rank": 1}),
        ("ties", {"density": 0.5}),
        ("tsv", {}),
    ],
)
def test_adapters(
    method: str,
    settings: dict[str, Any],
    family: dict[str, Path],
    tmp_path: Path,
    everything: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experts = {"ca": adapter(tmp_path / "ca"), "de": family["de"], "x": adapter(tmp_path / "lora")}
    lors.merge(family["base"], experts, tmp_path / "cpu", method, **settings)
    two_devices(monkeypatch)
    report = lors.merge(family["base"], experts, tmp_path / "gpu", method, device="cuda:0,cuda:1", **settings)
    assert everything
    assert_close(state(tmp_path / "gpu"), state(tmp_path / "cpu"), state(family["base"]))
    assert method not in ("lors", "svp") or report.svd_methods["factors"], "decomposed by its factors, not as a matrix"


def test_what_is_not_worth_a_launch_stays_on_the_cpu(family: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    states = {name: state(path) for name, path in family.items()}
    done, do = [], Engine.do

    def watch(self: Any, index: int) -> None:
        done.append(self.account.pieces[index].work)
        do(self, index)

    monkeypatch.setattr(Engine, "do", watch)
    monkeypatch.setattr(gpu, "SMALL", 1500)
    lors.merge_state_dicts(states["base"], experts_of("ties", states), "ties", device="cpu", density=0.5)
    assert done and all(work.spec.numel < 1500 for work in done)
    assert len(done) < len(states["base"])


@pytest.mark.parametrize(
    ("matrices", "host", "free", "resident", "expected"),
    [
        (50, 128, 1024, False, 1),  # GB: of 6.7 to be copied, the least
        (100, 128, 1024, False, 13.4 / 8),
        (1000, 256, 1024, False, 2),
        (1000, 24, 1024, False, 1.5),  # what the host has room for
        (1000, 256, 2, False, 0.8),  # what the device has room for, with the next beside it
        (1000, 24, 1024, True, 8),  # nothing to be copied
    ],
)
def test_batches_follow_memory(
    matrices: int, host: int, free: int, resident: bool, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (5120, 1280)
    work = Work("w", Spec(np.dtype(np.float16), shape), np.dtype(np.float16), (), True)
    one = work.spec.numel * 2 * 11 / (1 << 30)
    rules = (batches.Rule(7, 0.2, True, "float16", False),) * 10
    monkeypatch.setattr(gpu, "host_memory", lambda: host << 30)
    monkeypatch.setattr(gpu.GpuEngine, "kind_of", lambda self, work: batches.Kind(shape, "float16", rules))
    monkeypatch.setattr(gpu.GpuEngine, "sizes_of", lambda self, work: (2, 2))
    run = DeviceRun.__new__(DeviceRun)
    run.resident, run.engine = resident, gpu.GpuEngine.__new__(gpu.GpuEngine)
    run.engine.device_memory, run.engine.experts = free << 30, [None] * 10  # type: ignore[list-item]
    run.pieces, run.indices = [Piece(work, 0, work.spec.numel)] * matrices, range(matrices)
    found = max(len(batch.pieces) for batch in run.batches()) * one
    assert expected - one <= found <= expected


def test_a_cluster_beside_a_device_is_refused(family: dict[str, Path], tmp_path: Path) -> None:
    recipe = Recipe.from_arguments(family["base"], {"ca": family["ca"]}, "lors", methods=SPECS)
    with pytest.raises(LorsError, match="ray: expected no device beside it"):
        merge_recipe(recipe, tmp_path / "out", device="cpu", ray="local")
