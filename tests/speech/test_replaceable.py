"""The speech commands write over nothing but their own."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from cut import cut_config
from helpers import module
from lors.errors import LorsError
from lors.files.replaceable import objection
from lors.speech.data.synth import synthesise
from lors.speech.experiment.plan import run_experiment
from lors.speech.experiment.report import FILES
from lors.speech.scoring.evaluation import make_room
from lors.speech.training.finetune import finetune
from lors.speech.training.settings import Training


@pytest.mark.usefixtures("espeak")
def test_synth_writes_over_a_corpus_of_its_own_only(tmp_path: Path) -> None:
    out, options = tmp_path / "corpus", {"languages": ["ca"], "sizes": {"test": 1}}
    synthesise(out, **options)
    with pytest.raises(LorsError, match="exists already; --force"):
        synthesise(out, **options)
    synthesise(out, **options, force=True)
    recording = out / "ca" / "interview.flac"
    recording.write_bytes(b"an hour of speech")
    with pytest.raises(LorsError, match="ca/interview.flac"):
        synthesise(out, **options, force=True)
    assert (out / "manifest.tsv").exists() and recording.read_bytes() == b"an hour of speech"

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "manifest.tsv").write_text("id\taudio\n")
    (mine / "clips").mkdir()
    (mine / "clips" / "1.flac").write_bytes(b"")
    with pytest.raises(LorsError, match="only a corpus of `lors synth` .*clips"):
        synthesise(mine, **options, force=True)
    assert (mine / "manifest.tsv").read_text() == "id\taudio\n"


@pytest.mark.parametrize("train", ["all", "lora"])
def test_a_fine_tuned_model_may_be_replaced(tmp_path: Path, recordings: Path, train: str) -> None:
    """By `--force`: transformers and PEFT write no name into it that is not known."""
    module("peft", "speech")
    options = {"data": recordings, "languages": "ca", "limit": 2, "training": Training(max_steps=1, train=train)}
    finetune("tiny", tmp_path / "ca", **options)
    assert objection(tmp_path / "ca") is None and (tmp_path / "ca" / "adapter").exists() == (train == "lora")
    finetune("tiny", tmp_path / "ca", **options, force=True)
    (tmp_path / "ca" / "adapter").mkdir(exist_ok=True)
    (tmp_path / "ca" / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(LorsError, match="adapter/notes.txt"):
        finetune("tiny", tmp_path / "ca", **options, force=True)


@pytest.mark.parametrize("name", ["notes/keep.txt", "run.json"])
def test_checkpoints_do_not_go_into_a_directory_of_another_kind(tmp_path: Path, recordings: Path, name: str) -> None:
    mine = tmp_path / "ca.checkpoints" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    with pytest.raises(LorsError, match=name.partition("/")[0]):
        finetune("tiny", tmp_path / "ca", data=recordings, languages="ca", training=Training(max_steps=1))
    assert mine.read_text() == "years of work" and not (tmp_path / "ca").exists()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"mine", lzma.compress(b"mine")])
def test_an_experiment_replaces_only_its_own_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LorsError, match=f"{name}: only a .* may be replaced"):
        run_experiment(cut_config(), tmp_path)
    assert (tmp_path / name).read_bytes() == content and len(list(tmp_path.iterdir())) == 1


def test_scores_replace_only_scores(tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text('{"mine": 1}')
    with pytest.raises(LorsError, match="scores.json: only a file of scores of lors"):
        make_room(tmp_path)
    (tmp_path / "scores.json").write_text('[\n {\n  "model": "a"}]')
    make_room(tmp_path)
