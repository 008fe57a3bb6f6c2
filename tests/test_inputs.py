"""What is read: inputs that change meanwhile end the work, and what they lack or have in common is said."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

import lors
import whispers
from lors import LorsError
from lors.checkpoint import Checkpoint
from lors.inspect import inspect_command
from lors.interference import interference
from lors.ledger import edit
from lors.merging import merge_in_memory
from lors.task_vector import decompose

Family = dict[str, Path]
EXPERTS = ("ca", "de")


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return tiny.family(tmp_path / "models", EXPERTS)


def experts(family: Family) -> dict[str, Path]:
    return {name: family[name] for name in EXPERTS}


# --- inputs that change while they are read


def replaced(path: Path) -> None:
    """Another file of the same size under the name."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    other.replace(path)


def rewritten(path: Path) -> None:
    """Written to in place and given back its old time."""
    status = path.stat()
    with path.open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\0\0\0\0")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def removed(path: Path) -> None:
    path.unlink()


def gone(path: Path) -> None:
    """With all that is around it."""
    shutil.rmtree(path.parent)


def added(path: Path) -> None:
    path.with_name("tokenizer.json").write_text("{}")


CHANGES: list[tuple[Callable[[Path], None], str, str]] = [
    (replaced, "ca/model.safetensors", "ca/model.safetensors: changed while it was being read"),
    (rewritten, "ca/model.safetensors", "ca/model.safetensors: changed while it was being read"),
    (rewritten, "base/model.safetensors", "base/model.safetensors: changed while it was being read"),
    (rewritten, "base/config.json", "base/config.json: changed while it was being read"),
    (removed, "base/config.json", "base/config.json: was removed while it was being read"),
    (gone, "base/config.json", "base/.*: was removed while it was being read"),
    (added, "base/config.json", "base/tokenizer.json: appeared while base was being read"),
]


def during_reading(monkeypatch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
    """Calls `change` once, when the first large matrix is read: everything is open by then."""
    honest, waiting = Checkpoint.read, [change]

    def read(self: Checkpoint, name: str, *args: Any) -> Any:
        if ".fc1." in name and waiting:
            waiting.pop()()
        return honest(self, name, *args)

    monkeypatch.setattr(Checkpoint, "read", read)


@pytest.mark.parametrize(("change", "which", "message"), CHANGES)
def test_a_merge_ends_when_an_input_changes(
    change: Callable[[Path], None], which: str, message: str, family: Family, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    during_reading(monkeypatch, lambda: change(tmp_path / "models" / which))
    with pytest.raises(LorsError, match=message):
        lors.merge(family["base"], experts(family), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def _in_memory(family: Family, tmp_path: Path) -> None:
    merge_in_memory(family["base"], experts(family))


def _decompose(family: Family, tmp_path: Path) -> None:
    decompose(family["base"], family["ca"], tmp_path / "ca.lors.safetensors")


def _interference(family: Family, tmp_path: Path) -> None:
    interference(family["base"], experts(family))


def _inspect(family: Family, tmp_path: Path) -> None:
    inspect_command(str(family["ca"]), str(family["base"]), rank=2, top=2, match=None, plot=None, as_json=True)


@pytest.mark.parametrize("work", [_in_memory, _decompose, _interference, _inspect])
def test_everything_that_reads_ends_when_an_input_changes(
    work: Callable[[Family, Path], None], family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    during_reading(monkeypatch, lambda: replaced(family["ca"] / "model.safetensors"))
    with pytest.raises(LorsError, match="ca/model.safetensors: changed while it was being read"):
        work(family, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


@pytest.mark.parametrize("which", ["file", "model"])
@pytest.mark.parametrize("remove", [False, True])
def test_an_edit_ends_when_an_input_changes(
    which: str, remove: bool, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, merged = tmp_path / "de.lors.safetensors", tmp_path / "out"
    decompose(family["base"], family["de"], file, name="de")
    lors.merge(family["base"], experts(family) if remove else {"ca": family["ca"]}, merged)
    before = {path.name: path.read_bytes() for path in merged.iterdir()}
    changed = file if which == "file" else merged / "model.safetensors"
    during_reading(monkeypatch, lambda: os.utime(changed))
    with pytest.raises(LorsError, match=f"{changed.name}: changed while it was being read"):
        edit(merged, file, remove=remove)
    assert before == {path.name: path.read_bytes() for path in merged.iterdir()}


def test_the_check_of_a_merge_reads_what_was_merged(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between writing and checking an expert is replaced: that is said, and not that the result is wrong."""
    from lors import verify
    from lors.merging import merge_recipe
    from lors.methods import SPECS
    from lors.recipe import Recipe

    recipe = Recipe.from_arguments(family["base"], experts(family), methods=SPECS, lam=1.0)
    merge_recipe(recipe, tmp_path / "out")
    during_reading(monkeypatch, lambda: replaced(family["ca"] / "model.safetensors"))
    with pytest.raises(LorsError, match="ca/model.safetensors: changed while it was being read"):
        verify.verify(recipe, tmp_path / "out")


def test_what_others_may_do_meanwhile(family: Family, tmp_path: Path) -> None:
    with lors.open_checkpoint(family["base"]) as checkpoint:
        (family["base"] / "model.safetensors").read_bytes()
        (family["base"] / "notes.txt").write_text("mine")
        checkpoint.require_unchanged()


# --- openai-whisper


def test_a_merged_openai_checkpoint_is_read_again(tiny_whisper: Path, tmp_path: Path) -> None:
    """--check, inspect, add, remove, and as the base of the next merge: its directory holds a model.pt."""
    dims = {"n_mels": 80, "n_audio_state": 64}
    paths = {
        name: whispers.save_openai(whispers.load(tiny_whisper / name), tmp_path / f"{name}.pt", dims)
        for name in ("base", "ca", "de")
    }
    out, file = tmp_path / "out", tmp_path / "de.lors.safetensors"
    report = lors.merge(paths["base"], {"ca": paths["ca"]}, out, check=True)
    assert "compared with the reference" in report.notices[-1]
    decompose(paths["base"], paths["de"], file, name="de", values="float32", remainder="float32")
    edit(out, file)
    lors.merge(paths["base"], {"ca": paths["ca"], "de": file}, tmp_path / "both")
    with lors.open_checkpoint(out) as edited, lors.open_checkpoint(tmp_path / "both") as both:
        assert edited.naming == "openai-whisper" and edited.dims == dims and edited.name == "out"
        assert all(edited.read(name).tobytes() == both.read(name).tobytes() for name in both.tensors)
    edit(out, file, remove=True)
    lors.merge(out, {"de": paths["de"]}, tmp_path / "next", check=True)
    inspect_command(str(out), str(paths["base"]), rank=2, top=2, match="mlp", plot=None, as_json=True)


# --- what a merged model needs beside its weights

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def stripped(source: Path, target: Path, *names: str) -> Path:
    """A copy of a checkpoint without these files."""
    shutil.copytree(source, target)
    for name in names:
        (target / name).unlink()
    return target


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("a configuration", ("config.json",)),
        ("generation settings", ("generation_config.json",)),
        ("a feature extractor", ("processor_config.json",)),
        ("a tokenizer", TOKENIZER),
        ("a tokenizer", ("tokenizer.json",)),  # what is left of it does not go with another one
    ],
)
def test_what_the_base_lacks_comes_from_an_expert(
    part: str, names: tuple[str, ...], tiny_whisper: Path, tmp_path: Path
) -> None:
    base = stripped(tiny_whisper / "base", tmp_path / "base", *names)
    ca = stripped(tiny_whisper / "ca", tmp_path / "ca", *names)
    de = stripped(tiny_whisper / "de", tmp_path / "de")
    for path in de.glob("*.json"):
        path.write_text(path.read_text() + "\n")  # told apart from the base's
    experts = {"ca": ca, "de": de}
    report = lors.merge(base, experts, tmp_path / "out")
    assert any(note.startswith(f"base lacks {part} (") and "that of de is taken" in note for note in report.notices)
    for name in names if "tokenizer.json" not in names else TOKENIZER:
        assert (tmp_path / "out" / name).read_bytes() == (de / name).read_bytes()
    assert not lors.merge(tiny_whisper / "base", {"ca": ca}, tmp_path / "whole").notices


def test_what_no_input_has_is_said(tiny_whisper: Path, tmp_path: Path) -> None:
    base = stripped(tiny_whisper / "base", tmp_path / "base", *TOKENIZER, "generation_config.json")
    ca = stripped(tiny_whisper / "ca", tmp_path / "ca", *TOKENIZER, "generation_config.json")
    (note,) = lors.merge(base, {"ca": ca}, tmp_path / "out").notices
    assert "no input has generation settings" in note and "a tokenizer" in note and "extractor" not in note


@pytest.mark.parametrize("bare", [False, True])
def test_without_any_configuration_nothing_is_merged(bare: bool, tiny_whisper: Path, tmp_path: Path) -> None:
    base, ca = (stripped(tiny_whisper / name, tmp_path / name, "config.json") for name in ("base", "ca"))
    if bare:
        base, ca = base / "model.safetensors", ca / "model.safetensors"
    with pytest.raises(LorsError, match="expected config.json beside the weights of the base or of an expert"):
        lors.merge(base, {"ca": ca}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bare_file_gets_everything_from_an_expert(tiny_whisper: Path, tmp_path: Path) -> None:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    bare = tmp_path / "base.safetensors"
    shutil.copy(tiny_whisper / "base" / "model.safetensors", bare)
    report = lors.merge(bare, {"ca": tiny_whisper / "ca"}, tmp_path / "out")
    assert len(report.notices) == 4
    model, processor = (
        kind.from_pretrained(tmp_path / "out") for kind in (WhisperForConditionalGeneration, WhisperProcessor)
    )
    assert model.generation_config.lang_to_id and len(processor.tokenizer) > 100


def test_dims_come_from_an_expert(tiny_whisper: Path, tmp_path: Path) -> None:
    import torch

    dims = {"n_mels": 80, "n_audio_state": 64}
    base, ca = (
        whispers.save_openai(whispers.load(tiny_whisper / name), tmp_path / f"{name}.pt", dims)
        for name in ("base", "ca")
    )
    torch.save(torch.load(base)["model_state_dict"], base)
    report = lors.merge(base, {"ca": ca}, tmp_path / "out", check=True)
    assert "base lacks openai-whisper's dims: those of ca are taken" in report.notices
    assert torch.load(tmp_path / "out" / "model.pt")["dims"] == dims
    torch.save(torch.load(ca)["model_state_dict"], ca)
    (note,) = lors.merge(base, {"ca": ca}, tmp_path / "none").notices
    assert "no input has openai-whisper's dims" in note and (tmp_path / "none" / "model.safetensors").exists()


def test_other_models_may_be_weights_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("base", "ca"):
        save_file({"layer.weight": rng.standard_normal((8, 8)).astype(np.float32)}, tmp_path / f"{name}.safetensors")
    files = tmp_path / "base.safetensors", {"ca": tmp_path / "ca.safetensors"}
    notices = lors.merge(*files, tmp_path / "out", rank=2).notices
    assert any("no input has a configuration (config.json): the output is weights alone" in note for note in notices)
