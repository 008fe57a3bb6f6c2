"""What `lors merge` takes, and what it tells of the result."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import lors
import tiny
from lors.checkpoints.hub import SHIPPED
from lors.cli import main
from lors.errors import LorsError


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.family(tmp_path_factory.mktemp("family"), ("ca", "de"))["base"].parent


def told(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr("sys.argv", ["lors", *arguments])
    main()
    return capsys.readouterr().out


def options(family: Path, *more: object) -> list[str]:
    experts = (f"--expert={name}={family / name}" for name in ("ca", "de"))
    return ["merge", "--base", str(family / "base"), *experts, *map(str, more)]


@pytest.mark.parametrize("verbose", [(), ("-v",)])
@pytest.mark.parametrize(
    ("method", "parts"), [("lors", True), ("tsv", True), ("iso_c", False), ("iso_cts", False), ("wudi", False)]
)
def test_energies_are_told_of_methods_that_have_them(
    method: str,
    parts: bool,
    verbose: tuple[str, ...],
    family: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = told(options(family, "--method", method, *verbose, tmp_path / "out"), monkeypatch, capsys)
    assert f"{method}: 2 experts, 45 tensors, 32 decomposed, " in out
    assert ("energy in L" in out or "energy of the task vectors kept" in out) is parts


def test_the_base_is_no_expert(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options(family, "--method", "linear", "--param", "weight=0.5", tmp_path / "with")
    assert "linear: 2 experts, " in told(arguments, monkeypatch, capsys)
    models = [{"model": str(family / name), "parameters": {"weight": 1}} for name in ("base", "ca", "de")]
    (tmp_path / "r.yml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    arguments = ["merge", str(tmp_path / "r.yml"), str(tmp_path / "without")]
    assert "linear: 3 experts, " in told(arguments, monkeypatch, capsys)


@pytest.mark.parametrize("option", ["-o", "--out"])
def test_out_may_be_an_option(
    option: str, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told(options(family, option, tmp_path / "a"), monkeypatch, capsys)
    told(["merge", option, str(tmp_path / "b"), str(tmp_path / "a" / "lors_recipe.yml")], monkeypatch, capsys)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_the_bases_that_come_with_lors_have_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SHIPPED["tiny"], "ca")
    state = load_file("ca/model.safetensors")
    rng = np.random.default_rng(0)
    save_file({n: v + (0.01 * rng.standard_normal(v.shape)).astype(v.dtype) for n, v in state.items()}, "ca/model.safetensors")  # fmt: skip
    told(["merge", "--base", "tiny", "--expert", "ca", "--rank", "2", "-q", "out"], monkeypatch, capsys)
    recipe = yaml.safe_load(Path("out/lors_recipe.yml").read_text())
    assert recipe["base_model"] == "tiny", "the recipe is good on every machine"
    told(["merge", "out/lors_recipe.yml", "-q", "again"], monkeypatch, capsys)
    lors.merge(SHIPPED["tiny"], {"ca": "ca"}, "by-path", rank=2)
    weights = [Path(name, "model.safetensors").read_bytes() for name in ("out", "again", "by-path")]
    assert weights[0] == weights[1] == weights[2]
    told(["decompose", "tiny", "ca", "--rank", "2", "-o", "ca.lors.safetensors"], monkeypatch, capsys)
    told(["report", "tiny", "ca", "--rank", "2", "--match", "fc1", "-o", "page.html"], monkeypatch, capsys)
    told(["inspect", "ca", "--base", "tiny", "--match", "fc1"], monkeypatch, capsys)
    Path("tiny").mkdir()
    with pytest.raises(LorsError, match=r"^tiny: .*: /.*/tiny is the latter$"):
        lors.merge("tiny", {"ca": "ca"}, "never")
    with pytest.raises(LorsError, match=r"^tiny: no weights in this directory"):
        lors.merge("./tiny", {"ca": "ca"}, "never")
