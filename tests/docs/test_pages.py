"""What the pages tell a reader to type is typed here, in order, page by page.

`openai/whisper-small` is in this reader's hub cache, where the small base of the package stands under its name, and
`whisper-ca`, `whisper-de` and `whisper-es` were trained from it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import pages
from helpers import module

for _name in ("transformers", "accelerate", "soundfile", "soxr", "jiwer", "sacrebleu"):
    module(_name, "speech")

from lors.speech import load_corpus
from lors.speech.data.audio import SAMPLE_RATE, read_audio
from lors.speech.demo import RECORDINGS
from lors.speech.model.whisper import local_model

EXPORT = pages.DOCS / "how-to" / "export.md"
ELSEWHERE = {EXPORT.name, "new-language.md"}  # below, and tests/speech/test_new_language.py
PAGES = [
    pages.ROOT / "README.md",
    pages.DOCS / "getting-started.md",
    *(page for page in sorted((pages.DOCS / "how-to").glob("*.md")) if page.name not in ELSEWHERE),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has: programs on the PATH, a hub cache, experts, recordings."""
    root = tmp_path_factory.mktemp("reader")
    (root / "bin").mkdir()
    for name, command in (("lors", "-m lors "), ("python", "")):
        program = root / "bin" / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {command}"$@"\n')
        program.chmod(0o755)
    snapshot = root / "hub" / "models--openai--whisper-small" / "snapshots" / ("1" * 40)
    base = Path(local_model("tiny"))
    shutil.copytree(base, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(snapshot.name)
    work = root / "work"
    shutil.copytree(base, work / "base")
    state = load_file(base / "model.safetensors")
    for seed, language in enumerate(("ca", "de", "es"), start=1):
        shutil.copytree(base, work / f"whisper-{language}")
        rng = np.random.default_rng(seed)
        tuned = {
            name: (value + 1e-2 * rng.standard_normal(value.shape)).astype(value.dtype) for name, value in state.items()
        }
        save_file(tuned, work / f"whisper-{language}" / "model.safetensors", {"format": "pt"})
    (work / "corpus").symlink_to(RECORDINGS)
    record(work / "recordings")
    (work / "speech.wav").symlink_to(work / "recordings" / "ca-1.wav")
    return root


def record(folder: Path) -> None:
    """ca-1.wav, ca-2.wav, de-1.wav, de-2.wav: the first recordings of each language."""
    import soundfile

    folder.mkdir()
    for language in ("ca", "de"):
        for number, utterance in enumerate(load_corpus(RECORDINGS, languages=language, split="train")[:2], start=1):
            soundfile.write(folder / f"{language}-{number}.wav", read_audio(utterance.audio), SAMPLE_RATE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_snippet_of_a_page_runs(page: Path, home: Path, tmp_path: Path) -> None:
    if page.name == "other-tools.md":
        for name in ("mergekit", "peft", "fusion_bench"):
            module(name, "peers")
    assert follow(page, home, tmp_path), "a page without a command"


def follow(page: Path, home: Path, place: Path) -> list[str]:
    """What each block that is run prints, in a reader's working directory."""
    for entry in (home / "work").iterdir():
        (place / entry.name).symlink_to(entry)
    environment = {
        **os.environ, "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}", "HF_HUB_CACHE": str(home / "hub"),
        "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    printed = []
    for block in pages.blocks(page):
        if block.title is not None:
            (place / block.title).write_text(block.text)
        elif block.language in pages.RUN and block.reason is None:
            command = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
            done = subprocess.run(
                [*command, block.text], cwd=place, env=environment, capture_output=True, text=True, timeout=240
            )
            assert done.returncode == 0, f"{block.where}\n{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            printed.append(done.stdout)
    return printed


def test_the_export_page_runs_and_its_loop_says_what_transformers_says(home: Path, tmp_path: Path) -> None:
    for name in ("ctranslate2", "onnxruntime", "onnxscript"):
        module(name, "export")
    *_, heard = follow(EXPORT, home, tmp_path)

    import soundfile
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    model = WhisperForConditionalGeneration.from_pretrained(tmp_path / "merged")
    processor = WhisperProcessor.from_pretrained(tmp_path / "merged")
    sound, rate = soundfile.read(tmp_path / "speech.wav")
    features = processor(sound, sampling_rate=rate, return_tensors="pt").input_features.to(model.dtype)
    said = model.generate(features, language="ca", task="transcribe")
    expected = processor.batch_decode(said, skip_special_tokens=True)[0]
    assert heard.strip() == expected.strip() and len(expected.split()) > 2


def test_what_is_not_run_says_why() -> None:
    reasons = [block.reason for page in [*PAGES, EXPORT] for block in pages.blocks(page) if block.reason is not None]
    assert all(reason.split()[0] in ("needs", "runs", "the") for reason in reasons), reasons
    untold = [
        block.where
        for page in [*PAGES, EXPORT]
        for block in pages.blocks(page)
        if block.language in ("sh", "shell", "console", "py") or block.said and block.said[0] != "not run"
    ]
    assert not untold, "blocks that look like commands and are not run"
