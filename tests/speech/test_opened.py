"""Corpora that the library `datasets` opens, FLEURS and Common Voice's archives: miniature copies in the exact formats."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile

from lors.errors import LorsError
from lors.speech.data import opened as opened_module
from lors.speech.data.audio import AudioFile, read_audio
from lors.speech.data.corpus import corpus_digest, is_kind, load_corpus
from lors.speech.data.left_out import LeftOut
from lors.speech.data.utterance import Corpus
from lors.speech.scoring.evaluation import evaluate

LANGUAGES = ("ca", "sv-SE", "ca", "ca", "sv-SE", "ca")


def _encoded(samples: np.ndarray, kind: str = "FLAC") -> bytes:
    stream = io.BytesIO()
    container, subtype = {"OPUS": ("OGG", "OPUS")}.get(kind, (kind, None))
    soundfile.write(stream, samples, 16000, format=container, subtype=subtype)
    return stream.getvalue()


def _archive(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def six(catalan: Corpus) -> list[tuple[str, np.ndarray]]:
    """Texts and samples."""
    return [(u.text, read_audio(u.audio)) for u in catalan[:6]]


Six = list[tuple[str, np.ndarray]]


def _table(six: Six, **more: Sequence[Any]) -> datasets.Dataset:
    """As the hub's Common Voice: the recording inside, with columns of the locale and of the speaker."""
    columns: dict[str, Any] = {
        "client_id": [f"speaker {i // 2}" for i in range(len(six))],
        "audio": [{"bytes": _encoded(x), "path": f"{i}.flac"} for i, (_, x) in enumerate(six)],
        "sentence": [text for text, _ in six],
        "locale": list(LANGUAGES),
    }
    table = datasets.Dataset.from_dict(columns | more)
    return table.cast_column("audio", datasets.Audio(decode=False))


def _parquet(root: Path, six: Six) -> str:
    (root / "data").mkdir()
    _table(six).to_parquet(str(root / "data" / "train-00000-of-00001.parquet"))
    return f"{root}"


def _parquet_file(root: Path, six: Six) -> str:
    _table(six).to_parquet(str(root / "all.parquet"))
    return f"{root / 'all.parquet'}"


def _saved(root: Path, six: Six) -> str:
    datasets.DatasetDict({"train": _table(six)}).save_to_disk(str(root / "saved"))
    return f"{root / 'saved'}"


def _saved_one(root: Path, six: Six) -> str:
    """A table without splits, whose rows were chosen: they are not stored as they are counted."""
    _table([*six, *six[:1]], locale=[*LANGUAGES, "ca"]).select([0, 1, 2, 3, 4, 5]).save_to_disk(str(root / "saved"))
    return f"{root / 'saved'}"


def _folder(kind: str) -> Callable[[Path, Six], str]:
    def write(root: Path, six: Six) -> str:
        (root / "train").mkdir()
        for i, (_, samples) in enumerate(six):
            (root / "train" / f"{i}.{kind.lower()}").write_bytes(_encoded(samples, kind))
        rows = [
            {"file_name": f"{i}.{kind.lower()}", "transcription": six[i][0], "language": LANGUAGES[i]} for i in range(6)
        ]
        (root / "train" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return f"{root}"

    return write


def _web(root: Path, six: Six) -> str:
    for shard in range(2):
        members = []
        for i in range(3 * shard, 3 * shard + 3):
            members.append((f"utterance{i}.mp3", _encoded(six[i][1], "MP3")))
            members.append((f"utterance{i}.json", json.dumps({"text": six[i][0], "language": LANGUAGES[i]}).encode()))
        _archive(root / f"train-{shard:05d}.tar", members)
    return f"{root}"


def _csv(root: Path, six: Six) -> str:
    """Paths in a table, which name no type."""
    rows = ["path,text,language"]
    for i, (text, samples) in enumerate(six):
        (root / f"{i}.flac").write_bytes(_encoded(samples))
        rows.append(f"{root / f'{i}.flac'},{text},{LANGUAGES[i]}")
    (root / "tables").mkdir()
    (root / "tables" / "train.csv").write_text("\n".join(rows) + "\n", "utf-8")
    return f"{root / 'tables'}"


SHAPES = {
    "csv": _csv,
    "parquet": _parquet,
    "parquet file": _parquet_file,
    "saved": _saved,
    "saved table": _saved_one,
    "folder of wav": _folder("WAV"),
    "folder of opus": _folder("OPUS"),
    "webdataset": _web,
}


@pytest.mark.parametrize("streaming", ["", ",streaming=100"])
@pytest.mark.parametrize("shape", SHAPES)
def test_whatever_datasets_opens(tmp_path: Path, six: Six, shape: str, streaming: str) -> None:
    source = f"datasets:{SHAPES[shape](tmp_path, six)}{streaming}"
    for language, code in (("ca", "ca"), ("sv", "sv-SE")):
        corpus = load_corpus(source, languages=language)
        want = [six[i] for i in range(6) if LANGUAGES[i] == code]
        assert [u.text for u in corpus] == [text for text, _ in want]
        for utterance, (_, samples) in zip(corpus, want, strict=True):
            heard = read_audio(utterance.audio)
            lost = (
                0.5 if shape in ("folder of opus", "webdataset") else 1e-3
            )  # of the norm: noisy speech through mp3, opus
            assert abs(len(heard) - len(samples)) < 100 and utterance.audio.size
            size = min(len(heard), len(samples))
            error = np.linalg.norm(heard[:size] - np.clip(samples[:size], -1, 1)) / np.linalg.norm(samples[:size])
            assert error < lost


def test_streams_are_read_so_far_and_kept(tmp_path: Path, six: Six, monkeypatch: pytest.MonkeyPatch) -> None:
    source, read = f"datasets:{_parquet(tmp_path, six)},streaming=2", list[str]()
    fetched = opened_module._fetched
    monkeypatch.setattr(opened_module, "_fetched", lambda sound: read.append(sound["path"]) or fetched(sound))
    first = load_corpus(source, languages="ca")
    assert [u.text for u in first] == [six[0][0], six[2][0]] and read == ["0.flac", "2.flac"]
    again = load_corpus(source, languages="ca")
    assert read == ["0.flac", "2.flac"], "kept by the library"
    assert [(u.id, u.audio.key) for u in again] == [(u.id, u.audio.key) for u in first]
    for wrong in ("0", "all"):
        with pytest.raises(LorsError, match=f"expected the number of rows in streaming, got '{wrong}'"):
            load_corpus(source.replace("=2", f"={wrong}"), languages="ca")


def test_columns_are_found_or_named(tmp_path: Path, six: Six) -> None:
    table = _table(six, said=["x"] * 6, english=["y"] * 6, who=[7] * 6, number=list(range(10, 16)))
    table = table.rename_column("audio", "sound").rename_column("sentence", "text").remove_columns("client_id")
    table.to_parquet(str(tmp_path / "t.parquet"))
    source = f"datasets:{tmp_path / 't.parquet'}"
    (first, *_) = load_corpus(source, languages="sv")
    assert first.text == six[1][0] and first.translation is None and first.speaker is None
    named = ",text_column_name=said,translation_column_name=english,speaker_column_name=who,id_column_name=number"
    (first, *_) = load_corpus(source + named, languages="sv")
    assert (first.text, first.translation, first.speaker, first.id) == ("x", "y", "7", "sv/train/1/11")
    assert [u.id for u in load_corpus(f"{source},language=de", languages="de")][0] == "de/train/0"
    for option, said in [
        (",text_column_name=sayd", r"expected a column 'sayd', got sound, text, .*, did you mean 'said'\?"),
        (",text_colum_name=said", r"no option 'text_colum_name', did you mean 'text_column_name'\?"),
        (",language=de", "expected utterances of 'sv' in split 'train', got none"),
    ]:
        with pytest.raises(LorsError, match=said):
            load_corpus(source + option, languages="sv")
    table.remove_columns(["text", "said"]).to_parquet(str(tmp_path / "t.parquet"))
    with pytest.raises(
        LorsError, match="expected a column 'text' or .* got sound, locale, .*; name it by ,text_column"
    ):
        load_corpus(source, languages="sv")
    table.remove_columns(["locale"]).to_parquet(str(tmp_path / "t.parquet"))
    with pytest.raises(LorsError, match=r"expected a column 'language', ,language=CODE or \{language\} in the name"):
        load_corpus(source, languages="sv")


@pytest.mark.parametrize(("mark", "name"), [("language", "sv"), ("name", "swedish"), ("common_voice", "sv-SE")])
def test_a_language_in_the_name(tmp_path: Path, six: Six, mark: str, name: str) -> None:
    """Corpora with a configuration, or a directory, for each language: their rows need not say theirs."""
    (tmp_path / name).mkdir()
    _table(six, locale=["Dalarna"] * 6).to_parquet(str(tmp_path / name / "train-00000-of-00001.parquet"))
    assert len(load_corpus(f"datasets:{tmp_path}/{{{mark}}}", languages="sv")) == 6, "whatever a column says"
    table = _table(six, locale=["Swedish"] * 6)
    table.to_parquet(str(tmp_path / name / "train-00000-of-00001.parquet"))
    assert len(load_corpus(f"datasets:{tmp_path}/{name}", languages="sv")) == 6, "an English name in a column"
    labels = datasets.ClassLabel(names=["German", "Swedish"])
    table.cast_column("locale", labels).to_parquet(str(tmp_path / name / "train-00000-of-00001.parquet"))
    assert len(load_corpus(f"datasets:{tmp_path}/{name}", languages="sv")) == 6, "and one that is numbered"
    assert len(load_corpus(f"datasets:{tmp_path}/{name},streaming=9", languages="sv")) == 6


def test_splits(tmp_path: Path, six: Six) -> None:
    table = _table(six)
    tables = {"train": table, "validation": table.select([0]), "clean": table.select([2, 3])}
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "saved"))
    source = f"datasets:{tmp_path / 'saved'}"
    assert [u.id for u in load_corpus(source, languages="ca", split="dev")] == ["ca/dev/0"]
    assert len(load_corpus(f"{source},test=clean", languages="ca", split="test")) == 2
    with pytest.raises(LorsError, match="expected a split test, got train, validation, clean; name it by ,test="):
        load_corpus(source, languages="ca", split="test")


def test_rows_and_recordings_that_cannot_be_used_are_counted(tmp_path: Path, catalan: Corpus) -> None:
    six = [(u.text, read_audio(u.audio)) for u in catalan[:6]]
    columns = {
        "audio": [{"bytes": _encoded(x), "path": f"{i}.flac"} for i, (_, x) in enumerate(six)],
        "text": [*[text for text, _ in six[:5]], None],
    }
    columns["audio"][1]["bytes"] = b"RIFF"
    columns["audio"][2] = {"bytes": None, "path": None}
    table = datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio(decode=False))
    table.to_parquet(str(tmp_path / "t.parquet"))
    source = f"datasets:{tmp_path / 't.parquet'},language=ca"
    with pytest.raises(LorsError, match="t.parquet:5: expected texts, got nothing and nothing"):
        load_corpus(source, languages="ca")
    result = evaluate("tiny", data=source, languages="ca", split="train", unusable=0.6)
    assert len(result.results[0].answers) == 3
    said = " ".join(result.left_out.unusable)
    assert "t.parquet:5: expected texts" in said and "t.parquet:1: expected WAV, FLAC" in said
    assert "t.parquet:2: expected bytes or a path in 'audio', got neither" in said
    with pytest.raises(LorsError, match="expected at most 20 % of 5 rows and recordings that cannot be used, got 2"):
        evaluate("tiny", data=source, languages="ca", split="train", unusable=0.2)


def test_samples_are_seeded_and_spread_over_speakers(tmp_path: Path, six: Six) -> None:
    rows = [six[i % 6] for i in range(40)]
    speakers = ["one"] * 30 + [f"s{i}" for i in range(10)]
    _table(rows, client_id=speakers, locale=["ca"] * 40).to_parquet(str(tmp_path / "t.parquet"))
    for streaming in ("", ",streaming=40"):
        source = f"datasets:{tmp_path / 't.parquet'}{streaming}"
        chosen = load_corpus(source, languages="ca", limit=12)
        assert len({u.speaker for u in chosen}) == 11
        ids = [[u.id for u in load_corpus(source, languages="ca", limit=12, seed=seed)] for seed in (0, 0, 1)]
        assert ids[0] == ids[1] != ids[2]


def test_a_digest_sees_every_row(tmp_path: Path, six: Six) -> None:
    source = f"datasets:{tmp_path / 't.parquet'}"
    assert is_kind(source), "so that an experiment asks for its rows"

    def digest(six: Six, options: str = "") -> str:
        _table(six).to_parquet(str(tmp_path / "t.parquet"))
        return corpus_digest(source + options, languages=["ca"], split="train")

    first = digest(six)
    assert digest(six) == first == digest(six, ",revision=main")
    assert digest([(six[0][0] + "!", six[0][1]), *six[1:]]) != first
    assert digest([(six[0][0], six[0][1][:-800]), *six[1:]]) != first
    assert digest([six[0], (six[1][0] + "!", six[1][1]), *six[2:]]) == first, "of another language"
    assert digest(six, ",streaming=3") != first


def test_samples_that_are_not_encoded(tmp_path: Path, six: Six) -> None:
    sounds = [{"array": samples.tolist(), "sampling_rate": 16000} for _, samples in six]
    datasets.Dataset.from_dict({"audio": sounds, "text": ["x"] * 6}).to_parquet(str(tmp_path / "t.parquet"))
    with pytest.raises(LorsError, match="t.parquet: expected encoded recordings or paths in 'audio': "):
        load_corpus(f"datasets:{tmp_path / 't.parquet'},language=ca", languages="ca")


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LorsError, match=r"speech needs datasets: pip install 'lors-merging\[speech\]'"):
        load_corpus(f"datasets:{tmp_path}", languages="ca")


def test_what_cannot_be_opened_is_one_line(tmp_path: Path, catalan: Corpus) -> None:
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    (tmp_path / "cut.tar").write_bytes(b"no archive")
    for place in ("cut.parquet", "cut.tar", "absent.parquet", "absent", "."):
        with pytest.raises(LorsError, match=r"datasets:.*: cannot be opened by datasets: ") as error:
            load_corpus(f"datasets:{tmp_path}/{place}", languages="ca")
        assert "\n" not in str(error.value)
    _web(tmp_path, [(u.text, read_audio(u.audio)) for u in catalan[:6]])
    (tmp_path / "train-00001.tar").write_bytes((tmp_path / "train-00001.tar").read_bytes()[:3000])
    for streaming, said in (("", "opened"), (",streaming=9", "read")):
        with pytest.raises(LorsError, match=f"cannot be {said} by datasets: ") as error:
            load_corpus(f"datasets:{tmp_path}/train-*.tar{streaming}", languages="ca")
        assert "\n" not in str(error.value)
    assert datasets.Audio.encode_example.__module__ == "datasets.features.audio", "the library is as it was"


@pytest.mark.parametrize("workers", [0, 2])
def test_other_processes_read_the_same(tmp_path: Path, six: Six, workers: int) -> None:
    _table(six, locale=["ca"] * 6).to_parquet(str(tmp_path / "t.parquet"))
    source = f"datasets:{tmp_path / 't.parquet'}"
    evaluation = evaluate("tiny", data=source, languages="ca", split="train", workers=workers, batch_size=2)
    for i, (_, samples) in enumerate(six):
        soundfile.write(tmp_path / f"{i}.wav", samples, 16000, subtype="FLOAT")
    rows = [f"{i}.wav\t{text}\tca" for i, (text, _) in enumerate(six)]
    (tmp_path / "m.tsv").write_text("\n".join(["audio\ttext\tlanguage", *rows]) + "\n", "utf-8")
    want = evaluate("tiny", data=tmp_path / "m.tsv", languages="ca", split="train").results[0].answers
    assert [a.hypothesis for a in evaluation.results[0].answers] == [a.hypothesis for a in want]


# --------------------------------------------------------------------------------------------------------- FLEURS

ENGLISH = {9: "Nine.", 11: "Eleven."}
NUMBERS = (7, 7, 9)


def _fleurs_parquet(root: Path, code: str, sentences: list[tuple[int, str, str, bytes]]) -> None:
    numbers, names, texts, sounds = zip(*sentences, strict=True)
    columns: dict[str, Any] = {
        "id": list(numbers),
        "path": list(names),
        "audio": [{"bytes": data, "path": name} for name, data in zip(names, sounds, strict=True)],
        "transcription": [text.lower() for text in texts],
        "raw_transcription": list(texts),
    }
    (root / code).mkdir(parents=True)
    table = datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio(decode=False))
    table.to_parquet(str(root / code / "validation-00000-of-00001.parquet"))


def _fleurs_tsv(root: Path, code: str, sentences: list[tuple[int, str, str, bytes]], unpack: bool = False) -> None:
    home = root / "data" / code
    home.mkdir(parents=True)
    rows = [f"{n}\t{name}\t{text}\t{text.lower()}\tx | y |\t1\tMALE\n" for n, name, text, _ in sentences]
    (home / "dev.tsv").write_text("".join(rows), "utf-8")
    if unpack:
        (home / "audio" / "dev").mkdir(parents=True)
        for _, name, _, data in sentences:
            (home / "audio" / "dev" / name).write_bytes(data)
    else:
        _archive(home / "audio" / "dev.tar.gz", [(f"dev/{name}", data) for _, name, _, data in sentences])


@pytest.fixture
def sentences(catalan: Corpus) -> dict[str, list[tuple[int, str, str, bytes]]]:
    quoted = 'Diu "això'  # as FLEURS has it, unbalanced
    spoken = [
        (n, f"1{i}.wav", quoted if i == 0 else u.text, _encoded(read_audio(u.audio), "WAV"))
        for i, (n, u) in enumerate(zip(NUMBERS, catalan, strict=False))
    ]
    english = [(n, f"2{n}.wav", text, spoken[0][3]) for n, text in ENGLISH.items()]
    return {"gl_es": spoken, "en_us": english}


def _fleurs_unpacked(root: Path, code: str, sentences: list[tuple[int, str, str, bytes]]) -> None:
    _fleurs_tsv(root, code, sentences, unpack=True)


@pytest.mark.parametrize("write", [_fleurs_parquet, _fleurs_tsv, _fleurs_unpacked])
def test_fleurs_in_every_layout(
    tmp_path: Path, sentences: dict[str, list[tuple[int, str, str, bytes]]], write: Any, catalan: Corpus
) -> None:
    for code, here in sentences.items():
        write(tmp_path, code, here)
    corpus = load_corpus(f"fleurs:{tmp_path}", languages="gl", split="dev")
    assert [u.id for u in corpus] == ["gl_es/dev/7/10.wav", "gl_es/dev/7/11.wav", "gl_es/dev/9/12.wav"]
    assert [u.translation for u in corpus] == [None, None, "Nine."] and corpus[0].text == 'Diu "això'
    for read, original in zip(corpus, catalan, strict=False):
        np.testing.assert_allclose(read_audio(read.audio), np.clip(read_audio(original.audio), -1, 1), atol=2**-14)
    with pytest.raises(LorsError, match=r"expected de_de/validation-\*.parquet or de_de/dev.tsv, got neither"):
        load_corpus(f"fleurs:{tmp_path}", languages="de", split="dev")
    with pytest.raises(LorsError, match="FLEURS: expected a known language, got 'eu'"):
        load_corpus(f"fleurs:{tmp_path}", languages="eu", split="dev")


def test_fleurs_that_is_not_whole(tmp_path: Path, sentences: dict[str, list[tuple[int, str, str, bytes]]]) -> None:
    home = tmp_path / "data" / "gl_es"
    _fleurs_tsv(tmp_path, "gl_es", sentences["gl_es"])
    (home / "dev.tsv").write_text(
        (home / "dev.tsv").read_text("utf-8") + "9\t19.wav\tx\tx\tx\t1\tMALE\nx\ty\n", "utf-8"
    )
    left_out = LeftOut(share=0.5)
    corpus = load_corpus(f"fleurs:{tmp_path}", languages="gl", split="dev", left_out=left_out)
    assert len(corpus) == 4 and "dev.tsv:5: expected 7 columns" in left_out.unusable[0]
    with pytest.raises(LorsError, match=r"cannot read audio .*dev/19\.wav: no such file"):
        read_audio(corpus[-1].audio)
    (home / "audio" / "dev.tar.gz").write_bytes(b"no archive")
    with pytest.raises(LorsError, match="gl_es: cannot be opened by datasets: "):
        load_corpus(f"fleurs:{tmp_path}", languages="gl", split="dev", left_out=LeftOut(share=0.5))
    other = tmp_path / "other"
    _fleurs_parquet(other, "gl_es", sentences["gl_es"])
    path = other / "gl_es" / "validation-00000-of-00001.parquet"
    table = datasets.Dataset.from_parquet(str(path))
    table.select([0]).remove_columns("raw_transcription").add_column("raw_transcription", [None]).to_parquet(str(path))
    with pytest.raises(LorsError, match="gl_es:0: expected an id and a text, got 7 and nothing"):
        load_corpus(f"fleurs:{other}", languages="gl", split="dev")
    table.remove_columns("audio").to_parquet(str(path))
    with pytest.raises(LorsError, match="gl_es: cannot be opened by datasets: .*audio"):
        load_corpus(f"fleurs:{other}", languages="gl", split="dev")


# --------------------------------------------------------------------------------------------------- Common Voice


def test_common_voice_as_archives(tmp_path: Path, six: Six) -> None:
    """As on the hub: a table for each split, and its clips in numbered archives with a directory inside."""
    names = [f"common_voice_sv-SE_{i}.mp3" for i in range(6)]
    rows = [f"c{i // 2}\t{names[i]}\t{six[i][0]}\t2\t0" for i in range(6)]
    table = tmp_path / "transcript" / "sv-SE" / "train.tsv"
    table.parent.mkdir(parents=True)
    table.write_text("\n".join(["client_id\tpath\tsentence\tup_votes\tdown_votes", *rows]) + "\n", "utf-8")
    for shard in range(2):
        members = [
            (f"sv-SE_train_{shard}/{names[i]}", _encoded(six[i][1], "MP3")) for i in range(3 * shard, 3 * shard + 3)
        ]
        _archive(tmp_path / "audio" / "sv-SE" / "train" / f"sv-SE_train_{shard}.tar", members)
    corpus = load_corpus(f"common_voice:{tmp_path}", languages="sv")
    assert [(u.id, u.text, u.speaker) for u in corpus] == [(names[i], six[i][0], f"c{i // 2}") for i in range(6)]
    for utterance, (_, samples) in zip(corpus, six, strict=True):
        assert abs(len(read_audio(utterance.audio)) - len(samples)) < 100
    before = corpus_digest(f"common_voice:{tmp_path}", languages=["sv"], split="train")
    _archive(
        tmp_path / "audio" / "sv-SE" / "train" / "sv-SE_train_1.tar", [(f"x/{names[3]}", _encoded(six[0][1], "MP3"))]
    )
    assert corpus_digest(f"common_voice:{tmp_path}", languages=["sv"], split="train") != before
    absent = load_corpus(f"common_voice:{tmp_path}", languages="sv")[5].audio
    assert isinstance(absent, AudioFile)
    with pytest.raises(LorsError, match=rf"cannot read audio .*{names[5]}: no such file"):
        read_audio(absent)
    with pytest.raises(LorsError, match=r"expected ca/clips or clips .* or audio/ca/SPLIT/\*.tar, got neither"):
        load_corpus(f"common_voice:{tmp_path}", languages="ca")
