"""docs/how-to/new-language.md, executed: two experts with a language token of their own, fine-tuned, merged, transcribing."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import soundfile
from typer.testing import CliRunner

from lors.checkpoints.reader import open_checkpoint
from lors.cli.app import application
from lors.speech import evaluate
from lors.speech.data.audio import read_audio
from lors.speech.data.corpus import load_corpus
from lors.speech.model.whisper import SHIPPED, has_times, load_model

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "new-language.md"
EMBEDDING = "model.decoder.embed_tokens.weight"
SPOKEN = {"ca": "ast", "de": "kab"}  # whose recordings stand for which new language
QUICK = ["--max-steps", "50", "--learning-rate", "4e-4", "--device", "cpu"]
SAMPLE = ["--limit", "12", "--device", "cpu"]
BASE = str(SHIPPED["tiny"])


def blocks(kind: str) -> list[str]:
    text = PAGE.read_text(encoding="utf-8").replace("openai/whisper-small", BASE)
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def shell(text: str) -> None:
    """The commands of a block; fine-tuning is cut to fit a test run."""
    for line in text.strip().splitlines():
        program, command, *arguments = shlex.split(line)
        assert program == "lors"
        arguments += QUICK if command == "finetune" else SAMPLE if command == "evaluate" else []
        done = CliRunner().invoke(application([command]), [command, *arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output


def manifest(recordings: Path) -> None:
    """The recordings of two languages under new codes, in the working directory."""
    with (recordings / "manifest.tsv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    kept = [row | {"language": SPOKEN[row["language"]]} for row in rows if row["language"] in SPOKEN]
    with Path("manifest.tsv").open("w", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(kept[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(kept)
    for language in SPOKEN:
        shutil.copy(recordings / f"{language}.opus", f"{language}.opus")


def read_json(path: str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def before(language: str) -> float:
    """WER of the model that has the token and was not trained, on the same sample."""
    found = evaluate(
        [f"whisper-{language}"], data="manifest.tsv", languages=language, split="test", limit=12, device="cpu"
    )
    return float(found.rows()[0]["wer"])


def test_the_page(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    manifest(recordings)
    (setup, transcribe), (train, merge, score) = blocks("python"), blocks("sh")
    exec(setup, {})
    shell(train)
    shell(merge)
    shell(score)

    # one row each, from the expert that has it; the base's rows are where they were
    tables = {}
    for name in ("expert-ast", "expert-kab", "merged"):
        with open_checkpoint(name) as checkpoint:
            tables[name] = checkpoint.read(EMBEDDING)
    rows, kind = len(tables["merged"]) - 2, tables["merged"].dtype  # of the base; training is in float32
    assert tables["merged"][rows].tobytes() == tables["expert-ast"][rows].astype(kind).tobytes()
    assert tables["merged"][rows + 1].tobytes() == tables["expert-kab"][rows].astype(kind).tobytes()
    assert tables["expert-ast"][rows].tobytes() != tables["expert-kab"][rows].tobytes()
    settings, config = read_json("merged/generation_config.json"), read_json("merged/config.json")
    assert config["vocab_size"] == rows + 2
    assert settings["lang_to_id"]["<|ast|>"] == rows and settings["lang_to_id"]["<|kab|>"] == rows + 1
    assert settings["suppress_tokens"] == [rows, rows + 1]
    assert settings["lang_to_id"]["<|ca|>"] == read_json(f"{BASE}/generation_config.json")["lang_to_id"]["<|ca|>"]
    added = {entry["content"]: entry for entry in read_json("merged/tokenizer.json")["added_tokens"]}
    assert (added["<|ast|>"]["id"], added["<|kab|>"]["id"], added["<|kab|>"]["special"]) == (rows, rows + 1, True)
    assert not has_times(load_model("merged"))

    # the one merged model has learnt from both, and is asked for each by its own token
    for row in read_json("scores/scores.json"):
        assert row["wer"] < before(row["language"])

    clip = next(u for u in load_corpus("manifest.tsv", languages="ast", split="test"))
    soundfile.write("one.wav", read_audio(clip.audio), 16000)
    capsys.readouterr()
    exec(transcribe, {})
    said = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert said.keys() == {"ast", "kab"} and said["ast"].strip() and "<|" not in said["ast"]


def test_a_tokenizer_without_the_times_gets_them_before_the_language(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    monkeypatch.chdir(tmp_path)
    model, processor = WhisperForConditionalGeneration.from_pretrained(BASE), WhisperProcessor.from_pretrained(BASE)
    first = len(processor.tokenizer)
    model.resize_token_embeddings(first + 1501, mean_resizing=False)
    model.save_pretrained("timeless")
    processor.save_pretrained("timeless")
    names: dict[str, Any] = {}
    exec(blocks("python")[0], names)
    names["add_language"]("timeless", "oci", "ca", "whisper-oci")
    for part in names["load"]("timeless"):
        part.save_pretrained("base")
    merge = ["merge", "--expert", "oci=whisper-oci", "--vocabulary", "union", "merged", "--base"]
    refused = CliRunner().invoke(application(["merge"]), [*merge, "timeless"])
    assert "add <|0.00|>, <|0.02|> ... as tokens" in str(refused.exception)
    shell(shlex.join(["lors", *merge, "base"]))
    tokenizer = WhisperProcessor.from_pretrained("whisper-oci").tokenizer
    assert tokenizer.convert_tokens_to_ids(["<|0.00|>", "<|0.58|>", "<|30.00|>", "<|oci|>"]) == [
        first, first + 29, first + 1500, first + 1501
    ]  # fmt: skip
    assert len(tokenizer) == read_json("whisper-oci/config.json")["vocab_size"] == first + 1502
