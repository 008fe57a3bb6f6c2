"""The files of transformers 4 beside a merged Whisper: there, right, and of no effect on what transformers 5 loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import lors
import multilingual
from helpers import module
from lors.errors import LorsError
from lors.merging.older_files import older_files, read_tokenizer
from lors.speech.model.whisper import SHIPPED

OLDER = {"vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "preprocessor_config.json"}
TEXTS = (
    "dijous vint i tres de març",
    "Bon dia! 23 <|ca|> gener  2024",
    "четверг, 5-го",
    "<|startoftranscript|><|0.50|>zwei",
)


def beside(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.suffix in (".json", ".txt"))


def written(source: Path, target: Path, notices: list[str] | None = None) -> dict[str, str]:
    """A copy of a model with its older files, which are returned."""
    shutil.copytree(source, target)
    made = older_files(beside(source), notices if notices is not None else [])
    for name, text in made.items():
        (target / name).write_text(text, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"tiny": Path(SHIPPED["tiny"]), "multilingual": multilingual.write(tmp_path_factory.mktemp("m") / "model")}


def seen(processor: Any) -> dict[str, Any]:
    """All that a processor does to texts and speech."""
    import numpy as np

    tokenizer = processor.tokenizer
    found: dict[str, Any] = {"extractor": processor.feature_extractor.to_dict(), "vocab": tokenizer.get_vocab()}
    found["special"] = (tokenizer.special_tokens_map, tokenizer.all_special_tokens, tokenizer.extra_special_tokens)
    found["added"] = {number: repr(token) for number, token in tokenizer.added_tokens_decoder.items()}
    for task in ("transcribe", "translate"):
        tokenizer.set_prefix_tokens(language="catalan", task=task)
        found[task] = [tokenizer(text).input_ids for text in TEXTS]
        found[f"{task} back"] = [
            tokenizer.decode(ids, skip_special_tokens=s) for ids in found[task] for s in (True, False)
        ]
    wave = np.sin(np.arange(16000) / 20).astype(np.float32)
    found["mel"] = processor.feature_extractor(wave, sampling_rate=16000).input_features[0].tobytes()
    return found


@pytest.mark.parametrize("name", ["tiny", "multilingual"])
def test_transformers_loads_it_equally(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    transformers = module("transformers", "speech")
    made = written(bases[name], tmp_path / "model")
    assert made.keys() == OLDER
    processor = transformers.WhisperProcessor
    before = seen(processor.from_pretrained(bases[name]))
    assert before["transcribe"][0] != before["translate"][0], "a language and a task are there to be lost"
    assert seen(processor.from_pretrained(tmp_path / "model")) == before
    assert seen(transformers.AutoProcessor.from_pretrained(tmp_path / "model")) == before


@pytest.mark.parametrize("name", ["tiny", "multilingual"])
def test_the_older_files_alone_are_the_same_model(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """What is in them is what is in the new ones: transformers makes the same of either."""
    transformers = module("transformers", "speech")
    written(bases[name], tmp_path / "model")
    for new in ("tokenizer.json", "processor_config.json"):
        (tmp_path / "model" / new).unlink()
    processor = transformers.WhisperProcessor
    before, after = (seen(processor.from_pretrained(path)) for path in (bases[name], tmp_path / "model"))
    for one in (
        before,
        after,
    ):  # added_tokens.json has no flags: transformers takes others for those that are not special
        one["added"] = {number: token.partition(",")[0] for number, token in one["added"].items()}
    assert after == before


def test_beside_a_merge(tmp_path: Path) -> None:
    tiny, early = (Path(SHIPPED[name]) for name in ("tiny", "tiny-early"))
    report = lors.merge(tiny, {"a": early}, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} >= OLDER | {"tokenizer.json", "processor_config.json"}
    assert not any("not written" in notice for notice in report.notices)
    vocab = json.loads((tmp_path / "out" / "vocab.json").read_text(encoding="utf-8"))
    assert len(vocab) == 916 and list(vocab.values()) == sorted(vocab.values())
    assert (tmp_path / "out" / "merges.txt").read_text(encoding="utf-8").startswith("#version: 0.2\n")
    lors.merge(tiny, {"a": early}, tmp_path / "out", force=True)


def test_what_is_there_is_kept(bases: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bases["tiny"], tmp_path / "model")
    for name in ("vocab.json", "preprocessor_config.json"):
        (tmp_path / "model" / name).write_text("{}")
    assert older_files(beside(tmp_path / "model"), []).keys() == OLDER - {"vocab.json", "preprocessor_config.json"}


BROKEN = {
    "not json": "{",
    "a list": "[]",
    "no model": "{}",
    "unigram": json.dumps({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}),
    "no bytes": json.dumps(
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "decoder": {"type": "Metaspace"}}
    ),
    "ids": json.dumps({"model": {"type": "BPE", "vocab": {"a": "0"}, "merges": []}, "decoder": {"type": "ByteLevel"}}),
    "twice": json.dumps(
        {"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}, "decoder": {"type": "ByteLevel"}}
    ),
    "merges": json.dumps(
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}, "decoder": {"type": "ByteLevel"}}
    ),
    "merges 2": json.dumps(
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": 7}, "decoder": {"type": "ByteLevel"}}
    ),
    "merges 3": json.dumps(
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [7]}, "decoder": {"type": "ByteLevel"}}
    ),
    "added": json.dumps(
        {"model": {"type": "BPE", "vocab": {"a": 0}}, "decoder": {"type": "ByteLevel"}, "added_tokens": [{}]}
    ),
    "added 2": json.dumps(
        {"model": {"type": "BPE", "vocab": {"a": 0}}, "decoder": {"type": "ByteLevel"}, "added_tokens": {}}
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_tokenizer_of_another_kind_is_told(broken: str, bases: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bases["tiny"], tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(BROKEN[broken])
    notices: list[str] = []
    assert older_files(beside(tmp_path / "model"), notices).keys() == {"preprocessor_config.json"}
    (notice,) = notices
    assert "tokenizer.json" in notice and notice.endswith("special_tokens_map.json, vocab.json are not written")
    with pytest.raises(LorsError, match="tokenizer.json"):
        read_tokenizer(beside(tmp_path / "model"))


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer_config.json"])
def test_another_file_that_cannot_be_read_is_told(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bases["tiny"], tmp_path / "model")
    (tmp_path / "model" / name).write_text("{")
    notices: list[str] = []
    made = older_files(beside(tmp_path / "model"), notices)
    assert made.keys() < OLDER and len(notices) == 1 and name in notices[0]
