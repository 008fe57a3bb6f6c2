"""Log-mel features of a corpus, computed once and kept.

Features are rounded to float16 whether cached or not (log-mel values lie in [-1, 2], an error of 5e-4 at most), so a
cached run and a fresh one decode the same words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import LorsError
from ...files.writing import replacing, writing
from .audio import SAMPLE_RATE, duration, read_audio
from .utterance import Utterance

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["features", "log_mel", "require_windows"]

_BATCH = 64
_ROUNDING = 0.5 / SAMPLE_RATE  # seconds; a header counts in samples of another rate


def log_mel(utterances: Sequence[Utterance], extractor: Any) -> NDArray[np.float16]:
    """[len(utterances), mel bins, frames] float16; audio longer than the model's window is a LorsError."""
    import numpy as np

    samples = []
    for utterance in utterances:
        _require_window(utterance, duration(utterance.audio), extractor)  # before it is read
        audio = read_audio(utterance.audio, extractor.n_samples / SAMPLE_RATE + _ROUNDING)
        _require_window(utterance, len(audio) / SAMPLE_RATE, extractor)
        samples.append(audio)
    mel = extractor(samples, sampling_rate=SAMPLE_RATE, return_tensors="np")["input_features"]
    return mel.astype(np.float16)  # type: ignore[no-any-return]


def require_windows(utterances: Sequence[Utterance], extractor: Any) -> None:
    """LorsError for the first recording that is not there or longer than the model's window, by its header."""
    for utterance in utterances:
        _require_window(utterance, duration(utterance.audio), extractor)


def _require_window(utterance: Utterance, seconds: float, extractor: Any) -> None:
    window = extractor.n_samples / SAMPLE_RATE
    if seconds > window + _ROUNDING:
        raise LorsError(
            f"{utterance.audio.name}: expected at most {window:g} s, the model's window, got {seconds:.1f} s "
            "(--max-seconds drops longer ones)"
        )


def features(utterances: Sequence[Utterance], extractor: Any, cache: Path | None = None) -> NDArray[np.float16]:
    """`log_mel` of all, as one array: in memory, or mapped from a file in `cache` named by the content's identity."""
    import numpy as np

    shape = (len(utterances), extractor.feature_size, extractor.nb_max_frames)
    if cache is None:
        array, done = np.empty(shape, np.float16), 0
        for batch in _batches(utterances, extractor):
            array[done : done + len(batch)] = batch
            done += len(batch)
        return array
    path = cache / f"{_key(utterances, extractor)}.npy"
    with writing(cache):
        if not path.exists():
            _write(path, shape, _batches(utterances, extractor))
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


def _batches(utterances: Sequence[Utterance], extractor: Any) -> Iterator[NDArray[np.float16]]:
    for start in range(0, len(utterances), _BATCH):
        yield log_mel(utterances[start : start + _BATCH], extractor)


def _write(path: Path, shape: tuple[int, ...], batches: Iterable[NDArray[np.float16]]) -> None:
    """A .npy file, batch by batch: into a mapped one, a disk that is full would be a SIGBUS."""
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as stream:
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        for batch in batches:
            stream.write(batch.tobytes())


def _key(utterances: Sequence[Utterance], extractor: Any) -> str:
    digest = hashlib.sha256(repr(sorted(extractor.to_dict().items(), key=str)).encode())
    for utterance in utterances:
        digest.update(f"\0{utterance.audio.key}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]
