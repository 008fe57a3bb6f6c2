"""Every message that docs/troubleshooting.md quotes is printed by the command that the page names for it."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import lors
import pages
import tiny
import weights
from helpers import module
from lors.cli import main
from lors.experts.decompose import decompose

PAGE = pages.DOCS / "troubleshooting.md"
QUOTED = [block for block in pages.blocks(PAGE) if block.said]
BASE = "whisper-small"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which all of it goes wrong."""
    root = tmp_path_factory.mktemp("trouble")
    tiny.family(root, ("whisper-ca", "whisper-de"))
    (root / "base").rename(root / BASE)
    for number in (100, 1000):
        shutil.copytree(root / "whisper-ca", root / f"trainer/checkpoint-{number}")
    shutil.copytree(root / "whisper-ca", root / "lfs")
    (root / "lfs/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    torch.save({"model": {"a": torch.zeros(2)}, "args": argparse.Namespace()}, root / "whole.pt")
    weights.write(root / "whisper-tiny-ca", weights.whisper(d=16, layers=2, tokens=61), {"model_type": "whisper"})
    changed(root, "more-tokens", weights.EMBEDDING, lambda array: np.concatenate([array, array[:1]]))
    changed(root, "double", "model.encoder.conv1.weight", lambda array: array.astype(np.float64))
    changed(
        root, "diverged", "model.encoder.conv1.weight", lambda array: np.where(array == array.flat[0], np.nan, array)
    )
    changed(root, "other", "model.encoder.conv1.weight", lambda array: array + 1, of=BASE)
    (root / "typo.yml").write_text(
        f"merge_method: lors\nbase_model: {BASE}\nmodels:\n- {{model: whisper-ca, parameters: {{densty: 0.1}}}}\n"
    )
    experts = {"ca": root / "whisper-ca", "de": root / "whisper-de"}
    lors.merge(root / BASE, experts, root / "merged")
    lors.merge(root / BASE, {"de": root / "whisper-de"}, root / "by-tsv", "tsv")
    decompose(root / BASE, root / "whisper-ca", root / "ca.lors.safetensors", name="ca")
    (root / "thesis").mkdir()
    (root / "thesis" / "chapter-1.tex").write_text("\\chapter{One}\n")
    (root / "spaces.tsv").write_text("audio   text   language   split\na.wav   bon dia   ca   train\n")
    (root / "missing.tsv").write_text("audio\ttext\tlanguage\tsplit\na.wav\tbon dia\tca\ttrain\n")
    (root / "nosplit.tsv").write_text("audio\ttext\tlanguage\tsplit\na.wav\tbon dia\tca\ttest\n")
    from lors.speech.demo import RECORDINGS

    (root / "corpus").symlink_to(RECORDINGS)
    return root


def changed(root: Path, name: str, tensor: str, change: Any, of: str = "whisper-ca") -> None:
    shutil.copytree(root / of, root / name)
    state = load_file(root / name / "model.safetensors")
    save_file(state | {tensor: change(state[tensor])}, root / name / "model.safetensors")


@pytest.mark.parametrize("block", QUOTED, ids=lambda block: block.where)
def test_a_quoted_message_is_what_the_command_says(
    block: pages.Block, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert block.said is not None
    how, command = block.said
    program, *arguments = shlex.split(command.replace("*", r"\*"))
    assert program == "lors" and how in ("said by", "said without transformers by")
    if arguments[0] in ("finetune", "evaluate"):
        for name in ("transformers", "accelerate", "soundfile", "soxr", "jiwer", "sacrebleu"):
            module(name, "speech")
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.argv", [program, *arguments])
    if how != "said by":
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *more: None if name == "transformers" else find(name, *more)
        )
    before = sorted(path for path in place.iterdir() if path.suffix != ".checkpoints")
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    pattern = re.escape(block.text.strip()).replace(re.escape("..."), ".+")
    assert re.fullmatch(pattern, err.strip()), err
    assert ended.value.code == 2 and not out
    left = [path for path in place.iterdir() if path.suffix != ".checkpoints"]  # where a training goes on
    assert sorted(left) == before


def test_messages_on_the_page_are_all_provoked() -> None:
    assert len(QUOTED) > 25
    assert not [block.where for block in pages.blocks(PAGE) if "error:" in block.text and not block.said]
