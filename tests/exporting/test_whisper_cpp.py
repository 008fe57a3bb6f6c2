"""whisper.cpp, by its bindings of pywhispercpp, reads the file and hears what transformers hears."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lors
from helpers import module
from said import Said, assert_equal

bindings = module("pywhispercpp.model", "export")


@pytest.mark.parametrize(("dtype", "tie"), [(None, 0.05), ("int8", 0.5)])
def test_whisper_cpp_hears_the_words_of_transformers(
    dtype: str | None, tie: float, model: Path, said: list[Said], tmp_path: Path
) -> None:
    lors.export(model, tmp_path / "out", "ggml", dtype=dtype)
    whisper = bindings.Model(
        str(tmp_path / "out" / "ggml-model.bin"), redirect_whispercpp_logs_to=None, n_threads=1, print_realtime=False,
        print_progress=False, no_timestamps=True, single_segment=True, suppress_blank=False, temperature_inc=0.0,
        context_params={"flash_attn": False},  # which adds empty places up to 1536: hardly any to 1500, many to a window of 100
    )  # fmt: skip

    def hear(one: Said) -> str:
        found = whisper.transcribe(one.samples.astype(np.float32), language=one.language)
        return " ".join(segment.text.strip() for segment in found)

    assert_equal(said, hear, tie=tie)
