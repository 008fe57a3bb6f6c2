"""PEFT: its adapters as experts of any merge, adapters merged at the level of B @ A, its functions before and after."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import WhisperForConditionalGeneration

import lors
import lors.integrations.peft as bridge
import whispers
from helpers import module
from lors import LorsError
from lors.experts.factors import Factors

peft = module("peft", "peers")
from peft.utils import merge_utils


def model_of(root: Path) -> Any:
    return WhisperForConditionalGeneration.from_pretrained(root / "base")


def adapted(root: Path, out: Path, seed: int = 0, **settings: Any) -> tuple[Path, Path]:
    """(directory of a random adapter, directory of the checkpoint that PEFT makes of it)."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "fc1"]} | settings)
    model = peft.get_peft_model(model_of(root), config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    model.save_pretrained(out / f"adapter-{seed}")
    model.merge_and_unload().save_pretrained(out / f"merged-{seed}")
    return out / f"adapter-{seed}", out / f"merged-{seed}"


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"encoder.layers.0.fc1": 2, "q_proj": 3}, "alpha_pattern": {"fc1": 5}},
    "embedding and convolution": {"target_modules": ["embed_tokens", "conv2", "v_proj"]},
    "whole modules": {"modules_to_save": ["layer_norm"]},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_an_adapter_is_the_checkpoint_that_peft_makes_of_it(
    settings: dict[str, Any], tiny_whisper: Path, tmp_path: Path
) -> None:
    adapter, merged = adapted(tiny_whisper, tmp_path, **settings)
    results = {}
    for method, parameters in {
        "task_arithmetic": {},
        "ties": {"density": 0.5},
        "lors": {"rank": 2, "density": 0.1},
        "svp": {"rank": 7},
    }.items():
        for kind, path in (("factors", adapter), ("full", merged)):
            experts = {"x": path, "ca": tiny_whisper / "ca"}
            report = lors.merge(
                tiny_whisper / "base",
                experts,
                tmp_path / "out",
                method,
                lam=0.9,
                force=True,
                durable=False,
                **parameters,
            )
            results[kind] = whispers.load(tmp_path / "out")
        base = whispers.load(tiny_whisper / "base")
        for name, want in results["full"].items():
            update = np.linalg.norm(want - base[name])
            assert np.linalg.norm(results["factors"][name] - want) <= 1e-3 * update + 1e-6 * np.linalg.norm(want), (
                method,
                name,
            )
        if method == "lors":
            assert report.svd_methods["factors"] == 0 and report.decomposed


def test_the_svd_of_an_adapter_is_taken_from_its_factors(tiny_whisper: Path, tmp_path: Path) -> None:
    adapter, _ = adapted(tiny_whisper, tmp_path)
    report = lors.merge(tiny_whisper / "base", {"x": adapter}, tmp_path / "out", "svp", rank=4, lam=1.0, durable=False)
    assert set(report.svd_methods) == {"factors"} and report.bytes_written
    rng = np.random.default_rng(0)
    factors = Factors(rng.standard_normal((50, 6)).astype(np.float32), rng.standard_normal((40, 6)).astype(np.float32))
    u, sigma, vh = np.linalg.svd(factors.matrix().astype(np.float64))
    low, remaining = factors.split(2)
    want = (u[:, :2] * sigma[:2]) @ vh[:2]
    assert np.linalg.norm(low.matrix() - want) <= 1e-6 * np.linalg.norm(want)
    assert np.linalg.norm(low.matrix() + remaining.matrix() - factors.matrix()) <= 1e-6 * np.linalg.norm(want)
    np.testing.assert_allclose(factors.sigma(), sigma[:6], rtol=1e-5)
    assert (factors.flat(37, 1203) == factors.matrix().ravel()[37:1203]).all()


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        *(("tsv", {}), ("iso_c", {}), ("iso_cts", {}), ("tsv", {"boost": 0.3})),
        *(("task_arithmetic", {"boost": 0.3}), ("svp", {"rank": 4, "boost_merged": 0.3}), ("ties", {"boost": 0.3})),
    ],
)
def test_an_adapter_has_no_directions_but_those_of_its_factors(
    method: str, settings: dict[str, Any], tiny_whisper: Path, tmp_path: Path
) -> None:
    """What rounding adds to base + B @ A would count as much as they do."""
    adapter, _ = adapted(tiny_whisper, tmp_path)
    lors.merge(tiny_whisper / "base", {"x": adapter}, tmp_path / "out", method, durable=False, **settings)
    name = "model.encoder.layers.0.fc1.weight"
    base, merged = whispers.load(tiny_whisper / "base")[name], whispers.load(tmp_path / "out")[name]
    sigma = np.linalg.svd(merged.astype(np.float64) - base, compute_uv=False)
    assert sigma[3] > 1e3 * sigma[4], "rank 4"


def edited(change: Callable[[dict[str, Any], whispers.State], None]) -> Callable[[Path], None]:
    def apply(adapter: Path) -> None:
        from safetensors.numpy import load_file, save_file

        config, state = (
            json.loads((adapter / "adapter_config.json").read_text()),
            load_file(adapter / "adapter_model.safetensors"),
        )
        change(config, state)
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        save_file(state, adapter / "adapter_model.safetensors")

    return apply


def first(state: whispers.State, part: str = "lora_A") -> str:
    return next(key for key in state if part in key)


BAD: dict[str, tuple[Callable[[dict[str, Any], whispers.State], Any], str]] = {
    "DoRA": (lambda c, s: c.update(use_dora=True), "x: DoRA is not supported"),
    "IA3": (lambda c, s: c.update(peft_type="IA3"), "x: expected a LoRA adapter, got peft_type IA3"),
    "rank": (lambda c, s: c.update(r=9), "expected rank 9 by its configuration, got 4"),
    "pattern": (lambda c, s: c.update(rank_pattern={"fc1": 3}), "fc1': expected rank 3 by its configuration, got 4"),
    "name": (lambda c, s: s.update({"base_model.model.other.lora_A.weight": s.pop(first(s))}), "lora_A and lora_B, got|another base"),
    "base": (lambda c, s: s.update({k: np.zeros((4, 99), np.float32) for k in s if "lora_A" in k}), "x: an adapter of another base .*expected a delta"),
    "half": (lambda c, s: s.pop(first(s)), "expected lora_A and lora_B, got lora_B"),
    "magnitude": (lambda c, s: s.update({first(s).replace("lora_A", "lora_magnitude_vector"): np.ones(4, np.float32)}), "no other part of an adapter"),
}  # fmt: skip


@pytest.mark.parametrize("change,message", BAD.values(), ids=BAD)
def test_bad_adapters(change: Any, message: str, tiny_whisper: Path, tmp_path: Path) -> None:
    adapter, _ = adapted(tiny_whisper, tmp_path)
    edited(change)(adapter)
    with pytest.raises(LorsError, match=message):
        lors.merge(tiny_whisper / "base", {"x": adapter}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_no_base(tiny_whisper: Path, tmp_path: Path) -> None:
    adapter, _ = adapted(tiny_whisper, tmp_path)
    with pytest.raises(LorsError, match="base: expected a full checkpoint as the base, got a PEFT adapter"):
        lors.merge(adapter, {"x": tiny_whisper / "ca"}, tmp_path / "out")


# --- PEFT's functions ------------------------------------------------------------------------------------------------


def test_accelerate_changes_nothing_but_speed_and_restores() -> None:
    from peft.tuners.lora import model as lora_model

    torch.manual_seed(0)
    tasks = [torch.randn(30, 40) for _ in range(3)]
    weights = torch.tensor([1.0, 0.5, -0.7])

    def outputs() -> list[Any]:
        torch.manual_seed(1)  # dare draws from torch's generator
        return [
            merge_utils.prune(tasks[0], 0.3, "magnitude"),
            merge_utils.magnitude_prune(tasks, weights, 0.2),
            merge_utils.magnitude_prune(tasks, weights, 0.0),
            lora_model.ties(tasks, weights, 0.2),
            lora_model.ties(tasks, weights, 0.2, "frequency"),
            lora_model.dare_ties(tasks, weights, 0.4),
            lora_model.dare_linear(tasks, weights, 0.4),
        ]

    original, before = merge_utils.magnitude_based_pruning, outputs()
    with bridge.accelerate():
        assert merge_utils.magnitude_based_pruning is not original
        after = outputs()
        with pytest.raises(LorsError, match="peft: accelerate was called twice"):
            bridge.accelerate()
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert merge_utils.magnitude_based_pruning is original
    with pytest.raises(LorsError, match="peft: restore was called without accelerate"):
        bridge.restore()


# --- adapters merged at the level of B @ A ---------------------------------------------------------------------------


@pytest.fixture
def two_adapters(tiny_whisper: Path) -> Any:
    settings = {"lora_alpha": 8, "init_lora_weights": False}
    model = peft.get_peft_model(
        model_of(tiny_whisper), peft.LoraConfig(r=4, target_modules=["q_proj"], **settings), "ca"
    )
    model.add_adapter("de", peft.LoraConfig(r=3, target_modules=["q_proj", "fc1"], **settings))
    return model


def deltas(model: Any, name: str) -> dict[str, np.ndarray]:
    from peft.tuners.lora import LoraLayer

    return {
        path: module.get_delta_weight(name).detach().numpy()
        for path, module in model.base_model.model.named_modules()
        if isinstance(module, LoraLayer) and name in module.lora_A
    }


def test_add_lors_adapter_without_sparse_part_is_exact(two_adapters: Any) -> None:
    bridge.add_lors_adapter(two_adapters, ["ca", "de"], [1.0, -0.5], "both", rank=2)
    ca, de, both = (deltas(two_adapters, name) for name in ("ca", "de", "both"))
    assert both.keys() == ca.keys() | de.keys()
    for path, got in both.items():
        want = np.zeros(got.shape)
        for weight, part in ((1.0, ca), (-0.5, de)):
            if path in part:
                u, s, vh = np.linalg.svd(part[path].astype(np.float64))
                want += weight * (u[:, :2] * s[:2]) @ vh[:2]
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want), path
    two_adapters.set_adapter("both")
    assert two_adapters.peft_config["both"].r == 4


def test_add_lors_adapter_with_sparse_part_is_the_best_of_its_rank(two_adapters: Any) -> None:
    bridge.add_lors_adapter(two_adapters, ["ca"], [2.0], "pruned", rank=2, density=0.1, adapter_rank=5)
    for path, delta in deltas(two_adapters, "ca").items():
        whole = 2.0 * lors_delta(delta)
        u, s, vh = np.linalg.svd(whole.astype(np.float64))
        want = (u[:, :5] * s[:5]) @ vh[:5]
        got = deltas(two_adapters, "pruned")[path]
        assert np.linalg.norm(got - want) <= 1e-3 * np.linalg.norm(want), path


def lors_delta(delta: np.ndarray) -> np.ndarray:
    import lors_kernels

    return lors_kernels.lors_delta(delta, 2, 0.1)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((["ca", "dee"], [1, 1], "n"), "unknown adapter 'dee', did you mean 'de'"),
        ((["ca", "de"], [1], "n"), "expected as many of both, got 2 and 1"),
        (([], [], "n"), "expected as many of both, got 0 and 0"),
        ((["ca"], [1], "de"), "'de' is already an adapter"),
        ((["ca"], [1], "n", 0), "rank: expected at least 1"),
        ((["ca"], [1], "n", 1, 1.5), r"density: expected a number in \[0, 1\]"),
        ((["ca"], [1], "n", 1, 0.0, 0), "adapter_rank: expected at least 1"),
        ((["ca"], [float("nan")], "n"), r"weights: expected finite numbers, got \[nan\]"),
    ],
)
def test_add_lors_adapter_refuses(arguments: Any, message: str, two_adapters: Any) -> None:
    with pytest.raises(LorsError, match=message):
        bridge.add_lors_adapter(
            two_adapters, *arguments[:5], **dict(zip(["adapter_rank"], arguments[5:], strict=False))
        )
    assert set(two_adapters.peft_config) == {"ca", "de"}


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"use_dora": True}, "'odd': expected a plain LoRA, got DoRA"),
        ({"lora_bias": True}, "'odd': expected a plain LoRA, got a LoRA with biases of its own"),
        ({"modules_to_save": ["layer_norm"]}, "'odd': expected a plain LoRA, got one with whole modules"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens: expected LoRA on linear layers, got Embedding"),
    ],
)
def test_add_lors_adapter_loses_nothing_silently(settings: dict[str, Any], message: str, tiny_whisper: Path) -> None:
    model = peft.get_peft_model(model_of(tiny_whisper), peft.LoraConfig(r=2, target_modules=["q_proj"]), "ca")
    model.add_adapter("odd", peft.LoraConfig(**{"r": 2, "target_modules": ["fc1"]} | settings))
    with pytest.raises(LorsError, match=message):
        bridge.add_lors_adapter(model, ["ca", "odd"], [1.0, 1.0], "both")
    assert set(model.peft_config) == {"ca", "odd"}
    with pytest.raises(LorsError, match="model: expected a PEFT model with adapters, got Whisper"):
        bridge.add_lors_adapter(model_of(tiny_whisper), ["ca"], [1.0], "both")


def test_add_lors_adapter_of_rslora_and_of_lambda_like_weights(tiny_whisper: Path) -> None:
    settings = {"target_modules": ["q_proj"], "init_lora_weights": False, "lora_alpha": 6}
    model = peft.get_peft_model(model_of(tiny_whisper), peft.LoraConfig(r=4, use_rslora=True, **settings), "ca")
    bridge.add_lors_adapter(model, ["ca"], [0.2], "scaled", rank=9)
    for path, delta in deltas(model, "ca").items():
        np.testing.assert_allclose(deltas(model, "scaled")[path], 0.2 * delta, atol=1e-6 * np.abs(delta).max())
