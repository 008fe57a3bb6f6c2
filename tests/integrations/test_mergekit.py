"""The bridge to mergekit, in mergekit itself: its command on real files, its registry, its selection before and after."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import lors.integrations.mergekit as bridge
import whispers
from helpers import module
from lors import LorsError
from lors.merging.on_disk import merge_recipe
from lors.methods import SPECS
from lors.recipes.recipe import Recipe

module("mergekit", "peers")
from mergekit import sparsify
from mergekit.architecture.json_definitions import NAME_TO_ARCH
from mergekit.merge_methods import registry


@pytest.fixture
def registered() -> Iterator[None]:
    bridge.register()
    yield
    bridge.unregister()


def state_of_mergekit() -> tuple[Any, ...]:
    whispers_ = NAME_TO_ARCH["WhisperForConditionalGeneration"]
    return (
        [(a.modules["decoder"].weight_prefix, list(a.tagalong_files)) for a in whispers_],
        set(registry._METHODS),
        sparsify.magnitude,
        sparsify.magnitude_outliers,
    )


def test_register_and_unregister_leave_mergekit_as_it_was() -> None:
    before = state_of_mergekit()
    bridge.register()
    assert all(name in registry._METHODS for name in bridge.METHODS)
    assert all(prefix == "model.decoder." for prefix, _ in state_of_mergekit()[0])
    with pytest.raises(LorsError, match="register was called twice"):
        bridge.register()
    bridge.unregister()
    assert state_of_mergekit() == before
    with pytest.raises(LorsError, match="unregister was called without register"):
        bridge.unregister()


def test_accelerate_and_restore() -> None:
    before = state_of_mergekit()
    bridge.accelerate()
    assert sparsify.magnitude is not before[2] and sparsify.magnitude_outliers is not before[3]
    with pytest.raises(LorsError, match="mergekit: accelerate was called twice"):
        bridge.accelerate()
    bridge.restore()
    assert state_of_mergekit() == before
    with pytest.raises(LorsError, match="mergekit: restore was called without accelerate"):
        bridge.restore()
    with pytest.raises(RuntimeError), bridge.accelerate():
        raise RuntimeError
    assert state_of_mergekit() == before


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("shape", [(50, 70), (333,), (6, 5, 4), ()])
def test_selection_is_unchanged(dtype: str, shape: tuple[int, ...]) -> None:
    """Bit for bit, on magnitudes that all differ; where equal ones meet, mergekit's sort leaves the choice open."""
    import torch

    rng = np.random.default_rng(0)
    size = int(np.prod(shape))
    signs = rng.choice([-1.0, 1.0], size)
    steps = np.linspace(1, 2, size) if dtype in ("float32", "float64") else None
    values = rng.permutation(steps if steps is not None else (np.arange(1, size + 1) % 250 + 1.0) / 256) * signs
    tensor = torch.tensor(values, dtype=getattr(torch, dtype)).reshape(shape)
    calls = [
        (function, (tensor, density, norm), extra)
        for function, extra in (("magnitude", {}), ("magnitude_outliers", {"gamma": 0.1}))
        for density in (0.0, 0.001, 0.3, 0.95, 1.0)
        for norm in (None, sparsify.RescaleNorm.l1)
    ]
    before = [getattr(sparsify, name)(*args, **extra) for name, args, extra in calls]
    with bridge.accelerate():
        after = [getattr(sparsify, name)(*args, **extra) for name, args, extra in calls]
    for old, new, call in zip(before, after, calls, strict=True):
        assert old.dtype == new.dtype and old.shape == new.shape
        if steps is None:  # equal magnitudes: the same multiset of them is kept
            old, new = old.abs().flatten().sort().values, new.abs().flatten().sort().values
        assert torch.equal(old, new), call


def test_what_has_no_kernel_takes_mergekits_way() -> None:
    import torch

    with bridge.accelerate():
        nan = torch.tensor([1.0, float("nan"), 3.0, 4.0])
        assert torch.isnan(sparsify.magnitude(nan, 0.5)).any()
        learned = torch.arange(1.0, 9.0, requires_grad=True)
        sparsify.magnitude(learned, 0.5).sum().backward()
        assert learned.grad is not None and learned.grad.sum() == 4


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.5, "normalize": True},
    "task_arithmetic": {"weight": 0.4, "lambda": 0.9},
    "ties": {"weight": [0.2, 1.0], "density": [{"filter": "fc1", "value": 0.5}, {"value": 0.3}]},
    "breadcrumbs": {"weight": 1.0, "density": 0.6, "gamma": 0.05, "int8_mask": True},
    "model_stock": {},
    "lors": {"rank": 3, "density": 0.2, "weight": 1.0},
    "breadcrumbs_ties": {"weight": 0.7, "density": 0.5, "gamma": 0.1, "normalize": True},
    "slerp": {"t": [{"filter": "self_attn", "value": [0.1, 0.9]}, {"value": 0.4}]},
    "svp": {"rank": 2, "weight": [0.2, 1.0], "lambda": 0.6, "rest_lambda": [0.1, 0.5]},
    "magnitude_prune": {"density": [{"filter": "fc1", "value": 0.5}, {"value": 0.1}]},
    "tsv": {"lambda": 0.5, "rest_lambda": 0.7},
    "iso_c": {"lambda": 0.5},
    "iso_cts": {"common": 0.5},
    "wudi": {"ridge": 0.5, "towards": "mean"},
}


@pytest.mark.parametrize("method", CONFIGURATIONS)
def test_the_same_yaml_in_mergekits_command_and_ours(method: str, tiny_whisper: Path, tmp_path: Path) -> None:
    names = ("base", "ca") if method == "slerp" else ("ca", "de", "es")
    document = {
        "merge_method": method,
        "base_model": str(tiny_whisper / "base"),  # not listed: an input more for `linear`, as mergekit has it
        "models": [{"model": str(tiny_whisper / name)} for name in names],
        "parameters": CONFIGURATIONS[method],
        "dtype": "float32",
    }
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(document))
    before = state_of_mergekit()
    bridge.mergekit_yaml([str(tmp_path / "merge.yml"), str(tmp_path / "theirs"), "--quiet"])
    assert state_of_mergekit() == before
    merge_recipe(Recipe.load(tmp_path / "merge.yml", SPECS), tmp_path / "ours", durable=False)
    base, theirs, ours = (
        whispers.load(path) for path in (tiny_whisper / "base", tmp_path / "theirs", tmp_path / "ours")
    )
    assert theirs.keys() == ours.keys() == base.keys()
    for name, want in theirs.items():
        assert np.linalg.norm(ours[name] - want) <= 1e-6 * np.linalg.norm(want), name
        assert (want != base[name]).any(), name
    for file in bridge.PROCESSOR_FILES:
        assert (tmp_path / "theirs" / file).exists() == (tiny_whisper / "base" / file).exists(), file


def test_methods_in_the_registry_on_tensors(registered: None) -> None:
    """Projections are decomposed, everything else is added; both as our own engine does it."""
    import torch
    from mergekit.merge_methods import merge_state_dicts

    import lors

    torch.manual_seed(0)
    base = {"model.layers.0.self_attn.q_proj.weight": torch.randn(40, 32), "model.norm.weight": torch.randn(32)}
    experts = {n: {k: v + 0.1 * torch.randn_like(v) for k, v in base.items()} for n in ("x", "y")}
    for method in bridge.METHODS:
        parameters: dict[str, Any] = {"weight": {"x": 1.0, "y": 0.5}}
        theirs = merge_state_dicts({"base": base, **experts}, method, base="base", parameters=parameters)
        ours = lors.merge_state_dicts(base, experts, method, config={"model_type": "llama"}, **parameters)
        for name in base:
            assert torch.allclose(theirs[name], ours[name], atol=1e-6), (method, name)


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        ("merge_method: nosuch\nbase_model: BASE\nmodels: [{model: BASE}]\ndtype: float32\n", "r.yml out", "nosuch"),
        (
            "merge_method: lors\nmodels:\n\t- model: x\n",
            "r.yml out",
            "found character '\\t' that cannot start any token",
        ),
        ("", "nowhere.yml out", "mergekit: [Errno 2] No such file or directory: 'nowhere.yml'"),
        ("", "r.yml out --no-such-flag", "lors mergekit-yaml: unknown option --no-such-flag"),
        ("", "", "lors mergekit-yaml: missing argument CONFIG_FILE"),
    ],
)
def test_the_command_hands_everything_to_mergekit_and_says_in_one_line_what_it_refuses(
    text: str, arguments: str, said: str, tiny_whisper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from lors.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yml").write_text(text.replace("BASE", str(tiny_whisper / "base")))
    monkeypatch.setattr("sys.argv", ["lors", "mergekit-yaml", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    line = capfd.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and line.startswith("error: ") and said in line, line
