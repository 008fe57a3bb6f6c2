"""Log-mel features of recordings, each computed once and kept in a directory of bounded size.

Features are rounded to float16 whether they were kept or not (log-mel values lie in [-1, 2], an error of 5e-4 at most),
so a run that finds them and one that computes them decode the same words. What follows a recording in the model's window
is one value, and is kept once: of 768 kB for 128 bins, a recording of 5 s takes about 130.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import LorsError
from ...files.lock import flock
from ...files.writing import replacing, writing
from .audio import SAMPLE_RATE, AudioSource, duration, read_audio

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["BOUND", "LONG_FORM", "Features", "kept_in", "log_mel", "require_window", "window"]

BOUND = 50 << 30  # bytes in one directory
LONG_FORM = 3600.0  # seconds of a recording that is decoded a window after the other: its features take some GB
_RECOUNT = 256 << 20  # bytes written between two looks at what other processes wrote
_SPARED = 20  # this part of a disk is left to others
_ROUNDING = 0.5 / SAMPLE_RATE  # seconds; a header counts in samples of another rate


def log_mel(audio: AudioSource, extractor: Any, longest: float = 0.0) -> NDArray[np.float16]:
    """[mel bins, frames] float16: as many frames as the model's window has, or of a longer recording its own number, a
    hundred a second. LorsError for one longer than the window and than `longest` seconds."""
    import numpy as np

    _require_seconds(audio, duration(audio), extractor, longest)  # before it is read
    samples = read_audio(audio, max(window(extractor), longest) + _ROUNDING)
    _require_seconds(audio, len(samples) / SAMPLE_RATE, extractor, longest)
    # Nothing but silence follows a recording in the window: its frames are alike, and the last one computed is one of them.
    heard = -(-(len(samples) + extractor.n_fft) // extractor.hop_length) * extractor.hop_length
    longer = len(samples) > extractor.n_samples
    length = {"truncation": False, "padding": "longest"} if longer else {"max_length": min(heard, extractor.n_samples)}
    mel = extractor([samples], sampling_rate=SAMPLE_RATE, return_tensors="np", **length)["input_features"][0]
    return _filled(mel.astype(np.float16), extractor)


def window(extractor: Any) -> float:
    """Seconds that the model hears at a time."""
    return float(extractor.n_samples / SAMPLE_RATE)


def require_window(audio: AudioSource, extractor: Any) -> None:
    """LorsError for a recording that is not there or longer than the model's window, by its header."""
    _require_seconds(audio, duration(audio), extractor, 0.0)


def _require_seconds(audio: AudioSource, seconds: float, extractor: Any, longest: float) -> None:
    most = max(window(extractor), longest)
    if seconds > most + _ROUNDING:
        which = "" if longest > window(extractor) else ", the model's window"
        raise LorsError(
            f"{audio.name}: expected at most {most:g} s{which}, got {seconds:.1f} s (--max-seconds drops longer ones)"
        )


class Features:
    """Features by recording: from `home`, or computed and kept there while it holds less than `bound` bytes.

    Any number of processes share a directory; a recording that several ask for at a time is computed by one of them. The
    bound is kept up to 256 MB for each process, and a twentieth of the disk stays free. `longest`: seconds of a recording
    beyond the model's window (0: none is).
    """

    def __init__(self, extractor: Any, home: str | Path, bound: int = BOUND, longest: float = 0.0) -> None:
        self.extractor, self.home, self.bound, self.longest = extractor, Path(home), bound, longest
        self._settings = repr(sorted(extractor.to_dict().items(), key=str))
        self._room, self._written = -1, 0  # bytes: left at the last look (-1: none yet), and by this process since

    def of(self, audio: AudioSource) -> NDArray[np.float16]:
        """As `log_mel`; LorsError for a recording that cannot be read, too."""
        import numpy as np

        digest = hashlib.sha256(f"{self._settings}\0{audio.key}".encode("utf-8", "surrogateescape")).hexdigest()
        path = self.home / digest[:2] / f"{digest[2:32]}.npy"
        if not path.exists() and self._full():
            return log_mel(audio, self.extractor, self.longest)
        with writing(self.home):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                with _alone(path.parent):
                    if not path.exists():
                        mel = log_mel(audio, self.extractor, self.longest)
                        self._keep(path, mel if mel.shape[1] > self.extractor.nb_max_frames else _trimmed(mel))
            kept = np.load(path)
        more = kept.shape[1] - self.extractor.nb_max_frames
        if more > 0:
            _require_seconds(audio, window(self.extractor) + more / 100, self.extractor, self.longest)
        return _filled(kept, self.extractor)

    def held(self) -> int:
        """Bytes in the directory now."""
        return sum(entry.stat().st_size for part in _parts(self.home) for entry in os.scandir(part))

    def _full(self) -> bool:
        if self._room < 0 or self._written >= _RECOUNT:
            with writing(self.home):
                self.home.mkdir(parents=True, exist_ok=True)
                room = shutil.disk_usage(self.home)
                held = self.held()
            self._room, self._written = max(0, min(self.bound - held, room.free - room.total // _SPARED)), 0
        return self._written >= self._room

    def _keep(self, path: Path, mel: NDArray[np.float16]) -> None:
        import numpy as np

        with replacing(path) as partial, partial.open("wb") as stream:
            np.save(stream, mel)
        self._written += path.stat().st_size


@contextmanager
def kept_in(cache: str | Path | None) -> Iterator[Path]:
    """The directory, or without one a directory that is gone after the block."""
    if cache is not None:
        yield Path(cache)
        return
    with tempfile.TemporaryDirectory(prefix="lors-features-") as home:
        yield Path(home)


def _filled(mel: NDArray[np.float16], extractor: Any) -> NDArray[np.float16]:
    """To the frames of the window, by the last one again; a longer recording's as they are."""
    import numpy as np

    return np.pad(mel, ((0, 0), (0, max(extractor.nb_max_frames - mel.shape[1], 0))), mode="edge")


def _trimmed(mel: NDArray[np.float16]) -> NDArray[np.float16]:
    """Without the frames at the end that repeat the one before them."""
    import numpy as np

    differ = np.flatnonzero((mel != mel[:, -1:]).any(axis=0))
    return np.ascontiguousarray(mel[:, : (differ[-1] + 2 if len(differ) else 1)])


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    with (directory / ".lock").open("w") as stream:
        flock(stream, fcntl.LOCK_EX, directory)
        yield


def _parts(home: Path) -> list[str]:
    return [entry.path for entry in os.scandir(home) if entry.is_dir()] if home.is_dir() else []
