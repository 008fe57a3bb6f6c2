"""No command removes or overwrites what neither lors nor transformers wrote."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lors
import tiny
from helpers import module, require
from lors.checkpoints.hub import SIDECARS
from lors.checkpoints.reader import open_checkpoint
from lors.cli.app import application
from lors.errors import LorsError, LorsWarning
from lors.experts.decompose import decompose
from lors.experts.lora import export_lora
from lors.files import directory, replaceable
from lors.files.directory import OutputDirectory
from lors.merging.edit import edit
from lors.merging.ledger import Ledger


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("family")
    found = tiny.family(root, ("ca", "de"))
    for name in ("ca", "de"):
        made = decompose(found["base"], found[name], root / f"{name}.lors.safetensors", name=name)
        found[f"{name}.file"] = Path(made.path)
    return found


def everything(root: Path) -> dict[str, object]:
    """Every path below `root` with what it is: a digest, a link's target, the number of names, the mode."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        kind: object = "directory"
        if stat.S_ISLNK(status.st_mode):
            kind = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            kind = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(root))] = (kind, oct(status.st_mode))
    return found


def refused(root: Path, call: Callable[[], object]) -> str:
    """The message of a refusal that left everything below `root` as it was."""
    before = everything(root)
    with pytest.raises(LorsError) as caught:
        call()
    assert everything(root) == before
    return str(caught.value)


# --- directories


def test_checkpoints_of_a_finetune_may_hold_what_a_kill_left() -> None:
    left = [
        "run.json",
        ".run.json.12-0123abcd.tmp",
        "run.12.tmp",
        "0-ca/checkpoint-3/.trainer_state.json.12-0123abcd.tmp",
    ]
    assert replaceable.objection_to(left, replaceable.CHECKPOINTS) is None
    assert replaceable.objection_to([".run.json.mine.tmp"], replaceable.CHECKPOINTS) is not None


def test_every_name_that_is_written_may_be_replaced(family: dict[str, Path], tmp_path: Path) -> None:
    lors.merge(family["base"], {"ca": family["ca"]}, tmp_path / "whole")
    lors.merge(family["base"], {"ca": family["ca"]}, tmp_path / "shards", out_shard_size="100KB")
    export_lora(family["ca.file"], tmp_path / "adapter")
    for made in tmp_path.iterdir():
        assert replaceable.objection(made) is None, made
    assert replaceable.objection_to([*SIDECARS, "model.pt", "pytorch_model.bin", "training.json"]) is None


@pytest.mark.parametrize(
    "odd",
    ["thesis.tex", ".git/HEAD", "src/main.py", "x.safetensors", "notes/", "adapter/mine.txt", "model.safetensors.bak"],
)
def test_force_names_what_is_not_its_own(family: dict[str, Path], tmp_path: Path, odd: str) -> None:
    out = tmp_path / "out"
    lors.merge(family["base"], {"ca": family["ca"]}, out)
    path = out / odd
    path.mkdir(parents=True) if odd.endswith("/") else path.parent.mkdir(exist_ok=True)
    if not odd.endswith("/"):
        path.write_text("years of work")
    message = refused(tmp_path, lambda: lors.merge(family["base"], {"de": family["de"]}, out, force=True))
    assert str(out) in message and odd.partition("/")[0] in message
    message = refused(tmp_path, lambda: export_lora(family["ca.file"], out, force=True))
    assert odd.partition("/")[0] in message


def test_force_wants_a_model(family: dict[str, Path], tmp_path: Path) -> None:
    """Names that a model's directory has too are not enough: README.md is everywhere."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("my project")
    assert "no model" in refused(
        tmp_path, lambda: lors.merge(family["base"], {"ca": family["ca"]}, tmp_path / "out", force=True)
    )


def test_a_link_named_like_a_directory_is_not_followed(family: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    lors.merge(family["base"], {"ca": family["ca"]}, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "adapter_config.json").write_text("{}")
    (out / "adapter").symlink_to(tmp_path / "mine")
    assert "adapter" in refused(tmp_path, lambda: lors.merge(family["base"], {"ca": family["ca"]}, out, force=True))


def test_an_empty_directory_needs_no_force(family: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir(mode=0o700)
    lors.merge(family["base"], {"ca": family["ca"]}, out)
    assert (out / "model.safetensors").exists() and os.listdir(tmp_path) == ["out"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o700, "what was private stays private"


def test_what_appears_while_a_merge_runs_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    with pytest.warns(LorsWarning, match="notes.txt"), OutputDirectory(out, force=True) as new:
        new.write_text("config.json", "new")
        (out / "notes.txt").write_text("written meanwhile")
        new.commit()
    (kept,) = [path for path in tmp_path.iterdir() if path != out]
    assert (out / "config.json").read_text() == "new"
    assert sorted(os.listdir(kept)) == ["config.json", "notes.txt"] and not kept.name.startswith(".")


# --- edits in place


def test_a_model_in_a_git_working_copy_survives_edits(family: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    lors.merge(family["base"], {"ca": family["ca.file"]}, out)
    git = ["git", "-C", str(out), "-c", "user.name=me", "-c", "user.email=me@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "merged"]):
        subprocess.run([*git, *command], check=True)
    (out / "eval" / "deep").mkdir(parents=True)
    (out / "eval" / "deep" / "answers.txt").write_text("hours of decoding")
    (out / "eval").chmod(0o750)
    (out / "latest").symlink_to("eval/deep")
    (out / "dangling").symlink_to("nowhere")
    (tmp_path / "elsewhere.bin").write_bytes(b"shared")
    os.link(tmp_path / "elsewhere.bin", out / "shared.bin")
    os.link(out / "eval" / "deep" / "answers.txt", out / "same.txt")
    (out / "eval" / "tool.sh").write_text("#!/bin/sh\n")
    (out / "eval" / "tool.sh").chmod(0o755)
    os.mkfifo(out / "eval" / "pipe")
    mine = {name: what for name, what in everything(out).items() if "lors" not in name and name not in REMADE}

    edit(out, family["de.file"])
    assert {name: what for name, what in everything(out).items() if name in mine} == mine
    assert (out / "shared.bin").samefile(tmp_path / "elsewhere.bin"), "one file with two names, not a copy"
    assert (out / "same.txt").samefile(out / "eval" / "deep" / "answers.txt")
    assert [e.name for e in Ledger.load(out).experts] == ["ca", "de"]
    edit(out, family["de.file"], remove=True)
    assert {name: what for name, what in everything(out).items() if name in mine} == mine
    subprocess.run([*git, "fsck", "--strict"], check=True, capture_output=True)
    changed = subprocess.run([*git, "status", "--porcelain"], check=True, capture_output=True, text=True).stdout
    assert " M lors_ledger.json" in changed and " D " not in changed
    assert sorted(os.listdir(tmp_path)) == ["elsewhere.bin", "out"]


REMADE = {"README.md", "model.safetensors"}


def test_an_edit_without_hard_links_copies(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system without hard links: what has one name is copied, what has two elsewhere is refused."""
    out = tmp_path / "out"
    lors.merge(family["base"], {"ca": family["ca.file"]}, out)
    (out / "eval").mkdir()
    (out / "eval" / "answers.txt").write_text("hours of decoding")
    (out / "latest").symlink_to("eval")

    def none(*arguments: object, **options: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    edit(out, family["de.file"])
    assert (out / "eval" / "answers.txt").read_text() == "hours of decoding" and os.readlink(out / "latest") == "eval"
    monkeypatch.undo()
    os.link(out / "eval" / "answers.txt", tmp_path / "second")
    monkeypatch.setattr(os, "link", none)
    assert "answers.txt" in refused(tmp_path, lambda: edit(out, family["de.file"], remove=True))


def test_a_sharded_model_keeps_no_old_shard(family: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    lors.merge(family["base"], {"ca": family["ca.file"]}, out, out_shard_size="100KB")
    before = sorted(os.listdir(out))
    edit(out, family["de.file"])
    assert sorted(os.listdir(out)) == before
    recipe = out / "lors_recipe.yml"
    recipe.write_text(recipe.read_text().replace("out_shard_size: 100KB\n", ""))
    edit(out, family["de.file"], remove=True)
    assert not [name for name in os.listdir(out) if "-of-" in name or name.endswith("index.json")]
    open_checkpoint(out).close()


def test_what_changes_while_an_edit_runs_is_kept(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the second names and the swap somebody writes into the directory."""
    out = tmp_path / "out"
    lors.merge(family["base"], {"ca": family["ca.file"]}, out)
    (out / "eval").mkdir()
    (out / "eval" / "answers.txt").write_text("first")
    exchange = directory.exchange

    def late(first: Path, second: Path) -> bool:
        if second == out:
            (out / "eval" / "more.txt").write_text("second")
            (out / "eval" / "new.txt").write_text("new")
            (out / "eval" / "new.txt").replace(out / "eval" / "replaced.txt")
        return exchange(first, second)

    (out / "eval" / "replaced.txt").write_text("old")
    monkeypatch.setattr(directory, "exchange", late)
    edit(out, family["de.file"])
    assert os.listdir(tmp_path) == ["out"]
    assert {path.name: path.read_text() for path in (out / "eval").iterdir()} == {
        "answers.txt": "first", "more.txt": "second", "replaced.txt": "new"
    }  # fmt: skip


def test_what_comes_to_the_top_while_an_edit_runs_is_kept(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    lors.merge(family["base"], {"ca": family["ca.file"]}, out)
    (out / "notes.txt").write_text("old")
    exchange = directory.exchange

    def late(first: Path, second: Path) -> bool:
        (out / "new").write_text("new")
        (out / "new").replace(out / "notes.txt")  # as editors save
        return exchange(first, second)

    monkeypatch.setattr(directory, "exchange", late)
    with pytest.warns(LorsWarning, match="notes.txt"):
        edit(out, family["de.file"])
    (kept,) = [path for path in tmp_path.iterdir() if path != out]
    assert (kept / "notes.txt").read_text() == "new" and (out / "notes.txt").read_text() == "old"


@pytest.mark.parametrize("swaps", [True, False])
def test_who_works_in_a_directory_of_the_model_stays_there(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool
) -> None:
    out = tmp_path / "out"
    lors.merge(family["base"], {"ca": family["ca.file"]}, out)
    (out / "eval").mkdir()
    (out / "eval" / "answers.txt").write_text("first")
    inode = (out / "eval").stat().st_ino
    if not swaps:  # on such a file system a directory of the same content takes its place
        monkeypatch.setattr(directory, "exchange", lambda first, second: False)
    edit(out, family["de.file"])
    assert ((out / "eval").stat().st_ino == inode) == swaps
    assert (out / "eval" / "answers.txt").read_text() == "first" and os.listdir(tmp_path) == ["out"]


def test_a_mounted_directory_is_not_carried_over(family: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    lors.merge(family["base"], {"ca": family["ca.file"]}, out)
    (out / "eval").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", out / "eval"], capture_output=True, text=True)
    if mounted.returncode:
        require("tmpfs", False, mounted.stderr.strip())
    try:
        (out / "eval" / "answers.txt").write_text("hours of decoding")
        assert "eval: is on another file system" in refused(tmp_path, lambda: edit(out, family["de.file"]))
        message = refused(tmp_path, lambda: lors.merge(family["base"], {"ca": family["ca"]}, out / "eval"))
        assert "exists already" in message
        (out / "eval" / "answers.txt").unlink()
        message = refused(tmp_path, lambda: lors.merge(family["base"], {"ca": family["ca"]}, out / "eval"))
        assert "is a mount point" in message
    finally:
        subprocess.run(["umount", out / "eval"], check=True)


def test_a_name_with_a_line_break_is_one_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    with pytest.warns(LorsWarning) as caught, OutputDirectory(out, force=True) as new:
        new.write_text("config.json", "new")
        (out / "a\nb\x1b[2J").write_text("")
        new.commit()
    assert str(caught[0].message).isprintable()


def test_an_edit_keeps_a_card_that_was_written_by_hand(family: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    lors.merge(family["base"], {"ca": family["ca.file"]}, out)
    edit(out, family["de.file"])
    edit(out, family["de.file"], remove=True)
    assert [name for name in os.listdir(out) if name.startswith("README")] == ["README.md"]
    mine = (out / "README.md").read_text().replace("# Merged", "How to use it: ...\n\n# Merged")
    (out / "README.md").write_text(mine)
    done = edit(out, family["de.file"])
    assert any("README.before-3.md" in notice for notice in done.notices)
    assert (out / "README.before-3.md").read_text() == mine and "de" in (out / "README.md").read_text()
    done = edit(out, family["de.file"], remove=True)
    assert not any("README" in notice for notice in done.notices)
    assert (out / "README.before-3.md").read_text() == mine


# --- single files


def test_decompose_replaces_only_expert_files(family: dict[str, Path], tmp_path: Path) -> None:
    made = tmp_path / "x.lors.safetensors"
    decompose(family["base"], family["ca"], made)
    decompose(family["base"], family["de"], made, force=True)
    (tmp_path / "thesis.tex").write_text("years of work")
    shutil.copy(family["ca"] / "model.safetensors", tmp_path / "weights.safetensors")
    for name in ("thesis.tex", "weights.safetensors"):
        message = refused(
            tmp_path, lambda name=name: decompose(family["base"], family["ca"], tmp_path / name, force=True)
        )
        assert f"{name}: only an expert file may be replaced" in message
    os.mkfifo(tmp_path / "pipe")
    assert "pipe: expected a file to write" in refused(
        tmp_path, lambda: decompose(family["base"], family["ca"], tmp_path / "pipe", force=True)
    )


def test_decompose_does_not_replace_what_appears_meanwhile(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lors.experts import decompose as making

    write = making._write

    def late(*arguments: object) -> float:
        (tmp_path / "x").write_text("somebody else's")
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(making, "_write", late)
    with pytest.raises(LorsError, match="x: exists already"):
        decompose(family["base"], family["ca"], tmp_path / "x")
    assert (tmp_path / "x").read_text() == "somebody else's" and os.listdir(tmp_path) == ["x"]


def test_decompose_follows_a_link(family: dict[str, Path], tmp_path: Path) -> None:
    decompose(family["base"], family["ca"], tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    before = (tmp_path / "real").read_bytes()
    decompose(family["base"], family["de"], tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() != before


def report(family: dict[str, Path], out: Path, *options: str) -> None:
    application(["report"])(
        ["report", str(family["base"]), f"ca={family['ca']}", "-q", "-o", str(out), *options], standalone_mode=False
    )


def test_report_replaces_only_reports(family: dict[str, Path], tmp_path: Path) -> None:
    report(family, tmp_path / "r.html")
    page, data = (tmp_path / "r.html").read_text(), json.loads((tmp_path / "r.json").read_text())
    assert data["experts"] == ["ca"]
    assert "r.html: exists already; --force replaces it" in refused(
        tmp_path, lambda: report(family, tmp_path / "r.html")
    )
    report(family, tmp_path / "r.html", "--force")
    assert (tmp_path / "r.html").read_text() == page and sorted(os.listdir(tmp_path)) == ["r.html", "r.json"]
    (tmp_path / "r.html").unlink()
    assert "r.json: exists already" in refused(tmp_path, lambda: report(family, tmp_path / "r.html"))

    shutil.copytree(family["base"], tmp_path / "model")
    (tmp_path / "page.html").write_text("<!DOCTYPE html>\n<html>mine</html>")
    for out in ("model/config.html", "page.html"):
        message = refused(tmp_path, lambda out=out: report(family, tmp_path / out, "--force"))
        assert "may be replaced, and this is none" in message
    for out in ("model/model.safetensors", "report", "model"):
        assert "expected a name that ends in .html" in refused(
            tmp_path, lambda out=out: report(family, tmp_path / out, "--force")
        )


def test_report_is_refused_before_anything_is_computed(family: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("{}")
    done = CliRunner().invoke(
        application(["report"]), ["report", "nowhere", "ca=nowhere", "-o", str(tmp_path / "r.html")]
    )
    assert "r.json: exists already" in str(done.exception)


def test_a_plot_replaces_nothing(family: dict[str, Path], tmp_path: Path) -> None:
    module("matplotlib", "plot")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG mine")
    command = ["inspect", str(family["ca"]), "--base", str(family["base"]), "--plot", str(tmp_path / "photo.png")]
    assert "photo.png: exists already" in refused(
        tmp_path, lambda: application(command[:1])(command, standalone_mode=False)
    )
