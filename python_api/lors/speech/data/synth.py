"""A multilingual speech corpus made by espeak-ng: deterministic, any size, two acoustic conditions.

Each utterance draws a voice variant, pitch, speed, loudness, lead-in and noise from a generator seeded by (seed,
condition, split, language, index): the same arguments give the same bytes, whatever the number of workers. The
``hard`` condition shares no voice with ``clean``, is faster and far noisier. Limits: synthetic voices, a closed
vocabulary of dates and numbers, sentences of one to five words.

espeak-ng is GPL-3 and is called as a program.
"""

from __future__ import annotations

import csv
import io
import os
import random
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import LorsError, nearest
from ...files.directory import OutputDirectory
from ...files.replaceable import CORPUS
from ...files.writing import writing
from ...progress import bar
from .audio import SAMPLE_RATE, require
from .domain import sample, sentence

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CONDITIONS", "Condition", "espeak_program", "speak", "synthesise"]

MANIFEST_COLUMNS = ("id", "audio", "text", "translation", "language", "split")

_ESPEAK_RATE = 22050
_HEADER = 44  # bytes of the WAV header on stdout, whose length field is bogus
_LIMIT = 1.95  # seconds: the tiny model hears 2


@dataclass(frozen=True, slots=True)
class Condition:
    """How an utterance may sound: ranges are uniform, voices equally likely."""

    voices: tuple[str, ...]
    speed: tuple[int, int]  # words per minute
    snr: tuple[float, float]  # dB, white noise
    pitch: tuple[int, int] = (30, 70)
    amplitude: tuple[int, int] = (60, 130)
    lead_in: float = 0.1  # seconds at most


CONDITIONS: Mapping[str, Condition] = {
    "clean": Condition(
        voices=(
            "",
            *(f"f{i}" for i in range(1, 6)),
            *(f"m{i}" for i in range(1, 9)),
            "klatt",
            "Andy",
            "grandma",
            "Annie",
        ),
        speed=(165, 225),
        snr=(15.0, 40.0),
    ),
    "hard": Condition(
        voices=(
            "Alicia",
            "Denis",
            "Gene",
            "iven",
            "linda",
            "Michael",
            "pedro",
            "quincy",
            "Storm",
            "zac",
            "anika",
            "travis",
        ),
        speed=(190, 270),
        snr=(0.0, 10.0),
    ),
}


def espeak_program() -> str:
    """The espeak-ng program; LorsError that says how to get it when there is none."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise LorsError("espeak-ng: expected the program on PATH, got none (Debian: apt-get install espeak-ng)")
    return program


def synthesise(
    out: Path,
    *,
    languages: Iterable[str],
    sizes: Mapping[str, int],
    condition: str = "clean",
    seed: int = 0,
    audio_format: str = "flac",
    workers: int | None = None,
    force: bool = False,
    progress: bool = False,
) -> Path:
    """Writes ``out/manifest.tsv`` and ``out/<language>/<id>.<format>``; returns the manifest.

    `sizes` is utterances per language and split (train, dev, test). The same sentences are drawn for all languages of a
    split. The directory appears complete; a corpus that is there is replaced with `force`. `workers`: processes of
    espeak-ng at a time (default: cores). `progress`: a bar on stderr where that is a terminal. LorsError for a condition,
    format or language that is not there, no espeak-ng, or a place that cannot be written or holds something else.
    """
    with OutputDirectory(out, force=force, kind=CORPUS, durable=False) as corpus:
        parts = [(list(languages), sizes)]
        speak(corpus.path, parts, condition, seed, audio_format=audio_format, workers=workers, progress=progress)
        corpus.commit()
    return out / "manifest.tsv"


def speak(
    out: Path,
    parts: Iterable[tuple[Sequence[str], Mapping[str, int]]],
    condition: str,
    seed: int,
    *,
    audio_format: str = "flac",
    workers: int | None = None,
    progress: bool = False,
) -> None:
    """Fills a directory with a corpus; `parts`: languages, and the sizes of their splits."""
    if condition not in CONDITIONS:
        raise LorsError(f"synth: unknown condition {condition!r}{nearest(condition, CONDITIONS)}")
    if audio_format not in ("flac", "wav"):
        raise LorsError(f"synth: expected the format flac or wav, got {audio_format!r}")
    program = espeak_program()
    jobs = [
        _Job(out, language, split, index, sentence(concept, language), sentence(concept, "en"), audio_format)
        for languages, sizes in parts
        for language in languages
        for split, size in sizes.items()
        for index, concept in enumerate(sample(split, size, seed))
    ]
    if not jobs:
        raise LorsError("synth: expected utterances in at least one split, got none")
    with writing(out):
        for language in {job.language for job in jobs}:
            (out / language).mkdir(parents=True, exist_ok=True)

    def run(job: _Job) -> None:
        job.write(_utterance(program, job, CONDITIONS[condition], f"{seed} {condition} {job.key}"))

    with (
        writing(out),
        bar("speaking", len(jobs), quiet=not progress) as advance,
        ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool,
    ):
        done = pool.map(run, jobs)
        try:
            for count, _ in enumerate(done, start=1):
                if advance is not None:
                    advance(count, len(jobs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # a signal does not wait for thousands of utterances
            raise
        _write_manifest(out / "manifest.tsv", jobs)


@dataclass(frozen=True, slots=True)
class _Job:
    out: Path
    language: str
    split: str
    index: int
    text: str
    translation: str
    audio_format: str

    @property
    def key(self) -> str:
        return f"{self.language}-{self.split}-{self.index:05d}"

    @property
    def audio(self) -> str:
        return f"{self.language}/{self.key}.{self.audio_format}"

    def write(self, samples: NDArray[np.int16]) -> None:
        encoded = io.BytesIO()  # libsndfile's error of a full disk would be one of its encoder
        require("soundfile").write(encoded, samples, SAMPLE_RATE, subtype="PCM_16", format=self.audio_format)
        (self.out / self.audio).write_bytes(encoded.getvalue())


def _write_manifest(path: Path, jobs: list[_Job]) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE)
        writer.writerow(MANIFEST_COLUMNS)
        writer.writerows((j.key, j.audio, j.text, j.translation, j.language, j.split) for j in jobs)


def _utterance(program: str, job: _Job, condition: Condition, seed: str) -> NDArray[np.int16]:
    import numpy as np

    rng = random.Random(seed)
    variant = rng.choice(condition.voices)
    voice = f"{job.language}+{variant}" if variant else job.language
    pitch, amplitude = rng.randint(*condition.pitch), rng.randint(*condition.amplitude)
    speed, lead_in, snr = rng.randint(*condition.speed), rng.uniform(0, condition.lead_in), rng.uniform(*condition.snr)

    speech = _speak(program, job.text, voice, speed, pitch, amplitude)
    while lead_in + len(speech) / SAMPLE_RATE > _LIMIT:  # too long for the model's window: say it faster
        speed = int(speed * max(1.05, (lead_in + len(speech) / SAMPLE_RATE) / _LIMIT)) + 1
        speech = _speak(program, job.text, voice, speed, pitch, amplitude)

    signal = np.concatenate([np.zeros(int(lead_in * SAMPLE_RATE), np.float32), speech])
    power = float(np.mean(np.square(speech))) / 10 ** (snr / 10)
    noise = np.random.default_rng(rng.getrandbits(64)).standard_normal(len(signal), np.float32) * np.float32(power**0.5)
    return (np.clip(signal + noise, -1, 1) * 32767).astype(np.int16)  # type: ignore[no-any-return]


def _speak(program: str, text: str, voice: str, speed: int, pitch: int, amplitude: int) -> NDArray[Any]:
    """float32 samples at 16 kHz without the silence espeak-ng adds at both ends."""
    import numpy as np

    command = [program, "-v", voice, "-s", str(speed), "-p", str(pitch), "-a", str(amplitude), "--stdout", "--", text]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0 or len(done.stdout) <= _HEADER:
        said = done.stderr.decode("utf-8", "replace").strip() or f"exit status {done.returncode}, no samples"
        raise LorsError(f"espeak-ng: expected speech for {text!r} with voice {voice}, got: {said}")
    samples = np.frombuffer(done.stdout[_HEADER:], np.int16).astype(np.float32) / 32768
    resampled = require("soxr").resample(samples, _ESPEAK_RATE, SAMPLE_RATE)
    loud = np.flatnonzero(np.abs(resampled) > 1e-3)
    if len(loud) == 0:
        raise LorsError(f"espeak-ng: expected speech for {text!r} with voice {voice}, got silence")
    return resampled[loud[0] : loud[-1] + 1]  # type: ignore[no-any-return]
