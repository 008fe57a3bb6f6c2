"""What `lors inspect --base` says of a difference, by definition, and what it costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lors.analysis import inspect
from lors.analysis.inspect import spectra
from lors.analysis.interference import interference
from lors.analysis.spectrum import effective_rank
from lors.checkpoints.reader import open_checkpoint


def test_effective_rank_is_one_number_wherever_it_is_shown(tiny_whisper: Path) -> None:
    base, expert = tiny_whisper / "base", tiny_whisper / "ca"
    reported = {
        row.name: row.effective_rank[0] for row in interference(base, {"ca": expert}, rank=2, density=0.1).matrices
    }
    with open_checkpoint(base) as origin, open_checkpoint(expert) as tuned:
        found = {one.name: one for one in spectra(origin, tuned, 2)}
        for name, one in found.items():
            delta = tuned.read(name).astype(np.float64) - origin.read(name)
            sigma = np.linalg.svd(delta, compute_uv=False)
            assert one.effective_rank == pytest.approx((sigma**2).sum() ** 2 / (sigma**4).sum(), rel=1e-4)
            assert one.effective_rank == pytest.approx(reported[name], rel=1e-4)
    assert found.keys() == reported.keys() and len(found) > 10


def test_effective_rank_of_equal_directions_of_one_and_of_none() -> None:
    assert effective_rank(5.0, 5.0) == 5.0
    assert effective_rank(9.0, 81.0) == 1.0
    assert effective_rank(0.0, 0.0) == 0.0
    delta = np.random.default_rng(0).standard_normal((300, 100))
    sigma = np.linalg.svd(delta, compute_uv=False)
    assert effective_rank((sigma**2).sum(), (sigma**4).sum()) == pytest.approx(
        300 * 100 / 400, rel=0.05
    )  # docs/report.md


def test_matrices_are_selected_once(tiny_whisper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once per tensor: at whisper-large-v3's 1259 names that took 13 seconds."""
    calls = []
    honest = inspect.select
    monkeypatch.setattr(inspect, "select", lambda *args: calls.append(args) or honest(*args))
    with open_checkpoint(tiny_whisper / "base") as origin, open_checkpoint(tiny_whisper / "ca") as tuned:
        assert len(list(spectra(origin, tuned, 2))) > 10
    assert len(calls) == 1
