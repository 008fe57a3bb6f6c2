"""Every speech architecture of docs/models.md: what is decomposed of it, merged from files, loaded again by transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lors
from helpers import module
from lors.checkpoints import layers
from lors.checkpoints.reader import Checkpoint, open_checkpoint
from speech_models import SPEECH_MODELS, saved

transformers = module("transformers", "transformers")

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
# Linear layers inside transformer layers that hold positions or gates of positions, and no projection of what is heard.
POSITIONAL = ("gru_rel_pos_linear",)
_NUMBERED = re.compile(r"(?:^|\.)\d+(?=\.)")


def selected(checkpoint: Checkpoint) -> layers.Selection:
    return layers.select(checkpoint.tensors, checkpoint.naming, checkpoint.config)


def linear_layers(model: Any) -> set[str]:
    """Parameters that are the matrix of a Linear inside of a numbered layer that has attention: the rule, from the modules."""
    import torch

    modules = dict(model.named_modules())
    blocks = [
        name
        for name, block in modules.items()
        if _NUMBERED.search(f"{name}.")
        and name.rpartition(".")[2].isdigit()
        and any("Attention" in type(part).__name__ for part in block.modules())
    ]
    return {
        f"{name}.weight"
        for name, part in modules.items()
        if isinstance(part, torch.nn.Linear)
        and any(name.startswith(f"{block}.") for block in blocks)
        and not name.endswith(POSITIONAL)
    }


def stored_names(kind: str, directory: Path) -> dict[str, str]:
    """How transformers' file calls each parameter: every one is filled with a number of its own, and looked for there."""
    numbers: dict[int, str] = {}

    def number(model: Any) -> None:
        for place, (name, parameter) in enumerate(model.named_parameters(), start=1):
            parameter.fill_(place)
            numbers[place] = name

    saved(kind, directory, number)
    with open_checkpoint(directory) as checkpoint:
        found = {name: checkpoint.read(name, None, 0, 1) for name, info in checkpoint.tensors.items() if info.numel}
    return {name: numbers[place] for name, value in found.items() if (place := int(value.ravel()[0])) in numbers}


@pytest.mark.parametrize("kind", SPEECH_MODELS)
def test_every_projection_inside_the_layers_is_decomposed_and_nothing_else(kind: str, tmp_path: Path) -> None:
    names = stored_names(kind, tmp_path)
    wanted = linear_layers(SPEECH_MODELS[kind].build())
    with open_checkpoint(tmp_path) as checkpoint:
        chosen = selected(checkpoint)
    assert chosen.notice is None and chosen.rule != "shape"
    assert len(wanted) >= 8
    assert {names[name] for name in chosen.names} == wanted
    attention = {name for name in chosen.names if "attention" in layers.kind(name)}
    assert attention and all(layers.layer_of(name) is not None for name in chosen.names)
    assert attention == layers.attention_only(chosen.names)


@pytest.mark.parametrize("kind", SPEECH_MODELS)
def test_merged_from_files_and_loaded_by_transformers(kind: str, tmp_path: Path) -> None:
    import torch

    saved(kind, tmp_path / "base")

    def tuned(seed: int) -> Any:
        def change(model: Any) -> None:
            torch.manual_seed(seed)
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))

        return change

    for seed, label in enumerate(("a", "b"), start=1):
        saved(kind, tmp_path / label, tuned(seed))
    experts = {label: tmp_path / label for label in ("a", "b")}
    # `check` compares every tensor with the method's definition in float64: the models are small
    report = lors.merge(tmp_path / "base", experts, tmp_path / "out", rank=2, density=0.3, lam=0.5, check=True)
    with open_checkpoint(tmp_path / "base") as base:
        chosen = selected(base)
        rest = next(
            name for name in base.tensors if name not in chosen.names and "float" in str(base.tensors[name].dtype)
        )
    assert report.decomposed == len(chosen.names)
    checked = next(line for line in report.notices if line.startswith("checked"))
    assert f"{report.tensors} tensors reloaded, {report.tensors} of them compared" in checked
    with open_checkpoint(tmp_path / "out") as out, open_checkpoint(tmp_path / "base") as base:
        w0, got = base.read(rest), out.read(rest)
        deltas = []
        for label in experts:
            with open_checkpoint(tmp_path / label) as expert:
                deltas.append(expert.read(rest).astype(np.float64) - w0)
    np.testing.assert_allclose(got, w0 + 0.5 * np.sum(deltas, axis=0), rtol=1e-5, atol=1e-6)
    model, loaded = getattr(transformers, SPEECH_MODELS[kind].loads).from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"] and not loaded["mismatched_keys"]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


# --- docs/models.md --------------------------------------------------------------------------------------------------


def braced(names: set[str]) -> list[str]:
    """Names with N for numbers, those of one module together: ``encoder.layers.N.self_attn.{k_proj, q_proj}``."""
    plain = sorted({re.sub(r"(?<=\.)\d+(?=\.)", "N", name.removesuffix(".weight")) for name in names})
    parents: dict[str, list[str]] = {}
    for name in plain:
        parent, _, last = name.rpartition(".")
        parents.setdefault(parent, []).append(last)
    return [
        f"{parent}{'.' if parent else ''}{last[0] if len(last) == 1 else '{' + ', '.join(last) + '}'}"
        for parent, last in parents.items()
    ]


def row_of(kind: str, checkpoint: Checkpoint) -> str:
    """What docs/models.md says of an architecture, but for its caveats."""
    chosen = selected(checkpoint)
    matrices = {name for name, info in checkpoint.tensors.items() if len(info.shape) == 2 and name not in chosen.names}
    cells = [f"`{name}`" for name in braced(set(chosen.names))], [f"`{name}`" for name in braced(matrices)]
    return f"| `{kind}` | {SPEECH_MODELS[kind].loads} | {'<br>'.join(cells[0])} | {'<br>'.join(cells[1])} |"


@pytest.mark.parametrize("kind", SPEECH_MODELS)
def test_the_page_says_what_is_decomposed(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert row_of(kind, checkpoint) in PAGE.read_text(encoding="utf-8")
