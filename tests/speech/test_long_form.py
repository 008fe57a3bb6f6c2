"""Recordings beyond the model's window, by Whisper's own algorithm, and beam search."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from lors.errors import LorsError
from lors.speech.data.audio import AudioFile, read_audio
from lors.speech.data.features import Features, log_mel
from lors.speech.data.utterance import Corpus, Utterance
from lors.speech.experiment.config import load_config
from lors.speech.experiment.plan import build_stages
from lors.speech.model.whisper import load_model, load_processor
from lors.speech.scoring import evaluation as evaluation_module
from lors.speech.scoring.evaluation import Decoder, evaluate
from lors.speech.training.finetune import finetune
from lors.speech.training.settings import Training

WINDOW = 32000  # samples that the tiny model hears


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with tokens for times, as Whisper has them: the first stands where the token for none stood, the others
    are never likely. So a window holds one segment, and is answered as it would be alone."""
    home = tmp_path_factory.mktemp("timed")
    model, processor = load_model("tiny"), load_processor("tiny")
    none = model.generation_config.no_timestamps_token_id
    processor.tokenizer.add_tokens([f"<|{0.02 * i:.2f}|>" for i in range(101)])
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    weights = model.get_input_embeddings().weight.data
    weights[none + 1 :] = 0
    weights[none + 1] = weights[none]
    model.save_pretrained(home)
    processor.save_pretrained(home)
    return home


def _joined(home: Path, name: str, parts: Corpus) -> Utterance:
    """One recording of several, each of them in a window of its own."""
    samples = [np.pad(x, (0, WINDOW - len(x))) for x in (read_audio(u.audio) for u in parts)]
    soundfile.write(home / f"{name}.wav", np.concatenate(samples), 16000, subtype="FLOAT")
    return replace(parts[0], id=name, audio=AudioFile(home / f"{name}.wav"), text=" ".join(u.text for u in parts))


@pytest.mark.parametrize("beams", [1, 3])
def test_joined_recordings_are_answered_as_each_alone(tmp_path: Path, timed: Path, catalan: Corpus, beams: int) -> None:
    groups = [catalan[i : i + 3] for i in range(0, 24, 3)]
    long = [_joined(tmp_path, f"long{i}", parts) for i, parts in enumerate(groups)]
    mixed = [u for pair in zip(long, catalan, strict=False) for u in pair]

    def answers(corpus: Corpus, **options: Any) -> dict[str, str]:
        (result,) = evaluate(timed, data=corpus, languages="ca", beams=beams, **options).results
        return {a.id: a.hypothesis for a in result.answers}

    alone, together = answers(catalan), answers(mixed)
    assert {u.id: together[u.id] for u in catalan[: len(long)]} == {u.id: alone[u.id] for u in catalan[: len(long)]}
    # A window's features depend a little on the loudest sound of the whole recording, and at its ends on the next one's.
    same = [alone[u.id] in together[f"long{i}"] for i, parts in enumerate(groups) for u in parts]
    assert sum(same) >= 0.7 * len(same)
    whole = [together[f"long{i}"] == " ".join(alone[u.id] for u in parts) for i, parts in enumerate(groups)]
    assert sum(whole) >= 3, "with a space between the windows"
    assert answers(mixed[::-1], batch_size=5, workers=2) == together, "whatever the order and the processes"


def test_higher_temperatures_are_seeded(
    tmp_path: Path, timed: Path, catalan: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A threshold that no answer meets: each window is drawn, at the last temperature."""
    long = [_joined(tmp_path, f"long{i}", catalan[i : i + 2]) for i in (0, 2)]

    def answers(corpus: Corpus, seed: int) -> set[tuple[str, str]]:
        torch.manual_seed(seed)
        (result,) = evaluate(timed, data=corpus, languages="ca").results
        return {(a.id, a.hypothesis) for a in result.answers}

    sure = answers(long, 0)
    monkeypatch.setitem(evaluation_module._WINDOWS, "logprob_threshold", 0.0)
    drawn = answers(long, 1)
    assert drawn != sure and answers(long, 2) == answers(long[::-1], 3) == drawn


def test_beams_change_answers(catalan: Corpus) -> None:
    greedy, wide = (evaluate("tiny", data=catalan, languages="ca", beams=beams).results[0] for beams in (1, 4))
    assert [a.hypothesis for a in greedy.answers] != [a.hypothesis for a in wide.answers]


def test_a_model_without_times_has_no_long_form(tmp_path: Path, catalan: Corpus, timed: Path) -> None:
    long = _joined(tmp_path, "long", catalan[:2])
    with pytest.raises(LorsError, match=r"expected at most 2 s, the model's window, got 4\.0 s"):
        evaluate("tiny", data=[long], languages="ca")
    assert len(evaluate(timed, data=[long], languages="ca", max_seconds=5).results[0].answers) == 1
    with pytest.raises(LorsError, match="of at most 3 s, got none"):
        evaluate(timed, data=[long], languages="ca", max_seconds=3)


def test_long_features_are_kept_whole(tmp_path: Path, catalan: Corpus) -> None:
    extractor = load_processor("tiny").feature_extractor
    parts = [read_audio(u.audio) for u in catalan[:3]]
    soundfile.write(tmp_path / "a.wav", np.concatenate([*parts, np.zeros(20000, np.float32)]), 16000, subtype="FLOAT")
    audio = AudioFile(tmp_path / "a.wav")
    want = log_mel(audio, extractor, 60.0)
    frames = (sum(map(len, parts)) + 20000) // 160
    assert want.shape == (80, frames) and frames > 350
    features = Features(extractor, tmp_path / "cache", longest=60.0)
    for _ in range(2):  # silence at the end too: its frames are heard
        assert np.array_equal(features.of(audio), want)
    with pytest.raises(LorsError, match="expected at most 2 s, the model's window"):
        Features(extractor, tmp_path / "cache").of(audio)
    with pytest.raises(LorsError, match=r"expected at most 3 s, got \d\.\d s \(--max-seconds"):
        Features(extractor, tmp_path / "other", longest=3.0).of(audio)


def test_training_goes_without_long_recordings(tmp_path: Path, timed: Path, catalan: Corpus) -> None:
    corpus = [replace(u, split=None) for u in [_joined(tmp_path, "long", catalan[:2]), *catalan[2:12]]]
    cache = tmp_path / "cache"
    evaluate(timed, data=corpus, languages="ca", cache=cache)  # its features are there now
    training = Training(max_steps=1, per_device_train_batch_size=4, eval_steps=1)
    result = finetune(
        timed, tmp_path / "out", data=corpus, languages="ca", training=training, cache=cache, unusable=0.2
    )
    assert result.items == 10 and len(result.unusable) == 1 and "the model's window" in result.unusable[0]


def test_dev_is_decoded_by_beams(tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = set()
    monkeypatch.setattr(Decoder, "transcribe", _noting(used, Decoder.transcribe))
    for beams in (1, 3):
        training = Training(max_steps=1, eval_steps=1, generation_num_beams=beams, per_device_train_batch_size=4)
        finetune("tiny", tmp_path / f"{beams}", data=recordings, languages="ca", training=training)
    assert used == {1, 3}
    assert "generation_num_beams" not in Training().record()
    with pytest.raises(LorsError, match="generation_num_beams: expected an integer of at least 1, got 0"):
        Training(generation_num_beams=0)


def _noting(used: set[int], transcribe: Any) -> Any:
    def noted(self: Decoder, *arguments: Any) -> Any:
        used.add(self.beams)
        return transcribe(self, *arguments)

    return noted


def test_beams_of_an_experiment_are_in_its_keys(tmp_path: Path) -> None:
    """And nothing is where they are as before: keys stay."""
    stages = {beams: {s.name: s for s in build_stages(load_config("quick", beams=beams))} for beams in (1, 4)}
    for name, stage in stages[1].items():
        assert "beams" not in json.dumps(stage.parameters)
        decodes = name.startswith(("bounds-", "test-", "dev-"))
        assert (stage.key != stages[4][name].key) == decodes, name
        assert stages[4][name].parameters.get("beams") == (4 if decodes else None)
