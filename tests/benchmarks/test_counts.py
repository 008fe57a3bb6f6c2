"""Counts from machine code: parsed right, and the page that is committed is what the committed numbers say."""

from __future__ import annotations

import json

import pytest

from benchmarks import counts
from benchmarks.errors import BenchmarkError
from benchmarks.machine import ROOT

SASS = """
	code for sm_90
		Function : _ZN4lors46_GLOBAL__N__3b53b017_13_gram_apply_cu_c7825c8011gram_kernelILNS_4KindE1ELb0ELi5EEEvNS0_4GramE
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x00000a00ff017b82 */
                                                                           /* 0x000fe20000000800 */
        /*0010*/                   LDGSTS.E.BYPASS.128 [R3], [R4] ;        /* 0x00000a00ff017b82 */
        /*0020*/              @!P0 FFMA R1, R2, R3, R4 ;                   /* 0x00000a00ff017b82 */
        /*0030*/                   LDS.128 R4, [R8] ;                      /* 0x00000a00ff017b82 */
        /*0040*/               @P1 BRA 0x20 ;                              /* 0x00000a00ff017b82 */
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;           /* 0x00000a00ff017b82 */
        /*0060*/               @P2 BRA 0x10 ;                              /* 0x00000a00ff017b82 */
        /*0070*/                   BRA 0x70 ;                              /* 0x00000a00ff017b82 */
		Function : _ZN4lors54_GLOBAL__N__99f601e8_21_residual_threshold_cu_4507091114descend_kernelEbiiPKlPiPlS4_S4_
        /*0000*/                   EXIT ;                                  /* 0x00000a00ff017b82 */
"""
COMMITTED = ROOT / "benchmarks" / "results" / "counts.json"


def test_kernels_loops_and_classes() -> None:
    gram, descend = counts.parse(SASS)
    assert (gram.name, gram.variant) == ("gram_kernel", "float16 rows x5") and descend.name == "descend_kernel"
    assert [tuple(loop) for loop in gram.loops] == [(0x10, 0x60), (0x20, 0x40)], "the trap behind the end is no loop"
    loop = counts.main_loop(gram)
    assert loop is not None
    found = counts.classes(gram.inside(loop))
    assert found == {
        "instructions": 6, "fma": 1, "tensor": 0, "double": 0, "barriers": 1, "shared": 1, "shuffles": 0,
        "copies": 1, "loads": 0, "stores": 0,
    }  # fmt: skip
    with pytest.raises(BenchmarkError, match="expected a kernel's name, got 'main'"):
        counts.demangle("main")


def test_blocks_that_fit_a_processor() -> None:
    fits = counts.blocks_per_processor
    assert [fits(registers, 0, 256, "90") for registers in (32, 64, 65, 128, 176, 255)] == [8, 4, 3, 2, 1, 1]
    assert fits(32, 80 << 10, 256, "90") == 2 and fits(32, 80 << 10, 256, "80") == 2 and fits(32, 0, 32, "90") == 32


def test_calls_of_the_host_are_counted() -> None:
    found = counts.count_calls()
    assert found["expand"]["own kernels"] >= 1 and found["decompose"]["launches"] > found["expand"].get("launches", 0)
    assert found["merge"]["own kernels"] >= found["decompose"]["own kernels"] + 9


def test_the_page_is_what_the_committed_counts_say() -> None:
    data = json.loads(COMMITTED.read_text())
    assert (ROOT / "docs" / "gpu-counts.md").read_text() == counts.render(data)
    assert "sm_90" in data["kernels"], "the predictions are of it"
    # what docs/gpu-notes.md names: gram_apply with 1280 of the shorter side keeps a few registers on the stack
    for arch, rows in data["kernels"].items():
        spills = {name: row["stack"] for name, row in rows.items() if row["stack"]}
        wide = ("gram_tensor_kernel float16",) if arch != "sm_100" else ("gram_tensor_kernel float",)
        assert all(name.startswith(wide) and name[-1] in "45" and stack <= 32 for name, stack in spills.items()), spills


def test_predictions_stand_beside_their_goals() -> None:
    predicted = json.loads(COMMITTED.read_text())["predicted"]
    assert {name: row["ms wanted"] for name, row in predicted.items() if "ms wanted" in row} == counts.GOALS
    for row in predicted.values():
        assert (
            row["ms predicted"] >= max(row.get("ms by bytes", 0), row.get("ms by issue", 0)) > 0 or "bytes" not in row
        )


def test_an_expansion_is_five_launches() -> None:
    found = counts.count_calls()["expand"]
    assert found["own kernels"] == 2 and found["launches"] <= 3, found  # with the sum of gram_apply's parts
