"""Speech tests use the recordings and bases that come with the package: no network, no espeak-ng, no mocks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from cut import cut_config
from helpers import module, require
from lors.speech.data.corpus import load_corpus
from lors.speech.data.utterance import Corpus
from lors.speech.demo import RECORDINGS

for name in ("transformers", "accelerate", "soundfile", "soxr", "jiwer", "sacrebleu", "babel", "num2words", "datasets"):
    module(name, "speech")

import datasets

# One thread: a 128-wide model is slower on two, and much slower on two that others use. Child processes too.
os.environ.update(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def recordings() -> Path:
    return RECORDINGS


@pytest.fixture(scope="session", autouse=True)
def rows_of_datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `datasets` keeps what it has opened, here and in processes of their own."""
    home = tmp_path_factory.mktemp("datasets")
    os.environ["HF_DATASETS_CACHE"] = str(home)
    datasets.config.HF_DATASETS_CACHE = home
    return home


@pytest.fixture(scope="session")
def espeak() -> None:
    require("espeak", shutil.which("espeak-ng") is not None, "espeak-ng is not installed")


@pytest.fixture(scope="session")
def catalan(recordings: Path) -> Corpus:
    """Twenty-five hard test utterances."""
    return load_corpus(recordings, languages="ca", split="test")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cut experiment, run once for all tests."""
    from lors.speech import run_experiment

    root = tmp_path_factory.mktemp("experiment")
    run_experiment(cut_config(), root, jobs=2, report=lambda line: None)
    return root
