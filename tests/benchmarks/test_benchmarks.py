"""The benchmark harness itself: what it measures, what it compares with, and what it prints."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import bench_certificate, machine, table
from benchmarks.compare import difference
from benchmarks.errors import BenchmarkError
from benchmarks.generate import Checkpoints, Spec, generate, orthonormal_basis, power_law, random
from benchmarks.process import Case, interleave, measure, ratio, spread
from benchmarks.released import RELEASED, THIN, lowrank_svd, merge, relative_error, thin_svd, tune_lowrank
from benchmarks.results import Results, newest
from benchmarks.shapes import SIZES
from lors_kernels.backends import cpu

MB = 1 << 20


def python(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code]


def test_measure_counts_time_and_memory_of_the_command_alone() -> None:
    ballast = bytearray(os.urandom(1)) * (300 * MB)  # resident here: must not show in the child
    run = measure(python("import time; b = bytearray(100 << 20); b[::4096] = b'x' * len(b[::4096]); time.sleep(0.3)"))
    assert len(ballast) == 300 * MB
    assert 0.3 <= run.wall_s < 5
    assert 100 * MB <= run.peak_rss < 160 * MB
    assert run.user_s + run.system_s < run.wall_s
    if Path("/proc/self/status").exists():
        assert 100 * MB <= run.peak_anonymous <= run.peak_rss


def test_measure_counts_cpu_time() -> None:
    run = measure(python("import time\nwhile time.process_time() < 0.2: pass"))
    assert 0.15 <= run.user_s + run.system_s <= run.wall_s + 0.1


def test_measure_reports_the_end_of_what_a_failing_command_said() -> None:
    with pytest.raises(BenchmarkError, match="expected exit code 0, got 3: why it failed"):
        measure(python("import sys; print('why it failed'); sys.exit(3)"))
    with pytest.raises(BenchmarkError, match="could not start /no/such/program"):
        measure(["/no/such/program"])


def test_interleave_alternates_and_goes_on_after_a_failure(tmp_path: Path) -> None:
    log = tmp_path / "log"
    append = f"open({str(log)!r}, 'a').write"
    cases = [
        Case("a", python(f"{append}('a')"), 2, prepare=lambda: None),
        Case("bad", python(f"{append}('x'); raise SystemExit(1)"), 2),
        Case("b", python(f"{append}('b')"), 1),
    ]
    found = interleave(cases, [], lambda line: None)
    assert log.read_text() == "axba"
    assert found["a"]["repeats"] == 2 and found["b"]["repeats"] == 1
    assert "got 1" in found["bad"]["failed"]


def test_ratio_spans_what_the_ranges_allow() -> None:
    assert ratio(spread([10.0, 20.0, 12.0]), spread([1.0, 4.0, 2.0])) == {"median": 6.0, "min": 2.5, "max": 20.0}


def test_machine_names_no_host_user_or_path() -> None:
    text = json.dumps(machine.describe_machine())
    assert str(machine.ROOT) not in text
    assert platform.node() not in text.split('"')
    found = json.loads(text)
    assert found["cores"] >= 1 and found["memory"] > 1e8
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]  # not every index says "+cu130"


@pytest.mark.parametrize(
    ("size", "matrices"),
    [("tiny", 64), ("base", 96), ("small", 192), ("medium", 384), ("large-v3", 512), ("turbo", 232)],
)
def test_shapes_are_those_of_the_released_models(size: str, matrices: int) -> None:
    assert sum(SIZES[size].matrices().values()) == matrices
    assert SIZES[size].vocabulary == (51866 if size in ("large-v3", "turbo") else 51865)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return generate(tmp_path_factory.mktemp("data"), Spec("micro"), 2)


def load(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def test_generated_checkpoints_load_in_transformers(made: Checkpoints) -> None:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    path = made.experts["de"]
    loaded: Any = WhisperForConditionalGeneration.from_pretrained(path, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(
        model.state_dict()["model.encoder.layers.0.fc1.weight"], load(path)["model.encoder.layers.0.fc1.weight"]
    )
    processor = WhisperProcessor.from_pretrained(path)
    tokens = processor.tokenizer("Bona nit, món.").input_ids
    assert processor.decode(tokens, skip_special_tokens=True) == "Bona nit, món."
    assert max(processor.tokenizer.get_vocab().values()) + 1 == model.config.vocab_size == 51865
    assert processor.tokenizer.convert_tokens_to_ids("<|transcribe|>") == 50359


def test_generation_is_reused_deterministic_and_independent_of_what_else_is_made(
    made: Checkpoints, tmp_path: Path
) -> None:
    before = made.files[2].stat().st_mtime_ns
    root = made.base.parent.parent
    assert generate(root, Spec("micro"), 2) == made
    assert made.files[2].stat().st_mtime_ns == before
    (made.experts["ca"] / "generated.json").unlink()  # as if interrupted: only this one is made again
    old = made.files[1].read_bytes()
    generate(root, Spec("micro"), 2)
    assert made.files[1].read_bytes() == old != made.files[2].read_bytes()
    assert made.files[2].stat().st_mtime_ns == before
    assert not list(root.rglob("*.partial"))


def test_power_law_has_the_promised_spectrum() -> None:
    delta = power_law(random(0, 1, "x"), 96, 48).astype(np.float64)
    sigma = np.linalg.svd(delta, compute_uv=False)
    np.testing.assert_allclose(sigma / sigma[0], np.arange(1, 49) ** -0.5, rtol=1e-4)
    assert np.sqrt((delta**2).mean()) == pytest.approx(5e-4, rel=1e-4)
    basis = orthonormal_basis(96, 48)
    np.testing.assert_allclose(basis.T @ basis, np.eye(48), atol=1e-5)


def test_generate_refuses_what_it_cannot_make(tmp_path: Path) -> None:
    for spec, experts, message in (
        (Spec("huge"), 2, "size: expected one of .*tiny.*got huge"),
        (Spec("micro", "int8"), 2, "dtype: expected one of float32.*got int8"),
        (Spec("micro", deltas="odd"), 2, "deltas: expected one of powerlaw, buried, flat, got odd"),
        (Spec("micro"), 11, "experts: expected 1 to 10, got 11"),
    ):
        with pytest.raises(BenchmarkError, match=message):
            generate(tmp_path, spec, experts)


def test_released_procedure_is_the_definition(made: Checkpoints) -> None:
    """Against numpy in float64, on a square and on wide and tall matrices; other weights are task arithmetic."""
    base, experts = load(made.base), [load(path) for path in made.experts.values()]
    merged = merge(base, experts, RELEASED, rank=7, density=0.2, lam=0.2)
    assert merged.keys() == base.keys()
    layer = "model.decoder.layers.0"
    for name in (f"{layer}.encoder_attn.k_proj.weight", f"{layer}.fc1.weight", f"{layer}.fc2.weight"):
        expected = base[name].double().numpy()
        for expert in experts:
            delta = expert[name].double().numpy() - base[name].double().numpy()
            u, s, vt = np.linalg.svd(delta, full_matrices=False)
            low = (u[:, :7] * s[:7]) @ vt[:7]
            residual = delta - low
            k = int(delta.size * 0.2)
            kept = np.abs(residual) >= np.sort(np.abs(residual), axis=None)[-k]
            assert kept.sum() == k
            expected = expected + 0.2 * (low + residual * kept)
        wrong = np.abs(merged[name].numpy() - expected) > 1e-7
        assert wrong.sum() <= 2, "more than an entry at the threshold differs"
    name = f"{layer}.fc1.bias"
    torch.testing.assert_close(merged[name], base[name] + 0.2 * sum(expert[name] - base[name] for expert in experts))


def test_thin_svd_with_kthvalue_is_the_same_procedure(made: Checkpoints) -> None:
    base, experts = load(made.base), [load(path) for path in made.experts.values()]
    full, thin = (merge(base, experts, procedure) for procedure in (RELEASED, THIN))
    for name in base:
        assert int(((full[name] - thin[name]).abs() > 1e-6).sum()) <= 2, name
    dense = merge(base, experts, THIN, density=0.5)
    assert not torch.equal(dense["model.encoder.layers.0.fc1.weight"], thin["model.encoder.layers.0.fc1.weight"])


def test_tuned_svd_lowrank_meets_its_target_and_the_default_does_not() -> None:
    delta = torch.from_numpy(power_law(random(0, 1, "x"), 256, 128))
    tuned = tune_lowrank([delta], 7)
    assert tuned["met"] and tuned["error"] <= 1e-3
    torch.manual_seed(0)
    found = relative_error(lowrank_svd(tuned["q"], tuned["niter"])(delta, 7), delta, 7)
    assert found == pytest.approx(tuned["error"], rel=0.05)
    assert relative_error(lowrank_svd(15, 2)(delta, 7), delta, 7) > 1e-2
    assert relative_error(thin_svd(delta, 7), delta, 7) < 1e-5


def test_difference_of_checkpoints(made: Checkpoints) -> None:
    ca, de = made.experts["ca"], made.experts["de"]
    assert difference(ca, ca, made.base) == {"relative": 0.0, "largest": 0.0}
    found = difference(ca, de, made.base)
    assert found["relative"] == pytest.approx(2**0.5, rel=0.1)  # independent deltas of one size
    assert found["largest"] > 5e-4


def test_results_resume_only_the_same_measurement(tmp_path: Path) -> None:
    first = Results("merge", label="x", settings={"repeats": 5}, directory=tmp_path)
    assert first.record("one", lambda: {"value": 1}) == {"value": 1}

    def fail() -> dict[str, Any]:
        raise BenchmarkError("no luck")

    assert first.record("two", fail) == {"failed": "no luck"}
    again = Results("merge", label="x", settings={"repeats": 5}, resume=True, directory=tmp_path)
    assert again.record("one", fail) == {"value": 1}
    assert again.record("two", lambda: {"value": 2}) == {"value": 2}
    with pytest.raises(BenchmarkError, match="cannot resume: expected settings"):
        Results("merge", label="x", settings={"repeats": 3}, resume=True, directory=tmp_path)
    assert newest("merge", tmp_path) == again.data
    assert newest("compute", tmp_path) is None
    Results("compute", quick=True, directory=tmp_path).save()
    assert newest("compute", tmp_path) is None, "quick results never reach the tables"


def run_of(seconds: float) -> dict[str, Any]:
    return {
        "wall_s": spread([seconds]), "user_s": spread([1.5 * seconds]), "system_s": spread([0.1]),
        "peak_rss": spread([1e9]), "repeats": 1,
    }  # fmt: skip


def test_tables_are_rendered_and_checked(tmp_path: Path) -> None:
    results = Results("merge", label="x", directory=tmp_path)
    commands = {"lors": run_of(2.0), "mergekit TIES": run_of(125.0), "as released": {"failed": "killed"}}
    commands["floor: read inputs"] = run_of(0.5)
    results.record("small", lambda: {"commands": commands, "ratios": {}, "agreement": {}})
    compute = Results("compute", label="x", directory=tmp_path)
    compute.record("ours", lambda: {"seconds": spread([1.0, 1.5, 2.0]), "error": 1e-6})
    pages = tmp_path / "README.md", tmp_path / "measurements.md"
    for page in pages:
        page.write_text(f"before\n{table.START}\n{table.END}\nafter\n")
    with pytest.raises(BenchmarkError, match="got a difference"):
        table.check(*pages, tmp_path)
    table.update(*pages, tmp_path)
    table.check(*pages, tmp_path)
    short, full = (page.read_text() for page in pages)
    assert full.startswith("before\n") and full.endswith("\nafter\n")
    assert "| mergekit TIES | 125 s | 62x | 1.00 GB | 188 s |" in full and "| as released | failed | | |  |" in full
    assert "| floor: read inputs | 0.5 s |" in full and "1.5 s (1 to 2)" in full
    assert "| small: mergekit TIES | 125 s | 62x | 1.00 GB |" in short and "floor" not in short and "1.5 s" not in short
    for page, text in zip(pages, (short, full), strict=True):
        page.write_text(text.replace("62x", "99x"))
        with pytest.raises(BenchmarkError, match=f"{page.name}: .*got a difference: .*99x"):
            table.check(*pages, tmp_path)
        page.write_text(text)
    pages[1].write_text("no markers")
    with pytest.raises(BenchmarkError, match="measurements.md: expected one <!-- bench:start -->"):
        table.check(*pages, tmp_path)


def test_committed_tables_are_what_the_results_say() -> None:
    table.check()


@pytest.mark.parametrize("name", ["cpu portable", "batched, blocks of 8", "dense portable, any rank"])
def test_certificate_tells_claims_that_do_not_hold(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = cpu.library()
    judged = bench_certificate.judge_chunk(name, 0, 46, 8, 40)
    assert cpu.library() is library, "what was judged last is not what every later merge of this process runs"
    assert len({kind for kind, *_ in judged}) == 23 and not any(fault for *_, fault in judged)
    honest = bench_certificate.decompose

    def bold(name: str, cases: list[Any]) -> Any:
        return (found and found._replace(residual=0.01 * found.residual) for found in honest(name, cases))

    monkeypatch.setattr(bench_certificate, "decompose", bold)
    faults = [fault for *_, fault in bench_certificate.judge_chunk(name, 0, 46, 8, 40) if fault]
    assert len(faults) > 20 and all(
        "ClaimVerdict(kind='error'" in fault or "kind='energy'" in fault for fault in faults
    )
