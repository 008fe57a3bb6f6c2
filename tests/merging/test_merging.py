"""The merge engine end to end: files to files and tensors to tensors, against the definition and against the reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import lors
import tiny
import whispers
from helpers import module
from lors import LorsError

EXPERTS = ("ca", "de", "es")


def experts_of(root: Path) -> dict[str, Path]:
    return {name: root / name for name in EXPERTS}


def test_paper_settings_are_the_definition(tiny_whisper: Path, tmp_path: Path) -> None:
    report = lors.merge(tiny_whisper / "base", experts_of(tiny_whisper), tmp_path / "out")
    base, experts = whispers.load(tiny_whisper / "base"), [whispers.load(tiny_whisper / name) for name in EXPERTS]
    whispers.assert_close(whispers.load(tmp_path / "out"), whispers.by_definition(base, experts), base)
    assert report.backend == "cpu" and report.method == "lors" and report.experts == list(EXPERTS)
    assert report.decomposed == sum("_proj.weight" in name or ".fc" in name and "weight" in name for name in base)
    assert report.svd_worst <= 1e-5
    assert report.bytes_written == sum(x.nbytes for x in base.values())
    assert report.bytes_read == 4 * report.bytes_written


@pytest.mark.parametrize("device", [None, "cpu"])
def test_decompositions_that_are_not_unique_are_told(device: str | None, tmp_path: Path) -> None:
    """An expert whose difference in two matrices is a multiple of the identity: any seven directions are as good as others."""
    base = tiny.tensors(0, 0.5)
    tuned = {
        name: value + delta for (name, value), delta in zip(base.items(), tiny.tensors(1, 0.1).values(), strict=True)
    }
    equal = [f"model.encoder.layers.0.self_attn.{role}_proj.weight" for role in ("q", "k")]
    for name in equal:
        base[name], tuned[name] = np.zeros_like(base[name]), 0.25 * np.eye(*base[name].shape, dtype=np.float32)
    origin, model = tiny.write(tmp_path / "base", base), tiny.write(tmp_path / "a", tuned)
    report = lors.merge(origin, {"a": model}, tmp_path / "out", device=device)
    assert report.svd_not_unique == report.to_dict()["svd_not_unique"] == 2 and 0 < report.svd_worst <= 1e-5
    (notice,) = (line for line in report.notices if "unique" in line)
    assert notice.startswith(
        f"2 of {report.decomposed} decompositions are not unique: singular values are equal across"
    )


@pytest.mark.parametrize("method", ["lors", "svp", "magnitude_prune", "task_arithmetic"])
def test_methods_are_special_cases(method: str, tiny_whisper: Path) -> None:
    base, experts = whispers.load(tiny_whisper / "base"), [whispers.load(tiny_whisper / name) for name in EXPERTS]
    merged = lors.merge_state_dicts(
        base, dict(zip(EXPERTS, experts, strict=True)), method, lam=0.3, weight={"ca": 0.5, "de": 2.0}
    )
    same_as = {"lors": (7, 0.2), "svp": (7, 0.0), "magnitude_prune": (0, 0.2), "task_arithmetic": (0, 1.0)}[method]
    expected = whispers.by_definition(base, experts, *same_as, lam=0.3, weights=[0.5, 2.0, 1.0])
    whispers.assert_close(merged, expected, base)


@pytest.mark.parametrize("normalize", [True, False])
def test_linear(normalize: bool, tiny_whisper: Path) -> None:
    experts = {name: whispers.load(tiny_whisper / name) for name in EXPERTS}
    weights = {"ca": 0.2, "de": 0.3, "es": 0.9}
    merged = lors.merge_state_dicts(experts["ca"], experts, "linear", weight=weights, normalize=normalize)
    scale = sum(weights.values()) if normalize else 1.0
    for name, got in merged.items():
        want = sum(weights[label] * state[name].astype(np.float64) for label, state in experts.items()) / scale
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_linear_has_the_type_and_the_files_of_the_base(tiny_whisper: Path, tmp_path: Path) -> None:
    """Of its first model only where there is no base."""
    base = whispers.copy(tiny_whisper / "base", tmp_path / "base", whispers.cast("bfloat16"), comment="of the base")
    half = whispers.copy(tiny_whisper / "ca", tmp_path / "half", whispers.cast("float16"))
    lors.merge(base, {"ca": half, "de": tiny_whisper / "de"}, tmp_path / "out", "linear", weight=0.5)
    merged, states = whispers.load(tmp_path / "out"), [whispers.load(path) for path in (half, tiny_whisper / "de")]
    assert {str(x.dtype) for x in merged.values()} == {"bfloat16"}
    assert json.loads((tmp_path / "out/config.json").read_text())["comment"] == "of the base"
    for name, got in merged.items():
        want = 0.5 * sum(state[name].astype(np.float64) for state in states)
        np.testing.assert_allclose(got.astype(np.float64), want, rtol=2.0**-8, atol=1e-7)
    models = "".join(f"  - {{model: {path}, parameters: {{weight: 1}}}}\n" for path in (half, tiny_whisper / "de"))
    (tmp_path / "recipe.yml").write_text(f"merge_method: linear\nmodels:\n{models}")
    recipe = lors.Recipe.load(tmp_path / "recipe.yml", __import__("lors.methods").methods.SPECS)
    lors.merge_recipe(recipe, tmp_path / "without")
    assert {str(x.dtype) for x in whispers.load(tmp_path / "without").values()} == {"float16"}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "dtypes",
    [
        ("float16", "float16", "float16"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float32", "float16", "bfloat16"),
        ("float16", "float32", "float32"),
    ],
)
def test_dtypes_and_backends(dtypes: tuple[str, str, str], backend: str, tiny_whisper: Path, tmp_path: Path) -> None:
    """base, first expert, second expert; the output has the base's type, computed in float32."""
    paths = [
        whispers.copy(tiny_whisper / name, tmp_path / name, whispers.cast(dtype))
        for name, dtype in zip(("base", "ca", "de"), dtypes, strict=True)
    ]
    lors.merge(paths[0], {"ca": paths[1], "de": paths[2]}, tmp_path / "out", backend=backend, lam=1.0)
    base, *experts = (whispers.load(path) for path in paths)
    merged = whispers.load(tmp_path / "out")
    assert {str(x.dtype) for x in merged.values()} == {dtypes[0]}
    whispers.assert_close(merged, whispers.by_definition(base, experts, lam=1.0), base)


def test_openai_naming_gives_the_same_weights(tiny_whisper: Path, tmp_path: Path) -> None:
    import torch

    states = {name: whispers.load(tiny_whisper / name) for name in ("base", "ca", "de")}
    dims = {"n_mels": 80, "n_audio_state": 64}
    paths = {name: whispers.save_openai(state, tmp_path / f"{name}.pt", dims) for name, state in states.items()}
    lors.merge(paths["base"], {"ca": paths["ca"], "de": paths["de"]}, tmp_path / "openai")
    lors.merge(tiny_whisper / "base", {"ca": tiny_whisper / "ca", "de": tiny_whisper / "de"}, tmp_path / "hf")
    saved = torch.load(tmp_path / "openai" / "model.pt", weights_only=True)
    assert saved["dims"] == dims
    for name, x in whispers.load(tmp_path / "hf").items():
        assert saved["model_state_dict"][whispers.openai_name(name)].numpy().tobytes() == x.tobytes()


def test_same_bits_for_any_number_of_threads_and_shards(tiny_whisper: Path, tmp_path: Path) -> None:
    first = None
    for threads, size in ((1, None), (2, "100KB"), (5, "1GB")):
        out = tmp_path / f"{threads}"
        lors.merge(tiny_whisper / "base", experts_of(tiny_whisper), out, threads=threads, out_shard_size=size)
        with lors.open_checkpoint(out) as merged:
            assert (len(merged.files) > 1) == (size == "100KB")
            bits = {name: merged.read(name).tobytes() for name in merged.tensors}
        first = first or bits
        assert bits == first


def test_slabs_do_not_show(tiny_whisper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that are merged in slabs come out as if merged whole, whatever the slab."""
    from lors.engine import cpu, work
    from lors.experts import source

    base, ca = whispers.load(tiny_whisper / "base"), whispers.load(tiny_whisper / "ca")
    whole = lors.merge_state_dicts(base, {"ca": ca}, "task_arithmetic")
    for reader in (cpu, work):
        monkeypatch.setattr(reader, "SLAB", 777)
    monkeypatch.setattr(source, "COLUMNS", 50)
    slabs = lors.merge_state_dicts(base, {"ca": ca}, "task_arithmetic")
    assert all(whole[name].tobytes() == slabs[name].tobytes() for name in whole)


def test_transformers_loads_and_generates(tiny_whisper: Path, tmp_path: Path) -> None:
    transformers = module("transformers", "peers")
    import torch

    lors.merge(tiny_whisper / "base", experts_of(tiny_whisper), tmp_path / "out", check=True)
    model, info = transformers.WhisperForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.proj_out.weight.data_ptr() == model.model.decoder.embed_tokens.weight.data_ptr()
    merged = whispers.load(tmp_path / "out")
    for name, x in model.state_dict().items():
        if name in merged:
            assert (x.numpy() == merged[name]).all()
    recogniser = transformers.pipeline("automatic-speech-recognition", model=str(tmp_path / "out"))
    sound = np.sin(np.arange(16000) / 20).astype(np.float32)
    torch.manual_seed(0)
    assert isinstance(recogniser(sound, generate_kwargs={"max_new_tokens": 4})["text"], str)


def test_output_directory_is_complete(tiny_whisper: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lors.merge(tiny_whisper / "base", experts_of(tiny_whisper), out, density=0.1)
    ours = {path.name for path in (tiny_whisper / "base").iterdir()} - {"generated.json"}
    older = {"preprocessor_config.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"}
    assert {path.name for path in out.iterdir()} == ours | older | {"README.md", "lors_recipe.yml", "lors_ledger.json"}
    card = (out / "README.md").read_text()
    import hashlib

    for name in ("base", *EXPERTS):
        assert hashlib.sha256((tiny_whisper / name / "model.safetensors").read_bytes()).hexdigest() in card
    again = lors.Recipe.load(out / "lors_recipe.yml", __import__("lors.methods").methods.SPECS)
    lors.merge_recipe(again, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("rest", ["task_arithmetic", "average", "base"])
def test_rest(rest: str, tiny_whisper: Path) -> None:
    base, ca, de = (whispers.load(tiny_whisper / name) for name in ("base", "ca", "de"))
    merged = lors.merge_state_dicts(base, {"ca": ca, "de": de}, rest=rest, lam=0.3)
    name = "model.encoder.conv1.bias"
    factor = {"task_arithmetic": 0.3, "average": 0.5, "base": 0.0}[rest]
    want = base[name].astype(np.float64) + factor * (
        (ca[name].astype(np.float64) - base[name]) + (de[name].astype(np.float64) - base[name])
    )
    np.testing.assert_allclose(merged[name], want, rtol=1e-6, atol=1e-7)


def test_target_gradient_filter_and_fraction(tiny_whisper: Path) -> None:
    base, ca = whispers.load(tiny_whisper / "base"), whispers.load(tiny_whisper / "ca")
    merged = lors.merge_state_dicts(
        base, {"ca": ca}, lam=1.0, rank=[{"filter": "fc1", "value": 0.5}, {"value": 3}], density=0.0,
        target={"include": [r"encoder.*fc1\.weight$", r"encoder.*q_proj\.weight$"]},
    )  # fmt: skip

    def rank_of(name: str) -> int:
        return int(np.linalg.matrix_rank(merged[name].astype(np.float64) - base[name], tol=1e-5))

    names = [name for name in base if name.startswith("model.encoder.layers.0")]
    fc1, q, k = (
        next(name for name in names if part in name) for part in ("fc1.weight", "q_proj.weight", "k_proj.weight")
    )
    assert rank_of(fc1) == min(base[fc1].shape) // 2
    assert rank_of(q) == 3
    assert rank_of(k) > 3  # not a target: keeps its full difference


def test_merging_torch_state_dicts_gives_torch(tiny_whisper: Path) -> None:
    import torch

    states = {
        name: {key: torch.from_numpy(x).bfloat16() for key, x in whispers.load(tiny_whisper / name).items()}
        for name in ("base", "ca")
    }
    merged = lors.merge_state_dicts(states["base"], {"ca": states["ca"]})
    assert all(isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 for x in merged.values())
    assert all(merged[name].shape == x.shape for name, x in states["base"].items())


def test_integer_scalar_and_empty_tensors_are_carried() -> None:
    base = {"steps": np.array(7, np.int64), "empty": np.empty((0, 3), np.float32), "scale": np.array(1.0, np.float32)}
    tuned = {"steps": np.array(9, np.int64), "empty": np.empty((0, 3), np.float32), "scale": np.array(2.0, np.float32)}
    merged = lors.merge_state_dicts(base, {"t": tuned}, "task_arithmetic", lam=0.5)
    assert merged["steps"] == 7 and merged["empty"].shape == (0, 3) and merged["scale"] == 1.5


def test_tied_head_stored_by_an_expert_only(tiny_whisper: Path, tmp_path: Path) -> None:
    def store_head(state: whispers.State) -> None:
        state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]

    whispers.copy(tiny_whisper / "ca", tmp_path / "ca", store_head)
    lors.merge(tiny_whisper / "base", {"ca": tmp_path / "ca"}, tmp_path / "with")
    lors.merge(tiny_whisper / "base", {"ca": tiny_whisper / "ca"}, tmp_path / "without")
    assert (tmp_path / "with/model.safetensors").read_bytes() == (tmp_path / "without/model.safetensors").read_bytes()


def test_import_is_inert() -> None:
    import subprocess
    import sys

    code = "import sys, lors, lors_kernels, lors.cli.app; print([m for m in ('torch', 'transformers', 'matplotlib', 'lors_kernels._cpu_avx512', 'lors_kernels._cpu_portable') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_cpu_merge_does_without_torch(tiny_whisper: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = f"""
import sys, lors
lors.merge({str(tiny_whisper / "base")!r}, {{"ca": {str(tiny_whisper / "ca")!r}}}, {str(tmp_path / "out")!r})
print("torch" in sys.modules)"""
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "name", ["model.encoder.layers.0.fc1.weight", "model.encoder.conv1.weight", "model.decoder.layer_norm.bias"]
)
@pytest.mark.parametrize("method", ["lors", "svp", "magnitude_prune", "task_arithmetic"])
def test_non_finite_weights_are_named_and_counted(
    value: float, name: str, method: str, tiny_whisper: Path, tmp_path: Path
) -> None:
    def spoil(state: whispers.State) -> None:
        state[name].reshape(-1)[[0, 5, -1]] = value

    whispers.copy(tiny_whisper / "de", tmp_path / "de", spoil)
    with pytest.raises(LorsError, match=rf"de: tensor '{name}': expected finite values, got 3 NaN or infinite"):
        lors.merge(tiny_whisper / "base", {"ca": tiny_whisper / "ca", "de": tmp_path / "de"}, tmp_path / "out", method)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["de"]


def test_float16_overflow_is_named(tiny_whisper: Path, tmp_path: Path) -> None:
    def blow_up(state: whispers.State) -> None:
        state["model.encoder.conv1.bias"][3] = 1e6

    whispers.copy(tiny_whisper / "ca", tmp_path / "ca", blow_up)
    with pytest.raises(LorsError, match=r"conv1.bias.*expected at most 65504 for float16"):
        lors.merge(tiny_whisper / "base", {"ca": tmp_path / "ca"}, tmp_path / "out", out_dtype="float16")


def test_nan_does_not_pass_into_half_precision() -> None:
    base = {"a": np.array([1.0, np.nan], np.float32)}
    with pytest.raises(LorsError, match=r"base: tensor 'a': expected finite values, got 1 NaN or infinite"):
        lors.merge_state_dicts(base, {"e": base}, method="task_arithmetic", weight=0.0, out_dtype="float16")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank: expected an integer >= 1 or a fraction"),
        ({"rank": 1000}, r"rank: expected at most min\(m, n\) = .* got 1000"),
        ({"density": 1.5}, r"density: expected a number in \[0, 1\], got 1.5"),
        ({"densty": 0.5}, "densty.*did you mean 'density'"),
        ({"method": "lorse"}, "unknown method 'lorse', did you mean 'lors'"),
        ({"backend": "gpu"}, "backend: expected one of"),
        ({"threads": 0}, "threads: expected 1 to"),
        ({"target": {"include": ["nothing"]}}, "target.include: 'nothing' matches none"),
        ({"method": "linear", "weight": 1.0, "target": {"include": ["fc1"]}}, "treats all tensors alike"),
        ({"method": "linear", "weight": {"ca": 1.0, "de": -1.0}}, "weights whose sum is not 0"),
    ],
)
def test_wrong_settings(settings: dict[str, object], message: str, tiny_whisper: Path, tmp_path: Path) -> None:
    experts = {"ca": tiny_whisper / "ca", "de": tiny_whisper / "de"}
    with pytest.raises(LorsError, match=message) as error:
        lors.merge(tiny_whisper / "base", experts, tmp_path / "out", **settings)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lors.merge("a", ["b"], "o"), r"experts: expected a mapping of labels to models, got \['b'\]"),
        (lambda: lors.merge("a", {"x": None}, "o"), "expert 'x': expected a path or hub id, got nothing"),
        (lambda: lors.merge(3, {"x": "b"}, "o"), "base: expected a path or hub id, got 3"),
        (lambda: lors.merge_state_dicts({}, [{}]), "experts: expected a mapping of labels to state dicts, got list"),
        (lambda: lors.merge_state_dicts(torch.nn.Linear(2, 2), {}), "base: .*got Linear; pass its state_dict()"),
        (
            lambda: lors.merge_state_dicts({"w": [1.0]}, {"x": {}}),
            "base: tensor 'w': expected a torch tensor .* got list",
        ),
        (lambda: lors.merge_state_dicts({}, {"x": {0: np.ones(1)}}), "x: expected names that are strings, got 0"),
    ],
)
def test_arguments_of_another_type(call: Callable[[], object], message: str) -> None:
    with pytest.raises(LorsError, match=message):
        call()


def _without(name: str):  # type: ignore[no-untyped-def]
    return lambda state: {key: x for key, x in state.items() if key != name}


def _with(name: str, value: np.ndarray):  # type: ignore[no-untyped-def]
    return lambda state: {**state, name: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("model.encoder.conv1.bias"), "bad: .*lacks 1 tensor 'model.encoder.conv1.bias'"),
        (_with("extra.weight", np.zeros((2, 2), np.float32)), "bad: .*extra 1 tensor 'extra.weight'"),
        (_with("model.encoder.conv1.bias", np.zeros(7, np.float32)), "conv1.bias.*expected shape"),
        (_with("model.encoder.conv1.bias", np.zeros(64, np.int32)), "conv1.bias.*"),
    ],
)
def test_other_architectures(change, message: str, tiny_whisper: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    whispers.copy(tiny_whisper / "ca", tmp_path / "bad", change)
    with pytest.raises(LorsError, match=message):
        lors.merge(tiny_whisper / "base", {"bad": tmp_path / "bad"}, tmp_path / "out")


def test_report_is_json(tiny_whisper: Path, tmp_path: Path) -> None:
    report = lors.merge(tiny_whisper / "base", experts_of(tiny_whisper), tmp_path / "out")
    data = json.loads(json.dumps(report.to_dict()))
    rows = [row for row in data["kinds"] if row["decomposed"]]
    assert rows and all(0 < row["low_share"] < 1 and 0 < row["sparse_share"] < 1 for row in rows)
    assert all(row["low_share"] + row["sparse_share"] <= 1 + 1e-9 for row in rows)
