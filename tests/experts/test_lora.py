"""The low-rank part as an adapter that PEFT loads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import tiny
from experts import EXPERTS
from helpers import module
from lors.experts.decompose import decompose
from lors.experts.expert_source import open_expert
from lors.experts.lora import export_lora


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny.family(tmp_path_factory.mktemp("family"), EXPERTS)


def test_peft_loads_the_exported_adapter(family: dict[str, Path], tmp_path: Path) -> None:
    torch, peft = module("torch", "peers"), module("peft", "peers")
    path = decompose(family["base"], family["ca"], tmp_path / "ca.lors.safetensors", rank=0.2, density=0.0).path
    assert export_lora(path, tmp_path / "adapter", base="openai/whisper-tiny", scale=0.5) == 32
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 6 and config["base_model_name_or_path"] == "openai/whisper-tiny"

    class Projection(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, shape in tiny.shapes().items():
                if name.endswith(("proj.weight", "fc1.weight", "fc2.weight")):
                    module, parent = torch.nn.Linear(shape[1], shape[0], bias=False), self
                    *path, last = name.removesuffix(".weight").split(".")
                    for step in path:
                        if not hasattr(parent, step):
                            parent.add_module(step, torch.nn.Module())
                        parent = getattr(parent, step)
                    parent.add_module(last, module)

    model = Projection()
    name = "model.decoder.layers.1.fc2"
    before = model.get_submodule(name).weight.detach().clone()
    merged = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")).merge_and_unload()
    got = (merged.get_submodule(name).weight - before).detach().numpy()
    source = open_expert(path)
    with source.checkpoint:
        left, right = source.stored_factors(f"{name}.weight")
    assert np.allclose(got, 0.5 * left @ right.T, atol=1e-6) and np.abs(got).max() > 1e-5
