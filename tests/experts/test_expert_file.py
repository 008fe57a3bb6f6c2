"""Expert files: what is stored is what is merged, whatever else is refused; adding and removing in place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lors
import tiny
from benchmarks.generate import power_law
from experts import EXPERTS, distance, files, merged, refusal, state
from lors.checkpoints.reader import open_checkpoint
from lors.errors import LorsError
from lors.experts.decompose import decompose
from lors.experts.expert_file import decode_gaps, encode_gaps
from lors.experts.expert_source import ExpertSource, open_expert
from lors.merging.edit import edit
from lors.merging.in_memory import merge_in_memory

EXACT = {"values": "float32", "remainder": "float32"}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny.family(tmp_path_factory.mktemp("family"), EXPERTS)


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


@pytest.mark.parametrize("numel", [1, 8, 300, 70_000])
@pytest.mark.parametrize("density", [0.0, 0.001, 0.1, 1.0])
def test_gaps_are_the_mask(numel: int, density: float) -> None:
    bits = np.random.default_rng(1).random(numel) < density
    mask = np.packbits(bits, bitorder="little")
    size = int(bits.sum()) + numel // 255
    coded = encode_gaps(mask, numel, size)
    assert coded.size == size and np.array_equal(decode_gaps(coded, numel), mask)


# --- merging from files


@pytest.mark.parametrize("index", ["mask", "gaps"])
def test_full_precision_files_merge_to_the_same_bits(family: dict[str, Path], tmp_path: Path, index: str) -> None:
    made = files(family, tmp_path, index=index, **EXACT)
    for settings in ({}, {"density": 0.05}, {"lam": 1.0, "weight": {"ca": 0.5, "de": -1.0}}, {"density": 0.0}):
        want, got = tmp_path / f"want{settings}", tmp_path / f"got{settings}"
        lors.merge(family["base"], {name: family[name] for name in EXPERTS}, want, **settings)
        report = lors.merge(family["base"], made, got, check=True, **settings)
        assert equal(state(got), state(want)), settings
        assert report.decomposed == 32 and all(row.low_share > 0 for row in report.kinds if row.decomposed)


def test_precision_and_size_of_the_options(family: dict[str, Path], tmp_path: Path) -> None:
    want = tmp_path / "want"
    lors.merge(family["base"], {name: family[name] for name in EXPERTS}, want)
    base = state(family["base"])
    sizes = []
    for values, remainder, most in (
        ("float32", "float16", 1e-3),
        ("float16", "float16", 1e-3),
        ("bfloat16", "int8", 1e-2),
    ):
        into = tmp_path / f"{values}-{remainder}"
        into.mkdir()
        made = files(family, into, values=values, remainder=remainder)
        lors.merge(family["base"], made, into / "out")
        error = distance(state(into / "out"), state(want), base)
        assert 0 < error < most, (values, remainder, error)
        sizes.append(Path(made["ca"]).stat().st_size)
        done = decompose(family["base"], family["ca"], into / "again", values=values, remainder=remainder)
        assert error / 3 < done.error < error * 3, "what decompose says it loses is what a merge loses"
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_smaller_rank_from_the_same_file(family: dict[str, Path], tmp_path: Path) -> None:
    """L' is exact; S' is chosen from what the file knows, which a density of 1 makes everything."""
    made = files(family, tmp_path, rank=9, density=1.0, **EXACT)
    experts = {name: family[name] for name in EXPERTS}
    for number, settings in enumerate(
        ({"rank": 2, "density": 0.1}, {"rank": 9, "density": 0.3}, {"method": "svp", "rank": 4})
    ):
        want, got = tmp_path / f"want{number}", tmp_path / f"got{number}"
        lors.merge(family["base"], experts, want, **settings)
        lors.merge(family["base"], made, got, **settings)
        # rank 9 and rank 2 are two runs of the decomposition: its contract is 1e-5 of L; an entry or two at the
        # threshold may change sides
        assert distance(state(got), state(want), state(family["base"])) < 5e-3


@pytest.mark.parametrize(("rank", "density", "off"), [(7, 0.1, 0.0), (5, 0.2, 0.195), (3, 0.1, 0.208), (0, 0.2, 0.328)])
def test_how_far_off_a_smaller_rank_is(rank: int, density: float, off: float, tmp_path: Path) -> None:
    """The numbers of docs/expert-files.md, and the note that a merge makes of them."""
    name = "model.decoder.layers.0.fc1.weight"
    delta = power_law(np.random.default_rng(3), 768, 768)
    for label, values in (("base", np.zeros_like(delta)), ("ca", delta)):
        tiny.write(tmp_path / label, {name: values})
    base, made = tmp_path / "base", tmp_path / "ca.lors.safetensors"
    decompose(base, tmp_path / "ca", made, rank=7, density=0.2, **EXACT)
    settings: dict[str, Any] = {"density": density, "lam": 1.0, "target": {"include": ["fc1"]}}
    settings |= {"rank": rank} if rank else {"method": "magnitude_prune"}
    want = lors.merge_state_dicts({name: np.zeros_like(delta)}, {"ca": {name: delta}}, **settings)[name]
    report = lors.merge(base, {"ca": made}, tmp_path / "got", **settings)
    got = state(tmp_path / "got")[name]
    assert np.linalg.norm(got - want) / np.linalg.norm(want) == pytest.approx(off, abs=2e-3)
    assert any("a smaller rank is asked for" in notice for notice in report.notices) == (rank < 7)


COMBINED: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"lam": 0.7},
    "ties": {"density": 0.3},
    "dare_ties": {"density": 0.5, "seed": 3},
    "della_linear": {"density": 0.5, "epsilon": 0.2},
    "breadcrumbs": {"density": 0.6},
    "tsv": {},
    "iso_c": {},
    "iso_cts": {"common": 0.5},
    "wudi": {"ridge": 0.1},
}


@pytest.mark.parametrize("method", COMBINED)
@pytest.mark.parametrize("stored", [EXACT | {"density": 1.0, "rank": 2}, {"density": 0.2, "rank": 2}])
def test_every_method_takes_a_file_for_the_checkpoint_that_it_stands_for(
    family: dict[str, Path], tmp_path: Path, method: str, stored: dict[str, Any]
) -> None:
    """A file beside checkpoints is the float32 checkpoint W0 + L + S: of all entries, that is the expert itself."""
    path = decompose(family["base"], family["ca"], tmp_path / "ca.lors.safetensors", **stored).path
    base = state(family["base"])
    with open_checkpoint(path) as opened:
        known = ExpertSource(opened)
        stand_in = tiny.write(tmp_path / "ca", {name: base[name] + known.update(name) for name in base})
    others = {name: family[name] for name in ("de", "es")}
    settings = COMBINED[method]
    report = lors.merge(family["base"], {"ca": path, **others}, tmp_path / "got", method, **settings)
    lors.merge(family["base"], {"ca": stand_in, **others}, tmp_path / "want", method, **settings)
    got, want = state(tmp_path / "got"), state(tmp_path / "want")
    assert distance(got, want, base) < (1e-4 if method == "task_arithmetic" else 1e-7)  # one rounding more or less
    assert any("stands for its rank 2 and density 0.2" in n for n in report.notices) is (stored["density"] < 1)
    if stored["density"] == 1.0:
        assert distance(want, state(merged(family, tmp_path / "all", method, **settings)), base) < 1e-3
    else:
        assert distance(want, state(merged(family, tmp_path / "all", method, **settings)), base) > 1e-2


def test_a_part_is_not_taken_for_the_whole_when_an_expert_is_removed(family: dict[str, Path], tmp_path: Path) -> None:
    made = files(family, tmp_path, rank=2, density=0.2)
    lors.merge(family["base"], {name: family[name] for name in EXPERTS}, tmp_path / "whole", "task_arithmetic")
    assert "merged all of its checkpoint" in refusal(edit, tmp_path / "whole", made["ca"], remove=True)
    lors.merge(family["base"], made, tmp_path / "files", "task_arithmetic")
    edit(tmp_path / "files", made["ca"], remove=True)
    lors.merge(family["base"], {name: made[name] for name in EXPERTS[1:]}, tmp_path / "want", "task_arithmetic")
    assert distance(state(tmp_path / "files"), state(tmp_path / "want"), state(family["base"])) < 1e-3


@pytest.mark.parametrize("method", ["tsv", "iso_c"])
def test_a_file_of_low_rank_alone_has_no_other_directions(family: dict[str, Path], tmp_path: Path, method: str) -> None:
    """The rounding of W0 + L is none: as large as the others, it would be the most of the update."""
    path = decompose(family["base"], family["ca"], tmp_path / "ca.lors.safetensors", rank=3, density=0.0).path
    lors.merge(family["base"], {"ca": path}, tmp_path / "out", method)
    name = "model.encoder.layers.0.fc1.weight"
    update = state(tmp_path / "out")[name].astype(np.float64) - state(family["base"])[name]
    sigma = np.linalg.svd(update, compute_uv=False)
    assert sigma[2] > 1e-5 and sigma[3] < 1e-6, "three directions, and the rounding of W0 + update"


def test_left_out_remainder_keeps_the_base(family: dict[str, Path], tmp_path: Path) -> None:
    made = files(family, tmp_path, remainder="none")
    report = lors.merge(family["base"], made, tmp_path / "out")
    got, base = state(tmp_path / "out"), state(family["base"])
    name = "model.decoder.embed_tokens.weight"
    assert np.array_equal(got[name], base[name]) and any("leaves out" in notice for notice in report.notices)
    assert not np.array_equal(got["model.encoder.layers.0.fc1.weight"], base["model.encoder.layers.0.fc1.weight"])


def test_half_precision_experts(tmp_path: Path) -> None:
    family = tiny.family(tmp_path / "in", ("ca",), "bfloat16")
    made = decompose(family["base"], family["ca"], tmp_path / "ca.lors.safetensors", **EXACT).path
    lors.merge(family["base"], {"ca": family["ca"]}, tmp_path / "want")
    lors.merge(family["base"], {"ca": made}, tmp_path / "got")
    assert equal(state(tmp_path / "got"), state(tmp_path / "want"))


# --- refusals


def test_refusals(family: dict[str, Path], tmp_path: Path) -> None:
    path = decompose(family["base"], family["ca"], tmp_path / "ca.lors.safetensors", rank=4, density=0.2).path
    base = family["base"]
    merge = lambda out="out", **settings: refusal(
        lors.merge, settings.pop("base", base), {"ca": path}, tmp_path / out, **settings
    )
    assert "rank: expected at most 4" in merge(rank=5)
    assert "density: expected at most 0.2" in merge(rank=4, density=0.5)
    in_memory = {"rank: expected at most 4": {"rank": 5}, "density: expected at most 0.2": {"rank": 4, "density": 0.5}}
    for message, settings in in_memory.items():
        assert message in refusal(merge_in_memory, base, {"ca": path}, **settings)
    assert "needs whole checkpoints" in refusal(lors.merge, base, {"ca": path}, tmp_path / "out", "linear", weight=1.0)
    other = tiny.tensors(0, 0.5)
    other["model.encoder.conv1.weight"] = other["model.encoder.conv1.weight"] + 1
    assert "another base" in merge(base=tiny.write(tmp_path / "other", other), rank=4)
    del other["model.encoder.conv1.weight"]
    assert "another base: tensor 'model.encoder.conv1.weight'" in merge(
        base=tiny.write(tmp_path / "less", other), rank=4
    )
    experts = {"de": family["de"]}
    assert "as the base, got an expert file" in refusal(lors.merge, path, experts, tmp_path / "out", rank=4)
    assert "exists already" in refusal(decompose, base, family["ca"], path)
    assert "expert file already" in refusal(decompose, base, path, tmp_path / "x")
    assert "in [0, 1]" in refusal(decompose, base, family["ca"], tmp_path / "x", density=1.5)
    assert "rank: expected at most" in refusal(decompose, base, family["ca"], tmp_path / "x", rank=33)
    assert "values: expected one of" in refusal(decompose, base, family["ca"], tmp_path / "x", values="int4")
    assert "expected an expert file, got a checkpoint" in refusal(open_expert, family["ca"])
    assert sorted(os.listdir(tmp_path)) == ["ca.lors.safetensors", "less", "other"], "nothing is left behind"


def test_non_finite_experts_are_refused(family: dict[str, Path], tmp_path: Path) -> None:
    for name in ("model.encoder.layers.0.fc1.weight", "model.encoder.conv1.weight"):
        broken = state(family["ca"])
        broken[name].reshape(-1)[3:5] = np.inf
        path = tiny.write(tmp_path / name, broken)
        assert f"tensor '{name}'" in refusal(decompose, family["base"], path, tmp_path / "x.lors.safetensors")
    assert not (tmp_path / "x.lors.safetensors").exists()


def test_a_damaged_file_is_refused_wherever_it_is_damaged(family: dict[str, Path], tmp_path: Path) -> None:
    good = Path(decompose(family["base"], family["ca"], tmp_path / "ca.lors.safetensors").path)
    content = bytearray(good.read_bytes())
    rng = np.random.default_rng(3)
    for at in sorted(rng.integers(8, len(content), 25).tolist()):
        damaged = bytearray(content)
        damaged[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "bad.lors.safetensors").write_bytes(damaged)
        try:
            lors.merge(family["base"], {"ca": tmp_path / "bad.lors.safetensors"}, tmp_path / "out")
        except LorsError:
            assert not (tmp_path / "out").exists()
        else:
            pytest.fail(f"a flipped bit in byte {at} of {len(content)} went unnoticed")
    (tmp_path / "bad.lors.safetensors").write_bytes(content[:-100])
    assert "truncated" in refusal(
        lors.merge, family["base"], {"ca": tmp_path / "bad.lors.safetensors"}, tmp_path / "out"
    )


# --- command line


def test_a_file_that_cannot_be_written(family: dict[str, Path], tmp_path: Path) -> None:
    code = f"""
import resource
from lors.experts.decompose import decompose
from lors.errors import LorsError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    decompose({str(family["base"])!r}, {str(family["ca"])!r}, {str(tmp_path / "x.lors.safetensors")!r})
except LorsError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "too large" in done.stdout and os.listdir(tmp_path) == [], done.stderr
