"""What is read: inputs that change meanwhile end the work, and what they lack or have in common is said."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

import lors
import tiny
import whispers
from helpers import module
from lors import LorsError
from lors.analysis.inspect import inspect_command
from lors.analysis.interference import interference
from lors.checkpoints.reader import Checkpoint
from lors.experts.decompose import decompose
from lors.merging import suspicions
from lors.merging.edit import edit
from lors.merging.in_memory import merge_in_memory
from lors.methods import SPECS

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
    from lors.merging import verify
    from lors.merging.on_disk import merge_recipe
    from lors.methods import SPECS
    from lors.recipes.recipe import Recipe

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


def within_a_unit(edited: np.ndarray, merged: np.ndarray) -> bool:
    """An edit starts from a model that is rounded already: the merge's value or its neighbour."""
    # a weight that crosses zero was rounded at its size before the edit
    return bool((np.abs(edited - merged) <= np.spacing(np.abs(merged)) + 1e-9).all())


def test_a_merged_openai_checkpoint_is_read_again(tiny_whisper: Path, tmp_path: Path) -> None:
    """--check, inspect, add, remove, and as the base of the next merge: its directory holds a model.pt."""
    dims = {"n_mels": 80, "n_audio_state": 64}
    paths = {
        name: whispers.save_openai(whispers.load(tiny_whisper / name), tmp_path / f"{name}.pt", dims)
        for name in ("base", "ca", "de")
    }
    out, file = tmp_path / "out", tmp_path / "de.lors.safetensors"
    report = lors.merge(paths["base"], {"ca": paths["ca"]}, out, check=True)
    assert "compared with the method's definition" in report.notices[-1]
    decompose(paths["base"], paths["de"], file, name="de", values="float32", remainder="float32")
    edit(out, file)
    lors.merge(paths["base"], {"ca": paths["ca"], "de": file}, tmp_path / "both")
    with lors.open_checkpoint(out) as edited, lors.open_checkpoint(tmp_path / "both") as both:
        assert edited.naming == "openai-whisper" and edited.dims == dims and edited.name == "out"
        assert all(within_a_unit(edited.read(name), both.read(name)) for name in both.tensors)
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


# --- the recipe in the output makes it again from anywhere


def digest(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def again(out: Path, into: Path) -> bytes:
    """What `lors merge OUT/lors_recipe.yml INTO` writes."""
    lors.merge_recipe(lors.Recipe.load(out / "lors_recipe.yml", SPECS), into)
    return digest(into)


@pytest.fixture
def work(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, models in ../models; and one that says nothing, to go to."""
    (tmp_path / "work").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_options_with_relative_paths(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lors.merge("../models/base", {"ca": "../models/ca", "de": str(tmp_path / "models/de")}, "runs/out")
    recipe = yaml.safe_load((work / "runs/out/lors_recipe.yml").read_text())
    models = [recipe["base_model"], *(entry["model"] for entry in recipe["models"])]
    assert models == ["../../../models/base", "../../../models/ca", str(tmp_path / "models/de")]
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert again(work / "runs/out", tmp_path / "again") == digest(work / "runs/out")
    assert again(tmp_path / "again", tmp_path / "deeper/still/out") == digest(work / "runs/out")


def test_a_recipe_with_relative_paths(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the recipe, in the working directory, through a link that leads elsewhere, and two with equal ends."""
    (tmp_path / "recipes").mkdir()
    shutil.copytree(tmp_path / "models/ca", tmp_path / "recipes/beside/ca")
    shutil.copytree(tmp_path / "models/de", work / "ca")
    (tmp_path / "recipes/link").symlink_to(tmp_path / "elsewhere")  # link/../models is not recipes/models
    (tmp_path / "recipes/r.yml").write_text(
        "merge_method: dare_linear\nbase_model: link/../models/base\nmodels: [{model: beside/ca}, {model: ca}]\n"
        "parameters: {density: 0.5, lambda: 1}\n"
    )
    (tmp_path / "shown").symlink_to(tmp_path / "kept/deep")
    (tmp_path / "kept").mkdir()
    recipe = lors.Recipe.load(Path("../recipes/r.yml"), SPECS)
    lors.merge_recipe(recipe, tmp_path / "shown")  # a dangling link: what it points to is written
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert lors.Recipe.load(tmp_path / "shown/lors_recipe.yml").labels == recipe.labels == ("beside-ca", "ca")
    assert again(tmp_path / "shown", tmp_path / "again") == digest(tmp_path / "kept/deep")
    assert again(tmp_path / "kept/deep", tmp_path / "again2") == digest(tmp_path / "kept/deep")


def test_hub_ids_stay_hub_ids(work: Path) -> None:
    (work / "me").mkdir()
    (work / "me/here").mkdir()
    recipe = lors.Recipe.from_arguments("openai/whisper-small@main", {"a": "me/whisper-ca", "b": "me/here", "c": "~"})
    data = recipe.to_dict(beside=work / "out")
    assert data["base_model"] == "openai/whisper-small@main"
    assert [entry["model"] for entry in data["models"]] == ["me/whisper-ca", "../me/here", "~"]


def test_a_path_that_no_recipe_can_name_is_refused_at_once(work: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"\xff")
    (tmp_path / "models").rename(odd)
    os.chdir(odd / "ca")
    with pytest.raises(LorsError, match="expected a path in UTF-8: the recipe"):
        lors.merge("../base", {"ca": "."}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_at_a_url_names_absolute_paths(work: Path, tmp_path: Path) -> None:
    fsspec = module("fsspec", "remote")
    lors.merge("../models/base", {"ca": "../models/ca"}, "memory://bucket/out")
    text = fsspec.filesystem("memory").cat_file("/bucket/out/lors_recipe.yml").decode()
    assert yaml.safe_load(text)["base_model"] == str(tmp_path / "models/base")


def test_an_added_expert_is_named_from_the_model(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lors.merge("../models/base", {"ca": "../models/ca"}, "out")
    decompose("../models/base", "../models/de", "de.lors.safetensors", name="de", values="float32", remainder="float32")
    edit("out", "de.lors.safetensors")
    monkeypatch.chdir(tmp_path / "elsewhere")
    again(work / "out", tmp_path / "again")
    with lors.open_checkpoint(work / "out") as edited, lors.open_checkpoint(tmp_path / "again") as both:
        assert all(within_a_unit(edited.read(name), both.read(name)) for name in both.tensors)


def test_a_source_that_is_nowhere_is_named_with_its_key_and_the_places(work: Path, tmp_path: Path) -> None:
    (work / "r.yml").write_text("merge_method: lors\nbase_model: ../models/base\nmodels: [{model: ../models/cat}]\n")
    with pytest.raises(LorsError) as caught:
        lors.merge_recipe(lors.Recipe.load(work / "r.yml", SPECS), "out")
    assert str(caught.value) == (
        f"{work}/r.yml: models[0].model: ../models/cat: no such file or directory; looked for in {work}, "
        "did you mean '../models/ca'?"
    )
    with pytest.raises(LorsError, match=r"^expert 'ca': /nowhere/ca: no such file or directory$"):
        lors.merge("../models/base", {"ca": "/nowhere/ca"}, "out")
    with pytest.raises(LorsError, match=rf"^base: no/where: not a file or directory here, .*; looked for in {work}$"):
        lors.merge("no/where", {"ca": "../models/ca"}, "out")


# --- what inputs hardly should have in common


def said_of(base: Path, experts: dict[str, Path], out: Path, **settings: Any) -> str:
    return " | ".join(note for note in lors.merge(base, experts, out, **settings).notices if "no input has" not in note)


def test_one_directory_under_two_names(family: Family, tmp_path: Path) -> None:
    said = said_of(family["base"], {"ca": family["ca"], "de": family["de"], "es": family["ca"]}, tmp_path / "out")
    assert said == "es has the same weights as ca: their files are equal"


@pytest.mark.parametrize("anew", [False, True])
def test_an_expert_that_is_the_base(anew: bool, family: Family, tmp_path: Path) -> None:
    shutil.copytree(family["base"], tmp_path / "copy")
    if anew:  # another header: another digest
        save_file(whispers.load(family["base"]), tmp_path / "copy/model.safetensors", {"format": "pt", "by": "x" * 9})
    said = said_of(family["base"], {"ca": family["ca"], "de": tmp_path / "copy"}, tmp_path / "out")
    assert said == "de has the same weights as the base: it adds nothing"
    with pytest.raises(LorsError, match="expert 'de': expected a model that was trained from the base, got the base"):
        lors.merge(family["base"], {"ca": family["ca"], "de": family["base"]}, tmp_path / "out2")


@pytest.mark.parametrize("names", [("ca", "de"), ("ca", "de", "es"), ("ca", "de", "es", "fr", "it")])
def test_a_base_that_was_swapped_with_an_expert(names: tuple[str, ...], tmp_path: Path) -> None:
    paths = tiny.family(tmp_path / "models", names)
    experts = {name: paths[name] for name in names}
    assert said_of(paths["base"], experts, tmp_path / "right") == ""
    swapped = experts | {"ca": paths["base"]}
    expected = "every other expert is nearer to ca than to the base: if they were trained from ca, it is the base"
    assert said_of(paths["ca"], swapped, tmp_path / "wrong") == expected
    assert said_of(paths["ca"], swapped, tmp_path / "ties", method="ties", density=0.5) == expected


def test_experts_that_are_alike_are_not_suspected(family: Family, tmp_path: Path) -> None:
    """Two of one training, and three with nine tenths of their change in common."""
    base, ca, de = (whispers.load(family[name]) for name in ("base", "ca", "de"))
    for name, share in (("a", 0.33), ("b", -0.33)):
        state = {key: base[key] + (ca[key] - base[key]) + share * (de[key] - base[key]) for key in base}
        tiny.write(tmp_path / name, state)
    assert said_of(family["base"], {"a": tmp_path / "a", "b": tmp_path / "b"}, tmp_path / "out") == ""
    half = {key: base[key] + 0.5 * (ca[key] - base[key]) for key in base}
    tiny.write(tmp_path / "half", half)
    assert said_of(family["base"], {"whole": family["ca"], "half": tmp_path / "half"}, tmp_path / "out2") == ""


def test_an_expert_called_base_is_attested_as_itself(family: Family, tmp_path: Path) -> None:
    import hashlib

    lors.merge(family["base"], {"base": family["ca"]}, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for role, name in (("base", "base"), ("expert", "ca")):
        digest = hashlib.sha256((family[name] / "model.safetensors").read_bytes()).hexdigest()
        assert any(line.startswith(f"| {role} | `base` |") and digest in line for line in card.splitlines())


def test_an_original_whisper_among_the_experts_is_noticed(family: Family) -> None:
    with lors.open_checkpoint(family["base"]) as base, lors.open_checkpoint(family["ca"]) as expert:
        hashes = {base: {"model.safetensors": "0" * 64}, expert: {"model.safetensors": "1" * 64}}
        assert suspicions.of_digests(base, [expert], hashes) == []
        expert.hub_id = "openai/whisper-small"
        (said,) = suspicions.of_digests(base, [expert], hashes)
        assert "openai/whisper-small is an original Whisper, not a fine-tuned one: is it the base?" in said


def test_an_expert_that_differs_outside_the_sample_is_not_the_base(family: Family, tmp_path: Path) -> None:
    state = {name: value.copy() for name, value in tiny.tensors(0, 0.5).items()}
    state["model.encoder.conv1.weight"][0, 0, 0] += 1  # no matrix
    expert = tiny.write(tmp_path / "nearly", state)
    assert "same weights as the base" not in said_of(family["base"], {"x": expert}, tmp_path / "out")


@pytest.mark.parametrize(
    ("gram", "center"),
    [
        ([[1.0, 1.0], [1.0, 1.5]], 0),  # trained from the first one
        ([[0.01, 0.01], [0.01, 1.0]], None),  # hardly nearer to it than to the base
        ([[1.0, 0.97], [0.97, 1.0]], None),  # each lies around the other
        ([[1.0, 0.5], [0.5, 1.0]], None),  # they share half of their change
    ],
)
def test_what_lies_around_what(gram: list[list[float]], center: int | None) -> None:
    assert suspicions._center(np.array(gram)) == center
