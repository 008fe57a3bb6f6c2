"""Log-mel features of a corpus, computed once and kept.

Features are rounded to float16 whether cached or not (log-mel values lie in [-1, 2], an error of 5e-4 at most), so a
cached run and a fresh one decode the same words.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LorsError
from .audio import SAMPLE_RATE, read_audio
from .corpus import Utterance

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["features", "log_mel"]

_BATCH = 64


def log_mel(utterances: Sequence[Utterance], extractor: Any) -> NDArray[np.float16]:
    """[len(utterances), mel bins, frames] float16; audio longer than the model's window is a LorsError."""
    import numpy as np

    samples = []
    for utterance in utterances:
        audio = read_audio(utterance.audio)
        if len(audio) > extractor.n_samples:
            raise LorsError(
                f"{utterance.audio.name}: expected at most {extractor.n_samples / SAMPLE_RATE:g} s, "
                f"the model's window, got {len(audio) / SAMPLE_RATE:.1f} s (--max-seconds drops longer ones)"
            )
        samples.append(audio)
    mel = extractor(samples, sampling_rate=SAMPLE_RATE, return_tensors="np")["input_features"]
    return mel.astype(np.float16)  # type: ignore[no-any-return]


def features(
    utterances: Sequence[Utterance],
    extractor: Any,
    cache: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> NDArray[np.float16]:
    """`log_mel` of all, as one array: in memory, or mapped from a file in `cache` named by the content's identity."""
    import numpy as np

    shape = (len(utterances), extractor.feature_size, extractor.nb_max_frames)
    if cache is None:
        array = np.empty(shape, np.float16)
        _fill(array, utterances, extractor, progress)
        return array
    path = cache / f"{_key(utterances, extractor)}.npy"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)
            _fill(array, utterances, extractor, progress)
            array.flush()
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


def _fill(array: NDArray[Any], utterances: Sequence[Utterance], extractor: Any, progress: Any) -> None:
    for start in range(0, len(utterances), _BATCH):
        batch = utterances[start : start + _BATCH]
        array[start : start + len(batch)] = log_mel(batch, extractor)
        if progress is not None:
            progress(len(batch))


def _key(utterances: Sequence[Utterance], extractor: Any) -> str:
    digest = hashlib.sha256(repr(sorted(extractor.to_dict().items(), key=str)).encode())
    for utterance in utterances:
        digest.update(f"\0{utterance.audio.key}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]
