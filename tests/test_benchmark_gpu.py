"""The GPU benchmark's harness, on the CPU: every number it would file, that a section may fail, and resuming."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu


def test_dry_run_files_every_section_and_says_that_it_is_dry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    assert (
        gpu.main(
            ["--dry-run", "--out", str(out), "--only", "build,bandwidth,accuracy,operations,resident,tests,sanitizer"]
        )
        == 0
    )
    data = json.loads(out.read_text())
    assert data["dry_run"] and "say nothing" in data["device"] and "say nothing" in capsys.readouterr().out
    rows = data["results"]["operations"]
    assert {key.split()[0] for key in rows} == {"gram_apply", "residual_threshold", "merge_update", "ties_update"}
    # inputs of two bytes move half of what inputs of four do, but for x, z and the factors
    single, half = (rows[f"merge_update reference {dtype} 48x48 x1"]["bytes"] for dtype in ("float32", "float16"))
    factors = 5 * (48 + 48) * 7 * 4
    assert single == 8 * 48 * 48 * 4 + factors and half == 8 * 48 * 48 * 2 + factors
    methods = [key.split()[0] for key in data["results"]["resident"]]
    assert methods == ["lors", "task_arithmetic", "ties", "dare_ties"]
    assert data["results"]["accuracy"]["96x64 reference"]["error"] < 1e-6


def test_a_failing_section_is_filed_and_repeated_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, arguments = (
        tmp_path / "gpu.json",
        ["--dry-run", "--out", str(tmp_path / "gpu.json"), "--only", "bandwidth,build"],
    )

    def broken(*_: object) -> dict[str, object]:
        raise RuntimeError("no luck")

    with monkeypatch.context() as patch:
        patch.setitem(gpu.SECTIONS, "bandwidth", broken)
        assert gpu.main(arguments) == 1
    results = json.loads(out.read_text())["results"]
    assert results["bandwidth"] == {"failed": "RuntimeError: no luck"} and "failed" not in results["build"]
    assert gpu.main([*arguments, "--resume"]) == 0
    assert "GB/s" in json.loads(out.read_text())["results"]["bandwidth"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 2
    assert "expected a GPU, found none" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
