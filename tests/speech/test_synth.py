"""The synthesiser: texts without espeak-ng, speech with it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from lors.errors import LorsError
from lors.speech.data.audio import AudioFile, read_audio
from lors.speech.data.corpus import load_corpus
from lors.speech.data.domain import SPLITS, concepts, sample, sentence
from lors.speech.data.languages import LANGUAGES
from lors.speech.data.synth import synthesise
from processes import LORS, gone, marked, wait_until

needs_espeak = pytest.mark.usefixtures("espeak")


def test_splits_share_nothing() -> None:
    parts = [{c for kind in concepts(split) for c in kind} for split in SPLITS]
    assert [len(part) for part in parts] == [2932, 180, 450]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


def test_sentences_are_words_in_every_language() -> None:
    everything = [c for split in SPLITS for kind in concepts(split) for c in kind]
    for language in (*LANGUAGES, "en"):
        said = {sentence(concept, language) for concept in everything}
        assert len(said) == len(everything), language  # different concepts sound different
        assert not [text for text in said if any(c.isdigit() or c in ",.-@" for c in text) or text != text.strip()]


def test_known_sentences() -> None:
    date = next(c for c in concepts("train")[0] if c.date is not None and (c.date.month, c.date.day) == (3, 9))
    assert sentence(date, "ca").endswith(" nou de març") and sentence(date, "en").endswith(" March ninth")
    assert sentence(date, "de").endswith(" neunter März") and sentence(date, "ru").endswith(" девять марта")
    number = next(c for c in concepts("train")[1] if c.number > 200 and c.number % 100 == 21)
    assert sentence(number, "de").endswith("hundert einundzwanzig")
    with pytest.raises(LorsError, match="no sentences in 'eo'"):
        sentence(number, "eo")


def test_sample_is_seeded_and_without_repeats() -> None:
    assert sample("test", 50, 1) == sample("test", 50, 1) != sample("test", 50, 2)
    assert len(set(sample("test", 450, 1))) == 420  # 270 of 300 dates, all 150 numbers and 30 of them again


@needs_espeak
def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    def make(name: str, workers: int, seed: int = 3) -> dict[str, bytes]:
        root = tmp_path / name
        synthesise(root, languages=["ca", "ru"], sizes={"test": 3}, condition="hard", seed=seed, workers=workers)
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*.*")}

    first = make("a", 1)
    assert first == make("b", 4) and len(first) == 7
    assert first != make("c", 1, seed=4)
    corpus = load_corpus(tmp_path / "a", languages="ru", split="test")
    assert corpus[0].translation and all(4000 < len(read_audio(u.audio)) <= 32000 for u in corpus)


@needs_espeak
def test_conditions_differ_in_noise(tmp_path: Path) -> None:
    import numpy as np

    floor = {}
    for condition in ("clean", "hard"):
        synthesise(tmp_path / condition, languages=["es"], sizes={"test": 6}, condition=condition, audio_format="wav")
        files = sorted((tmp_path / condition / "es").glob("*.wav"))
        loudness = [np.sort(np.abs(read_audio(AudioFile(file)))) for file in files]
        floor[condition] = np.mean([values[:2000].mean() / values[-1] for values in loudness])
    assert floor["hard"] > 2 * floor["clean"]


def test_without_espeak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LorsError, match="espeak-ng: expected the program on PATH"):
        synthesise(tmp_path / "x", languages=["ca"], sizes={"test": 1})
    assert not (tmp_path / "x").exists()


def test_an_espeak_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line; and the corpus that was there is as it was."""
    program = tmp_path / "espeak-ng"
    program.write_text("#!/bin/sh\necho no such voice >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "manifest.tsv").write_text("old")
    with pytest.raises(LorsError, match=r"espeak-ng: expected speech for '.*' with voice ca.*, got: no such voice"):
        synthesise(tmp_path / "c", languages=["ca"], sizes={"test": 1}, force=True)
    assert (tmp_path / "c" / "manifest.tsv").read_text() == "old" and len(list((tmp_path / "c").iterdir())) == 1


@needs_espeak
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda signum: signum.name)
def test_a_signal_ends_it(tmp_path: Path, signum: signal.Signals) -> None:
    """Thousands of utterances are to come; an espeak-ng under way is done in a moment."""
    command = [*LORS, "synth", str(tmp_path / "out"), "--languages", "ca,de", "--train", "2000", "--workers", "2"]
    with marked(command, tmp_path / "log") as found:
        assert wait_until(lambda: len(list(tmp_path.rglob("*.flac"))) > 3, 120), (tmp_path / "log").read_text()
        assert found.end(signum) < 5 and gone(found)
        assert found.process.returncode == {signal.SIGINT: 130, signal.SIGKILL: -9}.get(signum, 128 + signum)
    assert not (tmp_path / "out" / "manifest.tsv").exists()
