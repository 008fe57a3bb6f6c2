"""Statistics of what experts read: right against a few lines of torch, and what RegMean++ makes of them is what a merge makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lors
from lors import LorsError
from lors.checkpoints.reader import open_checkpoint
from lors.cli.app import COMMANDS
from lors.experts.statistics import KEY, read_statistics
from lors.speech import calibration
from lors.speech.calibration import Reading, calibrate, keys_of
from lors.speech.model.whisper import SHIPPED, load_model

EXPERTS = {"ca": str(SHIPPED["tiny"]), "de": str(SHIPPED["tiny-early"])}
LANGUAGES = {"ca": "ca", "de": "de"}


def made(out: Path, recordings: Path, **options: Any) -> dict[str, Path]:
    return calibrate("tiny", EXPERTS, out, data=str(recordings), languages=LANGUAGES, split="dev", limit=2, **options)


def seen(model: Any, names: list[str]) -> dict[str, list[torch.Tensor]]:
    """Fills up with the inputs of modules as the model runs."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, arguments, name=name: found[name].append(arguments[0].clone()))
    return found


def test_statistics_are_the_means_of_what_is_read(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs: dict[str, Any] = {}

    def watching(source: str, **options: Any) -> Any:
        model = load_model(source, **options)
        inputs[source] = seen(model, list(keys_of(model)))
        return model

    monkeypatch.setattr(calibration, "load_model", watching)
    for name, path in made(tmp_path / "stats", recordings).items():
        model = load_model(EXPERTS[name])
        for module, key in keys_of(model).items():
            rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs[EXPERTS[name]][module]]).double()
            weight = model.get_submodule(module).weight
            got = read_statistics(str(path), f"{module}.weight", tuple(weight.shape))
            want = (rows.T @ rows / len(rows)).numpy()
            scale = np.sqrt(np.diagonal(want))
            assert (np.abs(got - want) <= 2.0**-11 * np.outer(scale, scale) + 1e-5 * want.max()).all(), (module, key)
    stored = {f"{key}:lower" for key in keys_of(load_model("tiny")).values()}
    with open_checkpoint(path) as file:
        assert stored < file.tensors.keys() and json.loads(file.metadata[KEY])["data"] == "2 utterances of de"


def test_a_merge_from_statistics_of_regmean_plus_plus_is_its_merge(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[str, Any] = {}
    in_turn = Reading.in_turn
    monkeypatch.setattr(Reading, "in_turn", lambda self, models: (held.update(models), in_turn(self, models))[1])
    paths = made(tmp_path / "plus", recordings, plus=True)
    plain = made(tmp_path / "plain", recordings)
    base, ca, de = (load_model(source).state_dict() for source in ("tiny", *EXPERTS.values()))
    merged = {
        kind: lors.merge_state_dicts(
            base, {"ca": ca, "de": de}, "regmean", statistics={name: str(path) for name, path in files.items()}
        )
        for kind, files in (("plus", paths), ("plain", plain))
    }
    first, second = held["ca"].state_dict(), held["de"].state_dict()
    apart = 0.0
    for name, want in first.items():
        assert torch.equal(want, second[name]), name
        moved = (de[name] - ca[name]).norm()
        assert (merged["plus"][name] - want).norm() <= 0.02 * moved + 1e-6, name  # float16 correlations
        apart = max(apart, float((merged["plain"][name] - want).norm() / (moved + 1e-9)))
    assert apart > 0.05, "through merged layers another model comes out"


def test_the_command(tmp_path: Path, recordings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from lors.cli.app import application

    app = application(["calibrate"])

    line = [
        "calibrate",
        "tiny",
        f"ca={EXPERTS['ca']}",
        f"x={EXPERTS['de']}",
        "--data",
        str(recordings),
        "--device",
        "cpu",
    ]
    line += ["--language", "x=de", "--limit", "1", "--split", "dev", "-o", str(tmp_path / "s")]
    said = CliRunner().invoke(app, line)
    assert said.exit_code == 0, said.output
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["ca.stats.safetensors", "x.stats.safetensors"]
    with pytest.raises(LorsError, match="exists already; --force replaces it"):
        CliRunner().invoke(app, line, catch_exceptions=False)
    (tmp_path / "s" / "ca.stats.safetensors").write_text("mine")
    with pytest.raises(LorsError, match="a file of statistics"):
        CliRunner().invoke(app, [*line, "--force"], catch_exceptions=False)
    assert (tmp_path / "s" / "ca.stats.safetensors").read_text() == "mine"
    with pytest.raises(LorsError, match="--language: expected one of the experts ca, x, got 'y'"):
        CliRunner().invoke(app, [*line, "--language", "y=de"], catch_exceptions=False)
    assert "calibrate" in COMMANDS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensor": "model.encoder.layers.9.fc1.weight"}, "expected statistics of tensor"),
        ({"shape": (128, 64)}, "expected 64 values for tensor"),
        ({"path": "nowhere"}, "nowhere: expected a file of statistics, there is none"),
        ({"path": str(SHIPPED["tiny"] / "model.safetensors")}, "expected statistics, as `lors calibrate` writes them"),
    ],
)
def test_statistics_that_are_not_there(
    change: dict[str, Any], message: str, tmp_path_factory: pytest.TempPathFactory, recordings: Path
) -> None:
    path = made(tmp_path_factory.mktemp("s") / "s", recordings)["ca"]
    asked: dict[str, Any] = {"path": str(path), "tensor": "model.encoder.layers.0.fc1.weight", "shape": (512, 128)}
    with pytest.raises(LorsError, match=message):
        read_statistics(**(asked | change))
