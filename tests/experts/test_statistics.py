"""Files of statistics: what is written is read again, and damaged ones are refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from calibrated import mean_square
from lors import LorsError
from lors.experts.statistics import read_statistics, write_statistics


@pytest.mark.parametrize("n", [1, 2, 33])
def test_what_is_written_is_read_again(n: int, tmp_path: Path) -> None:
    """To 2^-12 of the variances' product; an input that is always 0 stays so."""
    mean = mean_square(n, 1)
    if n > 2:
        mean[2] = mean[:, 2] = 0
    write_statistics(tmp_path / "s", "x", "two words", {"a": "key", "b": "key"}, {"key": mean})
    scale = np.sqrt(np.diagonal(mean))
    for tensor in "ab":
        got = read_statistics(str(tmp_path / "s"), tensor, (5, n))
        assert (np.abs(got - mean) <= 2.0**-11 * np.outer(scale, scale)).all()
        np.testing.assert_allclose(got, got.T, rtol=1e-14)
        np.testing.assert_allclose(np.diagonal(got), np.diagonal(mean), rtol=1e-7)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -1.0])
def test_values_that_are_no_statistics(wrong: float, tmp_path: Path) -> None:
    mean = mean_square(4, 1)
    mean[1, 1] = wrong
    write_statistics(tmp_path / "s", "x", "", {"a": "key"}, {"key": mean})
    with pytest.raises(LorsError, match="key: expected finite values and variances of at least 0"):
        read_statistics(str(tmp_path / "s"), "a", (5, 4))


@pytest.mark.parametrize("text", ['{"format": 2, "inputs": {}}', "[]", "{", '{"format": 1, "inputs": 3}'])
def test_metadata_that_is_none(text: str, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "s", {"lors.statistics": text})
    with pytest.raises(LorsError) as caught:
        read_statistics(str(tmp_path / "s"), "a", (5, 4))
    assert "\n" not in str(caught.value)
