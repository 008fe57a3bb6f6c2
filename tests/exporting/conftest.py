"""A Whisper with openai's multilingual vocabulary, and what transformers hears with it."""

from __future__ import annotations

from pathlib import Path

import pytest

import multilingual
from helpers import module

for name in ("transformers", "soundfile", "soxr"):
    module(name, "speech")

from said import Said, by_transformers


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return multilingual.write(tmp_path_factory.mktemp("multilingual") / "model")


@pytest.fixture(scope="session")
def said(model: Path) -> list[Said]:
    found = by_transformers(model)
    assert len(found) == 12 and len({one.words for one in found}) > 9 and all(one.words for one in found)
    return found
