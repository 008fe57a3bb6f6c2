"""The shipped configurations for real corpora, run whole on miniature copies in the corpora's own formats."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import soundfile

from helpers import module
from lors.speech import run_experiment
from lors.speech.data.audio import read_audio
from lors.speech.data.corpus import load_corpus
from lors.speech.data.utterance import Corpus, Utterance
from lors.speech.experiment.config import Config, load_config

SIZES = {"train": 4, "dev": 2, "test": 12}
CODES = {"ca": ("ca", "ca_es"), "sv": ("sv-SE", "sv_se")}  # Common Voice's and FLEURS's


@pytest.fixture(scope="module")
def spoken(recordings: Path) -> dict[str, Corpus]:
    """Split -> utterances; the second language has those of the first, in other words of nobody's language."""
    return {split: load_corpus(recordings, languages="ca", split=split, limit=size) for split, size in SIZES.items()}


def _covost(root: Path, spoken: dict[str, Corpus]) -> str:
    """Common Voice as unpacked, and CoVoST's own table beside it."""
    for code, _ in CODES.values():
        (root / code / "clips").mkdir(parents=True)
        validated, table = ["client_id\tpath\tsentence\tup_votes"], ["path\ttranslation\tsplit"]
        for split, corpus in spoken.items():
            for utterance in corpus:
                name = f"common_voice_{code}_{utterance.id}.mp3"
                soundfile.write(root / code / "clips" / name, read_audio(utterance.audio), 16000, format="MP3")
                validated.append(f"0a\t{name}\t{utterance.text}\t2")
                table.append(f"{name}\t{utterance.translation}\t{split}")
        (root / code / "validated.tsv").write_text("\n".join(validated) + "\n", "utf-8")
        (root / f"covost_v2.{code}_en.tsv").write_text("\n".join(table) + "\n", "utf-8")
    return f"covost2:{root}"


def _fleurs(root: Path, spoken: dict[str, Corpus]) -> str:
    """Parquet shards, audio inside; the English split has the translations under the same ids."""
    for split, corpus in spoken.items():
        for _, code in CODES.values():
            _shard(root / code, split, [utterance.text for utterance in corpus], corpus)
        _shard(root / "en_us", split, [utterance.translation or "" for utterance in corpus], corpus)
    return f"fleurs:{root}"


def _shard(directory: Path, split: str, texts: Sequence[str], corpus: Sequence[Utterance]) -> None:
    pa, pq = module("pyarrow", "speech"), module("pyarrow.parquet", "speech")
    audio = []
    for utterance in corpus:
        stream = io.BytesIO()
        soundfile.write(stream, read_audio(utterance.audio), 16000, format="WAV")
        audio.append({"bytes": stream.getvalue(), "path": f"{utterance.id}.wav"})
    directory.mkdir(parents=True, exist_ok=True)
    columns = {"id": list(range(len(texts))), "raw_transcription": list(texts), "audio": audio}
    name = f"{'validation' if split == 'dev' else split}-00000-of-00001.parquet"
    pq.write_table(pa.table(columns), directory / name, row_group_size=2)


def _miniature(name: str, source: str) -> Config:
    """The configuration as shipped, but for a tiny base, two languages, little data, few steps and settings."""
    config = load_config(name)
    grids: dict[str, Any] = {
        label: {"method": grid.method, "parameters": {key: values[:1] for key, values in grid.parameters.items()}}
        for label, grid in config.grids.items()
        if label in ("task_arithmetic", "lors")
    }
    return load_config(
        name,
        base="tiny",
        experts=list(CODES),
        languages=list(CODES),
        data={**config.data.model_dump(), **SIZES, "source": source},
        training={**config.training, "max_steps": 2, "per_device_train_batch_size": 4},
        multi_task_steps=2,
        sequential_steps=1,
        grids=grids,
        criterion="wer",  # two steps are no gain to have a share of
    )


@pytest.mark.parametrize(("name", "write"), [("covost-small", _covost), ("fleurs", _fleurs)])
def test_real_corpora(tmp_path: Path, spoken: dict[str, Corpus], name: str, write: Any) -> None:
    config = _miniature(name, write(tmp_path / "corpus", spoken))
    assert config.training["bf16"] and config.tasks == ("transcribe", "translate")
    run_experiment(config, tmp_path / "out", jobs=2, report=lambda line: None)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["utterances"] == {f"{task}/{language}": SIZES["test"] for task in config.tasks for language in CODES}
    assert {"base", "task_arithmetic", "lors", "multi_task", "sequential"} < set(results["models"])
    # The base knows these recordings: it reads Catalan and translates it, which no shuffled table would give.
    assert results["models"]["base"]["cells"]["transcribe/ca"]["wer"] < 95
    assert results["models"]["base"]["cells"]["translate/ca"]["bleu"] > 5
