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

__all__ = ["BOUND", "Features", "kept_in", "log_mel", "require_window"]

BOUND = 50 << 30  # bytes in one directory
_RECOUNT = 256 << 20  # bytes written between two looks at what other processes wrote
_SPARED = 20  # this part of a disk is left to others
_ROUNDING = 0.5 / SAMPLE_RATE  # seconds; a header counts in samples of another rate


def log_mel(audio: AudioSource, extractor: Any) -> NDArray[np.float16]:
    """[mel bins, frames] float16; LorsError for a recording longer than the model's window."""
    import numpy as np

    require_window(audio, extractor)  # before it is read
    samples = read_audio(audio, extractor.n_samples / SAMPLE_RATE + _ROUNDING)
    _require_seconds(audio, len(samples) / SAMPLE_RATE, extractor)
    mel = extractor([samples], sampling_rate=SAMPLE_RATE, return_tensors="np")["input_features"]
    return mel[0].astype(np.float16)  # type: ignore[no-any-return]


def require_window(audio: AudioSource, extractor: Any) -> None:
    """LorsError for a recording that is not there or longer than the model's window, by its header."""
    _require_seconds(audio, duration(audio), extractor)


def _require_seconds(audio: AudioSource, seconds: float, extractor: Any) -> None:
    window = extractor.n_samples / SAMPLE_RATE
    if seconds > window + _ROUNDING:
        raise LorsError(
            f"{audio.name}: expected at most {window:g} s, the model's window, got {seconds:.1f} s "
            "(--max-seconds drops longer ones)"
        )


class Features:
    """Features by recording: from `home`, or computed and kept there while it holds less than `bound` bytes.

    Any number of processes share a directory; a recording that several ask for at a time is computed by one of them. The
    bound is kept up to 256 MB for each process, and a twentieth of the disk stays free.
    """

    def __init__(self, extractor: Any, home: str | Path, bound: int = BOUND) -> None:
        self.extractor, self.home, self.bound = extractor, Path(home), bound
        self._settings = repr(sorted(extractor.to_dict().items(), key=str))
        self._room, self._written = -1, 0  # bytes: left at the last look (-1: none yet), and by this process since

    def of(self, audio: AudioSource) -> NDArray[np.float16]:
        """[mel bins, frames] float16; LorsError for a recording that cannot be read, or has more than the window."""
        import numpy as np

        digest = hashlib.sha256(f"{self._settings}\0{audio.key}".encode("utf-8", "surrogateescape")).hexdigest()
        path = self.home / digest[:2] / f"{digest[2:32]}.npy"
        if not path.exists() and self._full():
            return log_mel(audio, self.extractor)
        with writing(self.home):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                with _alone(path.parent):
                    if not path.exists():
                        self._keep(path, _trimmed(log_mel(audio, self.extractor)))
            kept = np.load(path)
        return np.pad(kept, ((0, 0), (0, self.extractor.nb_max_frames - kept.shape[1])), mode="edge")

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
