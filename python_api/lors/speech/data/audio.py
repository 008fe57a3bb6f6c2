"""Audio files to what Whisper hears: mono float32 at 16 kHz.

Reading is lazy: a corpus holds sources, and samples exist only while features are computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...errors import LorsError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["LONGEST", "SAMPLE_RATE", "AudioFile", "AudioSource", "duration", "read_audio", "require"]

SAMPLE_RATE = 16000
LONGEST = 60.0  # seconds that are read at all; Whisper's window has 30
_RATES = (4_000, 384_000)  # Hz: others are a header that lies, and are resampled to any number of samples
_CHANNELS = 64
_BLOCK = 1 << 20  # samples of all channels that are read at a time
_WHOLE = 0.9  # of the samples announced: fewer is a file that was cut or damaged


class AudioSource(Protocol):
    """Where samples come from. `key` changes when the content does (for caches)."""

    def open(self) -> Any: ...  # a path or a binary stream for soundfile

    @property
    def name(self) -> str: ...

    @property
    def key(self) -> str: ...

    @property
    def span(self) -> tuple[float, float | None]: ...  # start and length in seconds; None: to the end

    @property
    def size(self) -> int | None: ...  # bytes as encoded; None where it is not there


@dataclass(frozen=True, slots=True)
class AudioFile:
    """An audio file on disk, or `seconds` of it from `start` on."""

    path: Path
    start: float = 0.0
    seconds: float | None = None

    def open(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def key(self) -> str:
        try:
            stat = self.path.stat()
        except OSError as error:
            raise LorsError(f"cannot read audio {self.path}: {error.strerror or error}") from error
        return f"{self.path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{self.start}:{self.seconds}"

    @property
    def span(self) -> tuple[float, float | None]:
        return self.start, self.seconds

    @property
    def size(self) -> int | None:
        return self.path.stat().st_size if self.path.exists() else None


def require(module: str) -> Any:
    """Imports a module of the `speech` extra; LorsError that says what to install when it is absent."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LorsError(f"speech needs {module}: pip install 'lors-merging[speech]' ({error})") from error


def read_audio(source: AudioSource, longest: float = LONGEST) -> NDArray[np.float32]:
    """Mono float32 samples at 16 kHz: channels are averaged, other rates resampled (soxr, high quality).

    LorsError for a file that is missing, unreadable, has no samples, ends before nine tenths of what its header or the
    span tells (MP3 headers are not exact), or holds NaN or infinity; and, before any sample is read, for one of more than
    `longest` seconds. A WAV or Opus file that was cut cannot be told from a shorter recording.
    """
    numpy = require("numpy")
    soundfile = require("soundfile")
    try:
        with soundfile.SoundFile(_open(source)) as file:
            rate = _rate(source, file)
            start, seconds = source.span
            file.seek(round(min(start * rate, file.frames)))
            length = (file.frames - file.tell()) / rate if seconds is None else seconds
            if length > longest:
                raise LorsError(f"cannot read audio {source.name}: expected at most {longest:g} s, got {length:.1f} s")
            mono = _mono(file, round(length * rate))
    except (OSError, RuntimeError) as error:  # soundfile.LibsndfileError is a RuntimeError
        raise _unreadable(source, error) from error
    found = len(mono) / rate
    if rate != SAMPLE_RATE and len(mono):
        mono = require("soxr").resample(mono, rate, SAMPLE_RATE)
    if len(mono) == 0:
        raise LorsError(f"cannot read audio {source.name}: expected samples, got a file of length 0")
    if found < _WHOLE * length:
        raise LorsError(
            f"cannot read audio {source.name}: expected a whole recording, got {found:.2f} s of {length:.2f} s"
        )
    if not numpy.isfinite(mono).all():
        raise LorsError(f"cannot read audio {source.name}: expected finite samples, got NaN or infinity")
    return numpy.ascontiguousarray(mono, dtype=numpy.float32)  # type: ignore[no-any-return]


def _mono(file: Any, frames: int) -> NDArray[np.float32]:
    """At most `frames` frames, their channels averaged, a block at a time: a header may announce any number."""
    import numpy as np

    parts = [np.zeros(0, np.float32)]
    while frames > 0:
        block = file.read(min(frames, _BLOCK // file.channels), dtype="float32", always_2d=True)
        if len(block) == 0:
            break
        parts.append(block.mean(axis=1))
        frames -= len(block)
    return np.concatenate(parts)


def duration(source: AudioSource) -> float:
    """Length in seconds, from the header alone."""
    soundfile = require("soundfile")
    if source.span[1] is not None:
        return source.span[1]
    try:
        with soundfile.SoundFile(_open(source)) as file:
            return float(file.frames / _rate(source, file))
    except (OSError, RuntimeError) as error:
        raise _unreadable(source, error) from error


def _rate(source: AudioSource, file: Any) -> int:
    """Samples per second; LorsError for a header that no recording has."""
    low, high = _RATES
    if not low <= file.samplerate <= high:
        raise LorsError(
            f"cannot read audio {source.name}: expected a sampling rate from {low} to {high} Hz, got {file.samplerate}"
        )
    if file.channels > _CHANNELS:
        raise LorsError(f"cannot read audio {source.name}: expected at most {_CHANNELS} channels, got {file.channels}")
    return int(file.samplerate)


def _open(source: AudioSource) -> Any:
    """What soundfile opens. It calls a missing file a "system error", so files are looked at first."""
    opened = source.open()
    if isinstance(opened, str) and not Path(opened).is_file():
        raise IsADirectoryError("a directory") if Path(opened).is_dir() else FileNotFoundError("no such file")
    return opened


def _unreadable(source: AudioSource, error: Exception) -> LorsError:
    if isinstance(error, OSError):
        return LorsError(f"cannot read audio {source.name}: {error.strerror or error}")
    said = str(getattr(error, "error_string", error)).strip()
    return LorsError(f"cannot read audio {source.name}: expected WAV, FLAC, MP3, Ogg or Opus (libsndfile: {said})")
