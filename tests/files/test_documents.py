"""Documents from outside with values of every wrong type: refused in one line, before anything is done with them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lors
from fuzz.mutate import VALUES, places, replaced, sealed
from fuzz.targets import Corpus, adapter_of, survives
from lors.checkpoints.reader import open_checkpoint
from lors.errors import LorsError
from lors.experts.expert_file import ENERGIES, EXPONENTS, KEY
from lors.experts.expert_source import open_expert
from lors.experts.opening import source_of
from lors.files import strict_json
from lors.files.documents import MAX_VALUES, Document
from lors.merging.edit import edit
from lors.merging.ledger import Ledger


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("documents"))


def document(corpus: Corpus, kind: str) -> Any:
    return json.loads(corpus.seeds[kind][0][0])


@pytest.mark.parametrize("kind", ["ledger", "adapter", "config", "index"])
def test_every_value_of_every_wrong_type(corpus: Corpus, kind: str) -> None:
    good, count = document(corpus, kind), {True: 0, False: 0}
    for path in [
        path
        for path in places(good)
        if "weight_map" not in path[:1] or path[1:] in ((), next(iter(places(good["weight_map"]))))
    ]:
        for value in VALUES:
            count[survives(corpus.targets[kind], json.dumps(replaced(good, path, value)).encode())] += 1
    assert count[False] > count[True]


def test_every_value_of_an_expert_file(corpus: Corpus) -> None:
    content = corpus.seeds["sealed"][0][0]
    text = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"][KEY]
    good, count = json.loads(text), {True: 0, False: 0}
    assert survives(corpus.targets["sealed"], sealed(content, text))
    for path in [path for path in places(good) if path[:1] != ("parts",) or path[1:2] in ((), (0,))]:
        for value in VALUES:
            changed = json.dumps(replaced(good, path, value))
            count[survives(corpus.targets["sealed"], sealed(content, changed))] += 1
    assert count[False] > count[True]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not JSON"),
        ('{"a": 1, "a": 2}', "it has the key 'a' twice"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"\\udc00": 1}', "half of a surrogate pair"),
        ('{"a": ["x", ["\\ud83d\\ude42", "\\ude42"]]}', "half of a surrogate pair"),
        ("[" * 100_000, "nested too deep"),
        ("9" * 5000, "not JSON"),
        (b"\xff{}", "not UTF-8 (byte 0)"),
        ("[" + "[]," * 1_000_000 + "[]]", "more than 1,500,000 values"),
        (" " * (33 << 20), "at most 33554432 bytes"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_json_that_is_not_sane(text: str | bytes, expected: str) -> None:
    with pytest.raises(LorsError, match="^here: ") as caught:
        strict_json.parse(text, "here")
    assert expected in str(caught.value)


def test_sane_json_is_read_as_json_reads_it(tmp_path: Path) -> None:
    text = '{"a": [1, -2.5e3, true, null, "\\ud83d\\ude42 \\\\ud800"], "\u00fc": {}}'
    assert strict_json.parse(text, "here") == strict_json.parse(text.encode(), "here") == json.loads(text)
    (tmp_path / "x.json").write_text('{"limit": Infinity}')
    assert strict_json.read(tmp_path / "x.json", infinite=True) == {"limit": float("inf")}
    with pytest.raises(LorsError, match="x.json: not JSON: Infinity"):
        strict_json.read(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(LorsError, match=r"x.json: expected a JSON object, got \[1\]"):
        strict_json.read(tmp_path / "x.json")


class Names(Document):
    names: list[str]


def test_a_document_with_everything_wrong_takes_no_more_than_a_right_one() -> None:
    begun = time.process_time()
    with pytest.raises(LorsError, match=r"^here: names\[0\]: expected a string, got 1$"):
        Names.parse(json.dumps({"names": [1] * (MAX_VALUES - 2)}), "here")
    with pytest.raises(LorsError, match="^here: more than 100,000 values$"):
        Names.parse(json.dumps({"names": [1] * (MAX_VALUES + 2)}), "here")
    assert time.process_time() - begun < 5


# --- ledgers ---------------------------------------------------------------------------------------------------------


def test_a_ledger_of_another_model_changes_nothing(corpus: Corpus, tmp_path: Path) -> None:
    """It names an expert that the recipe does not have; and one that is the recipe's base."""
    expert = corpus.root / "ca.lors.safetensors"
    out = tmp_path / "out"
    lors.merge(corpus.base, {"ca": expert, "de": expert}, out)
    ledger = json.loads((out / "lors_ledger.json").read_bytes())
    for name in ("es", "base"):
        ledger["experts"][0]["name"] = name
        (out / "lors_ledger.json").write_text(json.dumps(ledger))
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        with pytest.raises(
            LorsError, match=f"lors_recipe.yml: expected the model '{name}' that lors_ledger.json has, it has"
        ):
            edit(out, expert, remove=True, name=name)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_what_is_wrong_with_a_ledger_is_said(corpus: Corpus, tmp_path: Path) -> None:
    good = document(corpus, "ledger")
    for path, value, expected in (
        (("format",), 2, "format: expected 1, got 2"),
        (("edits",), -1, "edits: expected greater than or equal to 0, got -1"),
        (("experts",), [], "experts: expected at least one, got []"),
        (("experts", 0, "weight"), "x", "experts[0].weight: expected a number, got 'x'"),
        (("base", "sha256"), {}, "base.sha256: expected at least one"),
        (("base", "sha256", "model.safetensors"), "0" * 63, "expected text of the form ^[0-9a-f]{64}$, got"),
        (("base", "hub_id"), "a/b\n---\n", "base.hub_id: expected text of the form"),
        (("base", "more"), 1, "base.more: unknown key 'more'"),
        (("editz",), 1, "editz: unknown key 'editz', did you mean 'edits'?"),
    ):
        (tmp_path / "lors_ledger.json").write_text(json.dumps(replaced(good, path, value)))
        with pytest.raises(LorsError) as caught:
            Ledger.load(tmp_path)
        assert str(caught.value).startswith(f"{tmp_path}/lors_ledger.json: ") and expected in str(caught.value)


# --- adapters --------------------------------------------------------------------------------------------------------


def opened(home: Path, base: Path) -> str:
    """What is wrong with an adapter; "" when nothing is."""
    with open_checkpoint(base) as origin, open_checkpoint(home, name="x") as checkpoint:
        try:
            source_of(checkpoint, origin)
        except LorsError as error:
            return str(error)
    return ""


@pytest.fixture
def adapter(corpus: Corpus, tmp_path: Path) -> Path:
    state, config = adapter_of(corpus.base)
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert opened(tmp_path, corpus.base) == ""
    return tmp_path


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "pattern",
    [
        "(([a-z]+)*_?)*!",
        "(a|a)*" * 20,
        ".*fc1",
        "fc[12]",
        "a{1,9}",
        "fc1|q_proj",
        "(",
        "",
        "^",
        "a b",
        "x" * 10**6 + "(",
    ],
)
def test_a_pattern_is_a_path_and_never_a_regular_expression(
    corpus: Corpus, adapter: Path, key: str, pattern: str
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_bytes()) | {key: {pattern: 3}}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    begun = time.process_time()
    assert f"x: adapter_config.json: {key}: expected the path of a module or the end of it, got" in opened(
        adapter, corpus.base
    )
    assert time.process_time() - begun < 5


def test_the_first_pattern_that_is_the_end_of_a_path_counts(corpus: Corpus, adapter: Path) -> None:
    from lors.experts.adapter import _by_module, _of_module

    module = "model.encoder.layers.0.fc1"
    for patterns, expected in (
        ({"fc1": 1}, 1),
        ({"c1": 1}, 8),
        ({"layers.0.fc1": 1, "fc1": 2}, 1),
        ({"fc1": 2, "layers.0.fc1": 1}, 2),
        ({r"layers\.0\.fc1$": 1}, 1),
        ({"^layers.0.fc1": 1}, 8),
        ({"^" + module: 1}, 1),
        ({module + "$": 1}, 1),
        ({"layers": 1}, 8),
        ({}, 8),
        (None, 8),
    ):
        assert _of_module(_by_module(patterns, ""), module, 8) == expected, patterns


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"lora_A": np.full((3, 32), np.nan, np.float32)}, "expected finite values"),
        ({"lora_A": np.full((3, 32), np.inf, np.float32)}, "expected finite values"),
        ({"lora_A": np.array(1, np.float32)}, "expected a matrix of F32, F16 or BF16, got F32 []"),
        ({"lora_A": np.zeros(3, np.float32)}, "expected a matrix of F32, F16 or BF16, got F32 [3]"),
        ({"lora_A": np.zeros((0, 32), np.float32), "lora_B": np.zeros((32, 0), np.float32)}, "got F32 [0, 32]"),
        ({"lora_A": np.zeros((3, 32), np.int32)}, "got I32 [3, 32]"),
        ({"lora_A": np.zeros((3, 32), np.complex64)}, "got C64 [3, 32]"),
        ({"lora_A": np.zeros((2, 3), np.float32)}, "expected one rank, got 2 in A and 3 in B"),
        ({"lora_B": np.full((32, 3), 3e38, np.float32)}, "its values times alpha / rank overflow"),
    ],
)
def test_factors_that_are_none(corpus: Corpus, adapter: Path, change: dict[str, np.ndarray], expected: str) -> None:
    file = adapter / "adapter_model.safetensors"
    state, module = load_file(file), "base_model.model.model.encoder.layers.0.self_attn.q_proj"
    save_file(state | {f"{module}.{part}.weight": value for part, value in change.items()}, file)
    config = json.loads((adapter / "adapter_config.json").read_bytes()) | {"lora_alpha": 1e3}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert expected in opened(adapter, corpus.base)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("base_model.model.model.encoder.layers.0.self_attn.q_proj.weight", (32, 32), "is changed by another part"),
        ("base_model.model.encoder.conv1.weight", (32, 8, 3), ""),
        ("base_model.model.model.encoder.conv1.weight", (32, 8), "expected shape [32, 8, 3], got [32, 8]"),
    ],
)
def test_whole_tensors(corpus: Corpus, adapter: Path, key: str, value: tuple[int, ...], expected: str) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {key: np.zeros(value, np.float32)}, file)
    assert expected in opened(adapter, corpus.base) and bool(expected) == bool(opened(adapter, corpus.base))
    save_file(load_file(file) | {key: np.zeros(value, np.complex64)}, file)
    assert opened(adapter, corpus.base)


def test_an_adapters_copy_of_the_base_that_is_no_float(corpus: Corpus, adapter: Path) -> None:
    file, key = adapter / "adapter_model.safetensors", "base_model.model.model.decoder.embed_tokens.base_layer.weight"
    with open_checkpoint(corpus.base) as base:
        table = base.read("model.decoder.embed_tokens.weight")
    save_file(load_file(file) | {key: table}, file)
    assert opened(adapter, corpus.base) == ""
    save_file(load_file(file) | {key: table.astype(np.int32)}, file)
    assert "expected a matrix of F32, F16 or BF16, got I32" in opened(adapter, corpus.base)


# --- expert files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "value", "expected"),
    [
        (EXPONENTS, np.int16(1024), "expected exponents of at most 126"),
        (EXPONENTS, np.int16(-32768), "expected exponents of at most 126"),
        (ENERGIES, np.float64("nan"), "expected energies that are finite"),
        (ENERGIES, np.float64("-inf"), "expected energies that are finite"),
        (ENERGIES, np.float64(-1), "expected energies that are finite and not negative"),
    ],
)
def test_tables_of_an_expert_file(corpus: Corpus, array: str, value: Any, expected: str) -> None:
    content = corpus.seeds["sealed"][0][0]
    entries = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    path = corpus.file(
        "table.lors.safetensors", sealed(content, entries["__metadata__"][KEY], {array: value.tobytes()})
    )
    with pytest.raises(LorsError, match="damaged expert file: " + expected):
        open_expert(path)


def test_metadata_that_do_not_fit_together(corpus: Corpus) -> None:
    content = corpus.seeds["sealed"][0][0]
    text = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"][KEY]
    good = json.loads(text)
    name, shape, rank, kept = next(part for part in good["parts"] if part[3] > 0)
    for part in (
        [name, shape, 10**6, kept], [name, shape, rank, 10**9], [name, [2**61, 2**61], rank, kept], [name, [], rank, kept],
        [name, shape[:1], rank, kept], [name, shape, rank, -1], good["parts"][0],
    ):  # fmt: skip
        parts = [part if one[0] == name else one for one in good["parts"]]
        with pytest.raises(LorsError, match="damaged expert file: "):
            open_expert(corpus.file("odd.lors.safetensors", sealed(content, json.dumps(good | {"parts": parts}))))


# --- configurations, cards -------------------------------------------------------------------------------------------


def test_a_card_costs_its_license_and_not_the_merge(corpus: Corpus, tmp_path: Path) -> None:
    card = corpus.base / "README.md"
    try:
        for text in (
            "---\nlicense: 2024-99-99\n---\n",
            "---\n" + "\n" * 70_000,
            "---\nlicense: [" + "[" * 5000 + "\n---\n",
        ):
            card.write_text(text)
            report = lors.merge(corpus.base, {"ca": corpus.root / "ca.lors.safetensors"}, tmp_path / "out", force=True)
            assert any("license is" in notice and str(card) in notice for notice in report.notices), report.notices
            assert "license:" not in (tmp_path / "out" / "README.md").read_text()
        card.write_text("---\nlicense: mit\n---\n")
        lors.merge(corpus.base, {"ca": corpus.root / "ca.lors.safetensors"}, tmp_path / "out", force=True)
        assert "license: mit\n" in (tmp_path / "out" / "README.md").read_text()
        edit(tmp_path / "out", corpus.root / "ca.lors.safetensors", name="more", weight=0.5)
        assert "license: mit\n" in (tmp_path / "out" / "README.md").read_text()
    finally:
        card.unlink(missing_ok=True)
