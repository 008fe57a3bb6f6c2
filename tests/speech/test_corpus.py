"""Loaders on miniature corpora in the formats they have on disk, and audio files of every kind."""

from __future__ import annotations

import json
import resource
import struct
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from transformers import WhisperFeatureExtractor
from transformers.models.whisper.tokenization_whisper import LANGUAGES as WHISPER_LANGUAGES

from lors.errors import LorsError
from lors.speech.data import features as features_module
from lors.speech.data.audio import AudioFile, duration, read_audio
from lors.speech.data.corpus import corpus_digest, load_corpus
from lors.speech.data.features import Features, log_mel
from lors.speech.data.languages import fleurs_code, language_name, parse_languages, spoken_code, whisper_code
from lors.speech.data.left_out import LeftOut
from lors.speech.data.utterance import Corpus, by_task
from lors.speech.model.whisper import load_processor


def _tsv(path: Path, *rows: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(row.replace("|", "\t") for row in rows) + "\n", "utf-8")
    return path


def _tone(seconds: float = 0.5, rate: int = 16000) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


# ------------------------------------------------------------------------------------------------------ languages


def _has_fleurs(code: str) -> bool:
    try:
        return whisper_code(fleurs_code(code)) == code
    except LorsError:
        return False


def test_codes() -> None:
    assert whisper_code("sv-SE") == whisper_code("sv_se") == "sv" and whisper_code("cmn_hans_cn") == "zh"
    assert parse_languages("ca, sv-SE,ca") == ("ca", "sv")
    assert [fleurs_code(code) for code in ("es", "gl", "ko", "tl", "jw", "yue", "no", "zh")] == [
        *("es_419", "gl_es", "ko_kr", "fil_ph", "jv_id", "yue_hant_hk", "nb_no", "cmn_hans_cn")
    ]
    known = {code for code in WHISPER_LANGUAGES if _has_fleurs(code)}
    assert len(known) == 83 and {"eu", "sq", "la"}.isdisjoint(known), "of FLEURS's 102 Whisper speaks 83"
    assert fleurs_code("ast") == "ast_es" and fleurs_code("nso") == "nso_za", "the others too"
    assert spoken_code("Swedish") == spoken_code("sv-SE") == "sv" and language_name("sv") == "swedish"
    with pytest.raises(LorsError, match="at least one code"):
        parse_languages(" , ")


# ---------------------------------------------------------------------------------------------------------- audio


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("wav", {}),
        ("flac", {}),
        ("mp3", {"format": "MP3"}),
        ("ogg", {"format": "OGG", "subtype": "VORBIS"}),
        ("opus", {"format": "OGG", "subtype": "OPUS"}),
    ],
)
def test_formats_give_the_same_tone(tmp_path: Path, suffix: str, options: dict[str, str]) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, _tone(1.0), 16000, **options)
    samples = read_audio(AudioFile(path))
    assert samples.dtype == np.float32 and abs(len(samples) - 16000) < 1600
    assert np.argmax(np.abs(np.fft.rfft(samples[2000:10000]))) == 220  # 440 Hz in half a second


def test_48_khz_stereo_is_mixed_and_resampled(tmp_path: Path) -> None:
    left = _tone(1.0, 48000)
    soundfile.write(tmp_path / "a.wav", np.stack([left, np.zeros_like(left)], 1), 48000)
    samples = read_audio(AudioFile(tmp_path / "a.wav"))
    assert len(samples) == 16000 and np.abs(samples[4000:12000]).max() == pytest.approx(0.15, rel=0.02)
    assert duration(AudioFile(tmp_path / "a.wav")) == pytest.approx(1.0)


def test_a_part_of_a_file(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.arange(16000, dtype=np.int16), 16000)
    part = read_audio(AudioFile(tmp_path / "a.wav", start=0.25, seconds=0.5)) * 32768
    assert part.tolist() == list(range(4000, 12000))
    with pytest.raises(LorsError, match=r"expected a whole recording, got 0\.50 s of 1\.00 s"):
        read_audio(AudioFile(tmp_path / "a.wav", start=0.5, seconds=1.0))
    with pytest.raises(LorsError, match="length 0"):
        read_audio(AudioFile(tmp_path / "a.wav", start=2, seconds=1.0))


def test_unusable_audio(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.mp3").write_text("not audio at all")
    for name in ("cut.mp3", "cut.flac", "cut.ogg"):
        soundfile.write(tmp_path / name, _tone(3.0), 16000)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
    soundfile.write(tmp_path / "short.wav", _tone(3 / 48000, 48000)[:1], 48000)
    soundfile.write(tmp_path / "zero.wav", np.zeros(0, np.float32), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan, np.float32), 16000, subtype="FLOAT")
    for name, said in [
        ("absent.wav", "no such file"),
        (".", "a directory"),
        ("empty.wav", "expected WAV, FLAC, MP3, Ogg or Opus"),
        ("text.mp3", "expected WAV, FLAC, MP3, Ogg or Opus"),
        ("zero.wav", "expected samples, got a file of length 0"),
        ("short.wav", "expected samples, got a file of length 0"),
        ("cut.mp3", r"expected a whole recording, got 1\.\d\d s of 3\.00 s"),
        ("cut.flac", "expected WAV, FLAC, MP3, Ogg or Opus"),
        ("cut.ogg", "expected WAV, FLAC, MP3, Ogg or Opus"),
        ("nan.wav", "expected finite samples"),
    ]:
        with pytest.raises(LorsError, match=said) as error:
            read_audio(AudioFile(tmp_path / name))
        assert f"cannot read audio {tmp_path / name}" in str(error.value) and "\n" not in str(error.value)


def _wav(rate: int, channels: int = 1, frames: int = 16000) -> bytes:
    """16 bits per sample, all of them zero."""
    data = bytes(2 * channels * frames)
    fmt = struct.pack("<HHLLHH", 1, channels, rate, rate * channels * 2 % 2**32, channels * 2, 16)
    return (
        b"RIFF"
        + struct.pack("<L", 36 + len(data))
        + b"WAVEfmt "
        + struct.pack("<L", 16)
        + fmt
        + b"data"
        + struct.pack("<L", len(data))
        + data
    )


def test_headers_that_lie(tmp_path: Path) -> None:
    """Rates and lengths are looked at before a sample is read: one second of 1 Hz would become 256 million samples."""
    for rate in (1, 3999, 384_001, 2**31 - 1):
        (tmp_path / f"{rate}.wav").write_bytes(_wav(rate))
    (tmp_path / "channels.wav").write_bytes(_wav(16000, 65, 100))
    soundfile.write(tmp_path / "hours.flac", np.zeros(16000 * 3600, np.int16), 16000)
    soundfile.write(tmp_path / "lies.flac", _tone(1.0), 16000)
    flac = bytearray((tmp_path / "lies.flac").read_bytes())
    flac[21:26] = bytes([flac[21] & 0xF0 | 0x0F]) + b"\xff" * 4  # 2^36 - 1 samples in all
    (tmp_path / "lies.flac").write_bytes(flac)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, said in [
        ("1.wav", "expected a sampling rate from 4000 to 384000 Hz, got 1"),
        ("3999.wav", "expected a sampling rate from 4000 to 384000 Hz, got 3999"),
        ("384001.wav", "expected a sampling rate"),
        ("2147483647.wav", "expected "),
        ("channels.wav", "expected at most 64 channels, got 65"),
        ("hours.flac", r"expected at most 60 s, got 3600\.0 s"),
        ("lies.flac", "expected "),
    ]:
        with pytest.raises(LorsError, match=f"cannot read audio .*{name}: {said}"):
            read_audio(AudioFile(tmp_path / name))
        if "hours" not in name and "lies" not in name:
            with pytest.raises(LorsError, match=f"cannot read audio .*{name}: {said}"):
                duration(AudioFile(tmp_path / name))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kB"


def test_spans_that_lie(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", _tone(1.0), 16000)
    for start, seconds, said in (
        (0.0, 1e300, "expected at most 60 s"),
        (0.0, 61.0, "expected at most 60 s, got 61.0 s"),
        (1e300, 1.0, "length 0"),
        (1e308, None, "length 0"),
        (0.0, 59.0, "expected a whole recording"),
    ):
        with pytest.raises(LorsError, match=said):
            read_audio(AudioFile(tmp_path / "a.wav", start, seconds))


def test_channels_are_averaged_in_blocks(tmp_path: Path) -> None:
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, (16000 * 3, 64)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", sound, 16000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(AudioFile(tmp_path / "a.wav")), sound.mean(axis=1), atol=1e-6)


# ------------------------------------------------------------------------------------------------------- manifest


def test_tsv_manifest(tmp_path: Path) -> None:
    rows = ["id|audio|text|translation|language|split", 'a|a.wav|una "cita|a quote|ca|train', "b|b.wav|zwei||de|train",
            "c|c.wav|tres|three|ca|test"]  # fmt: skip
    path = _tsv(tmp_path / "m.tsv", *rows)
    corpus = load_corpus(path, languages="ca,de")
    assert [(u.id, u.text, u.translation, u.language) for u in corpus] == [
        ("a", 'una "cita', "a quote", "ca"),
        ("b", "zwei", None, "de"),
    ]
    assert corpus[0].audio == AudioFile(tmp_path / "a.wav")
    assert [u.id for u in by_task(corpus, "translate")] == ["a"]
    assert [u.id for u in load_corpus(path, languages="ca", split="test")] == ["c"]


def test_jsonl_manifest(tmp_path: Path) -> None:
    lines = [{"audio": f"{i}.wav", "sentence": str(i), "language": "sv-SE"} for i in range(3)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(load_corpus(tmp_path / "m.jsonl", languages="sv", limit=2)) == 2
    assert [u.id for u in load_corpus(tmp_path / "m.jsonl", languages="sv")] == ["0.wav", "1.wav", "2.wav"]
    (tmp_path / "n.jsonl").write_text('{"audio": "a.wav", "text": null, "translation": null, "language": "sv"}')
    utterance = load_corpus(tmp_path / "n.jsonl", languages="sv")[0]
    assert utterance.text == "" and utterance.translation is None  # null is not the word "None"


def test_length_filter(tmp_path: Path) -> None:
    for name, seconds in (("a", 0.2), ("b", 3.0), ("c", 0.4)):
        soundfile.write(tmp_path / f"{name}.wav", _tone(seconds), 16000)
    path = _tsv(tmp_path / "m.tsv", "audio|text|language", *(f"{n}.wav|x|ca" for n in "abc"))
    assert [u.id for u in load_corpus(path, languages="ca", max_seconds=1, limit=2)] == ["a.wav", "c.wav"]


def test_samples_are_seeded_and_spread_over_speakers(tmp_path: Path) -> None:
    """Twelve of 90 by one speaker who comes first, and ten of one each: a head of the file would be one voice."""
    rows = [f"u{i:03}|{i}.wav|x|ca|{'one' if i < 80 else i}" for i in range(90)]
    path = _tsv(tmp_path / "m.tsv", "id|audio|text|language|speaker", *rows)

    def sample(limit: int, seed: int = 0) -> list[str]:
        return [u.id for u in load_corpus(path, languages="ca", limit=limit, seed=seed)]

    chosen = load_corpus(path, languages="ca", limit=12)
    assert len({u.speaker for u in chosen}) == 11 and len(chosen) == 12
    assert sample(12) == sample(12) == sorted(sample(12)) and sample(12) != sample(12, seed=1)
    assert set(sample(12)) < set(sample(30)) and sample(90) == sample(1000) == [f"u{i:03}" for i in range(90)]
    backwards = _tsv(tmp_path / "n.tsv", "id|audio|text|language|speaker", *reversed(rows))
    assert {u.id for u in load_corpus(backwards, languages="ca", limit=12)} == set(sample(12)), "whatever their order"
    unknown = _tsv(tmp_path / "o.tsv", "id|audio|text|language", *(row.rsplit("|", 1)[0] for row in rows))
    drawn = [int(u.id[1:]) for u in load_corpus(unknown, languages="ca", limit=30)]
    assert min(drawn) < 20 and max(drawn) > 70


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    rows = [f"u{i}|a.wav|x|ca" for i in range(98)]
    path = _tsv(tmp_path / "m.tsv", "id|audio|text|language", *rows, "cut|a.wav", "none||x|ca")
    with pytest.raises(LorsError, match="m.tsv:100: expected 4 columns"):
        load_corpus(path, languages="ca")
    left_out = LeftOut(share=0.02)
    assert left_out.told() == ""
    assert len(load_corpus(path, languages="ca", left_out=left_out)) == 98
    assert [line.split(": ")[0].rsplit(":")[-1] for line in left_out.unusable] == ["100", "101"]
    assert left_out.told().startswith("left out: 2 unusable, the first: ") and left_out.longer == 0
    with pytest.raises(
        LorsError, match=r"m.tsv: expected at most 1 % of 100 rows .* got 2; the first: .*m.tsv:100: exp"
    ):
        load_corpus(path, languages="ca", left_out=LeftOut(share=0.01))
    # Rows of a large table are not held against a small sample of it, nor against the next table.
    left_out = LeftOut(share=0.02)
    assert len(load_corpus(path, languages="ca", limit=5, left_out=left_out)) == 5
    left_out.require_few("sample", 5)
    (tmp_path / "small.jsonl").write_text(json.dumps({"audio": "a.wav", "text": "x", "language": "ca"}))
    assert len(load_corpus(tmp_path / "small.jsonl", languages="ca", left_out=left_out)) == 1
    assert len(left_out.unusable) == 2
    left_out.note(["a clip"])
    with pytest.raises(LorsError, match="of 5 rows and recordings .* got 1; the first: a clip"):
        left_out.require_few("sample", 5)
    lines = [json.dumps({"audio": f"{i}.wav", "text": "x", "language": "ca"}) for i in range(99)]
    (tmp_path / "m.jsonl").write_text("\n".join([*lines, '{"audio": ']))
    left_out = LeftOut(share=0.01)
    assert (
        len(load_corpus(tmp_path / "m.jsonl", languages="ca", left_out=left_out)) == 99 and len(left_out.unusable) == 1
    )


def test_recordings_that_are_too_long_or_broken_are_counted(tmp_path: Path) -> None:
    for name, seconds in (("a", 0.2), ("b", 3.0), ("c", 0.4)):
        soundfile.write(tmp_path / f"{name}.wav", _tone(seconds), 16000)
    (tmp_path / "d.wav").write_bytes(b"RIFF")
    path = _tsv(tmp_path / "m.tsv", "audio|text|language", *(f"{n}.wav|x|ca" for n in "abcd"))
    left_out = LeftOut(share=0.5)
    chosen = load_corpus(path, languages="ca", max_seconds=1, left_out=left_out)
    assert [u.id for u in chosen] == ["a.wav", "c.wav"] and left_out.longer == 1
    assert len(left_out.unusable) == 1 and "cannot read audio" in left_out.unusable[0]
    assert left_out.told().startswith("left out: 1 recordings too long; 1 unusable")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["id|audio|language", "a|a.wav|ca"], "expected a column 'text' or 'sentence' or 'transcription'"),
        (["id|audio|text", "a|a.wav|x"], "expected a column 'language'"),
        (["id|audio|text|language", "a|a.wav|x|ca", "a|b.wav|y|ca"], "expected ids that differ, got 'a' twice"),
        (["id|audio|text|language", "a|a.wav|x"], "m.tsv:2: expected 4 columns"),
        (["id|audio|text|language", "a|a.wav|x|ca|de"], "m.tsv:2: expected 4 columns"),
        (["id|audio|text|language", "", "a|a.wav|x"], "m.tsv:3: expected 4 columns"),
        (["id|audio|text|text|language", "a|a.wav|x|y|ca"], "expected columns of different names, got 'id', 'audio'"),
        (
            ["id,audio,text,language", "a,a.wav,x,ca"],
            "expected a column 'language' between tabs, got 'id,audio,text,la",
        ),
        (["id|audio|text|language", f"a|a.wav|{'x' * 200_000}|ca"], "m.tsv:1: expected a row of a table: field larger"),
        (["id|audio|text|language", "a|a.wav|x|da"], "no 'ca' in split 'train', did you mean 'da'|no 'ca'"),
        (["id|audio|text|language", "a|a.wav|x| "], "m.tsv:2: expected a language, got ' '"),
        (["id|audio|text|language|split", "a|a.wav|x|ca|test"], "expected utterances in split 'train', got test"),
        (["id|audio|text|language"], "expected utterances in split 'train', got nothing"),
        (["id|audio|text|language", "a||x|ca"], "m.tsv:2: expected the path of a recording, got ''"),
        (
            ["id|audio|text|language|seconds", "a|a.wav|x|ca|long"],
            "m.tsv:2: expected start and seconds, got nothing and 'long'",
        ),
        (
            ["id|audio|text|language|seconds", "a|a.wav|x|ca|nan"],
            "m.tsv:2: expected start and seconds, got nothing and 'nan'",
        ),
        (
            ["id|audio|text|language|seconds", "a|a.wav|x|ca|-1"],
            "m.tsv:2: expected start and seconds, got nothing and '-1'",
        ),
        (["id|audio|text|language|start|seconds", "a|a.wav|x|ca|-1|1"], "expected start and seconds, got '-1' and '1'"),
    ],
)
def test_wrong_manifests(tmp_path: Path, rows: list[str], said: str) -> None:
    with pytest.raises(LorsError, match=said):
        load_corpus(_tsv(tmp_path / "m.tsv", *rows), languages="ca")


def test_manifests_of_other_systems(tmp_path: Path) -> None:
    """With a byte order mark, Windows line ends, blank lines, spaces about a code, ids that are numbers."""
    table = '\ufeffid\taudio\ttext\tlanguage\r\n\r\na\ta.wav\tuna «cita"\t CA \r\n'
    (tmp_path / "m.tsv").write_text(table, "utf-8", newline="")
    rows = '\ufeff{"id": 0, "audio": "a.wav", "text": "x", "language": "ca"}\r\n\r\n'
    (tmp_path / "m.jsonl").write_text(rows, "utf-8", newline="")
    assert [(u.id, u.text) for u in load_corpus(tmp_path / "m.tsv", languages="ca")] == [("a", 'una «cita"')]
    assert [u.id for u in load_corpus(tmp_path / "m.jsonl", languages="ca")] == ["0"]


def test_choosing_from_a_loaded_corpus(catalan: Corpus) -> None:
    three = load_corpus(catalan, languages="ca", split="test", limit=3)
    assert len(three) == 3 and three == [u for u in catalan if u in three]
    assert load_corpus(catalan, languages="ca", split=None) == catalan
    with pytest.raises(LorsError, match="common_voice:x: expected a split of the corpus, got none"):
        load_corpus("common_voice:x", languages="ca", split=None)
    shortest = min(duration(u.audio) for u in catalan)
    assert len(load_corpus(catalan, languages="ca", split="test", max_seconds=shortest)) == 1
    for options, said in [
        ({"languages": "ca", "split": "train"}, "corpus: expected utterances in split 'train', got test"),
        ({"languages": "ca,de", "split": "test"}, "corpus: no 'de' in split 'test'"),
        ({"languages": "ca", "split": "test", "limit": 0}, "corpus: expected a limit of at least 1, got 0"),
        ({"languages": "ca", "split": "test", "max_seconds": 0.1}, "'ca' in split 'test' of at most 0.1 s, got none"),
    ]:
        with pytest.raises(LorsError, match=said):
            load_corpus(catalan, **options)  # type: ignore[arg-type]
    with pytest.raises(LorsError, match="expected ids that differ"):
        load_corpus(catalan + catalan[:1], languages="ca", split="test")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"seconds": 10**400}, "expected start and seconds, got nothing and an integer of 1329 bits"),
        ({"seconds": 1, "start": 10**400}, "expected start and seconds"),
        ({"seconds": True}, "expected start and seconds, got nothing and true"),
        ({"seconds": [[[1]]]}, "expected start and seconds"),
        ({"id": [1]}, "expected text in 'id', got \\[1\\]"),
        ({"id": True}, "expected text in 'id', got true"),
        ({"text": {"a": 1}}, "expected text in 'text', got a mapping"),
        ({"audio": "a\0b.wav"}, "expected text in 'audio'"),
        ({"audio": "\ud800"}, "half of a surrogate pair"),
        ({"language": 3}, "expected text in 'language', got 3"),
        ({"text": "x" * 2**20}, "expected lines of less than 1048576 characters"),
    ],
)
def test_rows_with_values_of_other_types(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio": "a.wav", "text": "x", "language": "ca"} | row))
    with pytest.raises(LorsError, match=f"m.jsonl:1: .*{said}"):
        load_corpus(tmp_path / "m.jsonl", languages="ca")


def test_wrong_files(tmp_path: Path) -> None:
    (tmp_path / "latin.tsv").write_bytes("audio\ttext\tlanguage\na.wav\tñ\tca\n".encode("latin-1"))
    good = '{"audio": "a.wav", "text": "x", "language": "ca"}\n'
    (tmp_path / "broken.jsonl").write_text(good + '{"audio": \n')
    (tmp_path / "latin.jsonl").write_bytes(good.replace('"x"', '"ñ"').encode("latin-1"))
    (tmp_path / "nan.jsonl").write_text(good.replace('"x"', "NaN"))  # how pandas writes a text that is missing
    (tmp_path / "half.jsonl").write_text(good.replace('"x"', r'"\ud800"'))
    (tmp_path / "list.jsonl").write_text("[1]")
    for name, said in [
        ("latin.tsv", "expected UTF-8 text, got byte 0xf1"),
        ("latin.jsonl", "expected UTF-8 text, got byte 0xf1"),
        ("broken.jsonl", "broken.jsonl:2: not JSON"),
        ("nan.jsonl", "nan.jsonl:1: expected text in 'text', got nan"),
        ("half.jsonl", "half of a surrogate pair"),
        ("list.jsonl", "list.jsonl:1: expected one JSON object per line, got .1."),
        ("absent.tsv", "cannot read"),
        ("x.csv", "expected a .tsv or .jsonl manifest"),
    ]:
        with pytest.raises(LorsError, match=said):
            load_corpus(tmp_path / name, languages="ca")


# ------------------------------------------------------------------------------------------------- public corpora


@pytest.fixture
def common_voice(tmp_path: Path, catalan: Corpus) -> Path:
    """cv/<code>/{clips/*.mp3, train.tsv, validated.tsv} with the columns of Common Voice 4 and later."""
    root = tmp_path / "cv" / "sv-SE"
    (root / "clips").mkdir(parents=True)
    header = "client_id|path|sentence|up_votes|down_votes|age|gender|accent"
    rows = [f"0a{i}|common_voice_sv-SE_{i}.mp3|{u.text}|2|0||| " for i, u in enumerate(catalan[:4])]
    for i, u in enumerate(catalan[:4]):
        soundfile.write(root / "clips" / f"common_voice_sv-SE_{i}.mp3", read_audio(u.audio), 16000, format="MP3")
    _tsv(root / "train.tsv", header, *rows[:2])
    _tsv(root / "validated.tsv", header, *rows)
    return tmp_path / "cv"


def test_common_voice(common_voice: Path, catalan: Corpus) -> None:
    for place in (common_voice, common_voice / "sv-SE"):
        corpus = load_corpus(f"common_voice:{place}", languages="sv")
        assert [u.text for u in corpus] == [u.text for u in catalan[:2]] and corpus[0].translation is None
        assert len(read_audio(corpus[0].audio)) > 8000
    with pytest.raises(LorsError, match="expected ca/clips or clips"):
        load_corpus(f"common_voice:{common_voice}", languages="ca")
    with pytest.raises(LorsError, match=r"cannot read .*test.tsv"):
        load_corpus(f"common_voice:{common_voice}", languages="sv", split="test")


def test_covost_by_the_official_rule(common_voice: Path) -> None:
    names = [f"common_voice_sv-SE_{i}.mp3" for i in range(4)]
    _tsv(
        common_voice / "covost_v2.sv-SE_en.tsv",
        "path|translation|split",
        rf"{names[2]}|a \"quoted\" two|train_covost",
        f"{names[0]}|zero|train",
        f"{names[1]}|one|dev",
        f"{names[3]}|three|test_covost",
        "common_voice_sv-SE_99.mp3|not validated|train",
    )
    source = f"covost2:{common_voice}"
    # In validated.tsv's order, and the additions of version 1 to dev and test belong to no split of version 2.
    assert [(u.id, u.translation) for u in load_corpus(source, languages="sv")] == [
        (names[0], "zero"),
        (names[2], 'a "quoted" two'),
    ]
    assert [u.translation for u in load_corpus(source, languages="sv", split="dev")] == ["one"]
    with pytest.raises(LorsError, match="expected utterances of 'sv' in split 'test', got none"):
        load_corpus(source, languages="sv", split="test")


def test_a_digest_sees_every_row(common_voice: Path) -> None:
    """Of CoVoST's tables: a translation, a text and a recording that change, and nothing else."""
    table = common_voice / "sv-SE" / "covost_v2.sv-SE_en.test.tsv"
    text = "path|sentence|translation|client_id\ncommon_voice_sv-SE_0.mp3|ett|one|a\n".replace("|", "\t")
    source = f"covost2:{common_voice}"

    def digest(text: str = text) -> str:
        table.write_text(text, "utf-8")
        return corpus_digest(source, languages=["sv"], split="test")

    first = digest()
    assert digest() == first
    assert digest(text.replace("one", "One")) != first and digest(text.replace("ett", "Ett")) != first
    assert digest() == first
    clip = load_corpus(source, languages="sv", split="test")[0].audio
    assert isinstance(clip, AudioFile)
    clip.path.write_bytes(clip.path.read_bytes() + b"x")
    assert digest() != first


def test_covost_ready_split(common_voice: Path) -> None:
    rows = ["path|sentence|translation|client_id", "common_voice_sv-SE_1.mp3|ett|one|0a"]
    _tsv(common_voice / "sv-SE" / "covost_v2.sv-SE_en.dev.tsv", *rows)
    assert [u.text for u in load_corpus(f"covost2:{common_voice}", languages="sv", split="dev")] == ["ett"]
    with pytest.raises(LorsError, match=r"covost_v2.sv-SE_en.test.tsv or covost_v2.sv-SE_en.tsv, got neither"):
        load_corpus(f"covost2:{common_voice}", languages="sv", split="test")


# ------------------------------------------------------------------------------------------------------- features


def _recordings(directory: Path, **seconds: float) -> list[AudioFile]:
    for name, length in seconds.items():
        soundfile.write(directory / f"{name}.wav", _tone(length), 16000)
    return [AudioFile(directory / f"{name}.wav") for name in seconds]


def test_features_are_kept_by_content(tmp_path: Path) -> None:
    extractor = load_processor("tiny").feature_extractor
    (audio,) = _recordings(tmp_path, a=1.0)
    features = Features(extractor, tmp_path / "cache")
    first = features.of(audio)
    assert np.array_equal(first, log_mel(audio, extractor)) and first.shape == (80, 200)
    (kept,) = (tmp_path / "cache").glob("*/*.npy")
    stamp = kept.stat().st_mtime_ns
    assert np.array_equal(Features(extractor, tmp_path / "cache").of(audio), first)
    assert kept.stat().st_mtime_ns == stamp
    assert features.held() == kept.stat().st_size < 0.6 * first.nbytes, "silence after a second of two is not kept"
    soundfile.write(tmp_path / "a.wav", 0.1 * _tone(0.7), 16000)
    assert not np.array_equal(first, features.of(audio))


def test_features_of_any_length_come_back_as_they_were(tmp_path: Path) -> None:
    extractor = load_processor("tiny").feature_extractor
    (tmp_path / "silence.wav").unlink(missing_ok=True)
    soundfile.write(tmp_path / "silence.wav", np.zeros(8000), 16000)
    recordings = [*_recordings(tmp_path, whole=2.0, short=0.01, half=1.003), AudioFile(tmp_path / "silence.wav")]
    features = Features(extractor, tmp_path / "cache")
    for audio in (*recordings, *recordings):
        assert np.array_equal(features.of(audio), log_mel(audio, extractor)), audio.name


def test_features_are_those_of_the_library(tmp_path: Path, catalan: Corpus) -> None:
    """Which computes the whole window, silence too."""
    extractor = WhisperFeatureExtractor(feature_size=128)
    silence, whole = _recordings(tmp_path, silence=0.0001, whole=30.0)
    for audio in (*(u.audio for u in catalan[:5]), silence, whole):
        want = extractor([read_audio(audio)], sampling_rate=16000, return_tensors="np")["input_features"][0]
        np.testing.assert_allclose(log_mel(audio, extractor), want, atol=1e-3)


def test_features_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = load_processor("tiny").feature_extractor
    recordings = _recordings(tmp_path, **{f"r{i}": 1.0 + i / 100 for i in range(8)})
    monkeypatch.setattr(features_module, "_RECOUNT", 1)
    features = Features(extractor, tmp_path / "cache", bound=60_000)  # three of them
    want = [log_mel(audio, extractor) for audio in recordings]
    for _ in range(2):
        assert all(np.array_equal(features.of(a), mel) for a, mel in zip(recordings, want, strict=True))
    assert 40_000 < features.held() < 80_000
    other, Usage = Features(extractor, tmp_path / "other"), namedtuple("Usage", "total used free")
    monkeypatch.setattr(features_module.shutil, "disk_usage", lambda _: Usage(1000, 960, 40))
    assert np.array_equal(other.of(recordings[0]), want[0]) and other.held() == 0, "the disk is nearly full"


def test_features_are_computed_by_one_of_those_who_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = load_processor("tiny").feature_extractor
    recordings = _recordings(tmp_path, a=1.0, b=0.5, c=0.7)
    computed: list[str] = []

    def slow(audio: AudioFile, extractor: Any, longest: float) -> Any:
        computed.append(audio.name)
        time.sleep(0.1)
        return log_mel(audio, extractor, longest)

    monkeypatch.setattr(features_module, "log_mel", slow)
    askers = [Features(extractor, tmp_path / "cache") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda features: [features.of(audio) for audio in recordings], askers))
    assert sorted(computed) == [audio.name for audio in recordings]


def test_overlong_audio_is_an_error(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", _tone(2.5), 16000)
    path = _tsv(tmp_path / "m.tsv", "audio|text|language", "a.wav|x|ca")
    with pytest.raises(LorsError, match=r"expected at most 2 s, the model's window, got 2.5 s"):
        log_mel(load_corpus(path, languages="ca")[0].audio, load_processor("tiny").feature_extractor)
