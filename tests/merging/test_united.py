"""`vocabulary: union`: experts with tokens of their own, merged from files and as state dicts, by every kind of method."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import lors
from helpers import module
from lors import LorsError
from lors.cli.app import application
from lors.experts.decompose import decompose
from lors.integrations.transformers import load_merged
from lors.merging.edit import edit
from lors.merging.verify import disagreements
from lors.methods import SPECS
from lors.recipes.recipe import Recipe
from lors.speech.model.whisper import SHIPPED
from lors.sweep.run import sweep
from lors.sweep.score import Score

transformers = module("transformers", "speech")

BASE = SHIPPED["tiny"]
EMBEDDING = "model.decoder.embed_tokens.weight"
ROWS, WIDTH = 1024, 128
FIRST, SECOND = "<|ast|>", "<|kab|>"
Edit = Callable[[Any], None]


def edited(path: Path, change: Edit) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def expert(path: Path, tokens: list[str], seed: int, **settings: list[str]) -> Path:
    """A copy of the base whose weights moved a little, with tokens at the end. settings: key -> tokens whose ids are listed."""
    shutil.copytree(BASE, path)
    generator = np.random.default_rng(seed)
    state = {
        name: value + (0.01 * generator.standard_normal(value.shape)).astype(value.dtype)
        for name, value in load_file(BASE / "model.safetensors").items()
    }
    new = generator.standard_normal((len(tokens), WIDTH)).astype(state[EMBEDDING].dtype)
    state[EMBEDDING] = np.concatenate([state[EMBEDDING], new])
    save_file(state, path / "model.safetensors", {"format": "pt"})
    ids = {token: ROWS + place for place, token in enumerate(tokens)}
    entries = [
        {
            "id": i,
            "content": t,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for t, i in ids.items()
    ]
    edited(path / "tokenizer.json", lambda c: c["added_tokens"].extend(entries))
    edited(path / "tokenizer_config.json", lambda c: c["extra_special_tokens"].extend(tokens))
    edited(path / "config.json", lambda c: c.update(vocab_size=ROWS + len(tokens)))

    def generation(content: Any) -> None:
        content["lang_to_id"] |= {token: i for token, i in ids.items() if len(token) < 9}
        content |= {key: [ids[token] for token in listed] for key, listed in settings.items()}

    edited(path / "generation_config.json", generation)
    return path


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both have their tokens from id 1,024 on: the ids say nothing."""
    root = tmp_path_factory.mktemp("experts")
    return {
        "one": expert(root / "one", [FIRST, "<|shared|>"], 1, suppress_tokens=[FIRST, "<|shared|>"]),
        "two": expert(root / "two", [SECOND, "<|shared|>"], 2, suppress_tokens=[SECOND]),
    }


def rows_of(path: Path) -> np.ndarray:
    return load_file(path / "model.safetensors")[EMBEDDING]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_result_has_the_tokens_of_all(experts: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = lors.merge(BASE, experts, out, vocabulary="union", weight={"one": 3.0, "two": 1.0}, lam=0.3, check=True)
    assert f"vocabulary: 3 new tokens from id 1024 on: {FIRST}, <|shared|>, {SECOND}" in report.notices
    base, one, two, got = (rows_of(path) for path in (BASE, experts["one"], experts["two"], out))
    assert got.shape == (ROWS + 3, WIDTH) and got.dtype == base.dtype == np.float16
    assert got[ROWS].tobytes() == one[ROWS].tobytes() and got[ROWS + 2].tobytes() == two[ROWS].tobytes()
    mean = (3 * one[ROWS + 1].astype(np.float64) + two[ROWS + 1]) / 4
    assert got[ROWS + 1].tobytes() == mean.astype(np.float32).astype(np.float16).tobytes()
    w0, deltas = base.astype(np.float64), [x[:ROWS].astype(np.float64) - base for x in (one, two)]
    assert disagreements(got[:ROWS], w0 + 0.3 * (3 * deltas[0] + deltas[1]), w0) == 0

    model, loaded = transformers.WhisperForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(loaded[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.proj_out.weight is model.get_input_embeddings().weight and model.config.vocab_size == ROWS + 3
    assert model.proj_out.out_features == ROWS + 3
    settings = model.generation_config
    assert settings.lang_to_id[FIRST] == ROWS and settings.lang_to_id[SECOND] == ROWS + 2
    # <|shared|> is suppressed by one of the two that have it, and so not in the result
    assert settings.suppress_tokens == [ROWS, ROWS + 2] and settings.no_timestamps_token_id == 1023
    tokenizer = transformers.WhisperProcessor.from_pretrained(out).tokenizer
    assert tokenizer.convert_tokens_to_ids([FIRST, "<|shared|>", SECOND]) == [ROWS, ROWS + 1, ROWS + 2]
    assert len(tokenizer) == ROWS + 3 and tokenizer.all_special_tokens[-1] == "<|notimestamps|>"
    assert tokenizer.decode([ROWS, ROWS + 2], skip_special_tokens=True) == ""
    plain = transformers.WhisperProcessor.from_pretrained(BASE).tokenizer
    text = f"bon dia a tothom{SECOND} hola"
    assert tokenizer(text).input_ids != plain(text).input_ids
    assert tokenizer("bon dia a tothom").input_ids == plain("bon dia a tothom").input_ids
    assert yaml_of(out)["vocabulary"] == "union"
    lors.merge(BASE, {"expert-ast": experts["one"], "kab": experts["two"]}, tmp_path / "named", vocabulary="union")
    assert "language:\n- ast\n- kab\n" in (tmp_path / "named" / "README.md").read_text()


def yaml_of(out: Path) -> Any:
    import yaml

    return yaml.safe_load((out / "lors_recipe.yml").read_text())


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("task_arithmetic", {}), ("ties", {"density": 0.3}), ("tsv", {}), ("model_stock", {}), ("linear", {"weight": 0.5}),
        ("lors", {"rest": "base"}), ("slerp", {"t": 0.3}), ("dare_ties", {"density": 0.5}),
    ],
)  # fmt: skip
def test_new_rows_are_the_mean_whatever_the_method(
    method: str, settings: dict[str, Any], experts: dict[str, Path], tmp_path: Path
) -> None:
    given = {"one": experts["one"]} if method == "slerp" else experts
    lors.merge(BASE, given, tmp_path / "out", method, vocabulary="union", check=True, **settings)
    got, one = rows_of(tmp_path / "out"), rows_of(experts["one"])
    np.testing.assert_allclose(got[ROWS].astype(np.float64), one[ROWS], rtol=1e-3, atol=1e-6)
    if len(given) == 2:
        mean = (one[ROWS + 1].astype(np.float64) + rows_of(experts["two"])[ROWS + 1]) / 2
        np.testing.assert_allclose(got[ROWS + 1], mean, rtol=2e-3, atol=1e-4)
    transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "out")


def test_rounded_once_to_a_wider_type(experts: dict[str, Path], tmp_path: Path) -> None:
    lors.merge(BASE, experts, tmp_path / "out", vocabulary="union", out_dtype="float32")
    mean = (rows_of(experts["one"])[ROWS + 1].astype(np.float64) + rows_of(experts["two"])[ROWS + 1]) / 2
    assert rows_of(tmp_path / "out")[ROWS + 1].tobytes() == mean.astype(np.float32).tobytes()


def test_without_new_tokens_the_bits_are_the_same(tmp_path: Path) -> None:
    experts = {"a": expert(tmp_path / "a", [], 1), "b": expert(tmp_path / "b", [], 2)}
    for name in ("base", "union"):
        report = lors.merge(BASE, experts, tmp_path / name, vocabulary=name)
    assert "vocabulary: union: no expert has a token that the base lacks" in report.notices
    files = ("model.safetensors", *(path.name for path in BASE.iterdir() if path.suffix == ".json"))
    for file in files:
        one, other = (tmp_path / name / file for name in ("base", "union"))
        same = one.read_bytes() == other.read_bytes() if file.endswith("s") else read(one) == read(other)
        assert same, file


def test_a_stored_head_is_a_table_too(experts: dict[str, Path], tmp_path: Path) -> None:
    """The base stores its output projection, as its embedding; an expert only the embedding."""
    base = Path(shutil.copytree(BASE, tmp_path / "base"))
    state = load_file(base / "model.safetensors")
    save_file(state | {"proj_out.weight": state[EMBEDDING].copy()}, base / "model.safetensors", {"format": "pt"})
    lors.merge(base, experts, tmp_path / "out", vocabulary="union")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged["proj_out.weight"].tobytes() == merged[EMBEDDING].tobytes()
    assert merged["proj_out.weight"].shape == (ROWS + 3, WIDTH)


def test_legacy_tokenizers(experts: dict[str, Path], tmp_path: Path) -> None:
    """vocab.json, merges.txt and added_tokens.json alone, and beside tokenizer.json."""
    content = read(BASE / "tokenizer.json")
    base = Path(shutil.copytree(BASE, tmp_path / "base"))
    (base / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in content["model"]["merges"])
    (base / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (base / "added_tokens.json").write_text(
        json.dumps({entry["content"]: entry["id"] for entry in content["added_tokens"]})
    )
    (base / "special_tokens_map.json").write_text(
        json.dumps({"additional_special_tokens": ["<|de|>", "<|notimestamps|>"]})
    )
    edited(
        base / "tokenizer_config.json",
        lambda c: c.update(added_tokens_decoder={"1023": {"content": "<|notimestamps|>"}}),
    )
    both = {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in experts.items()}
    edited_map = {"additional_special_tokens": [{"content": FIRST}]}
    (both["one"] / "special_tokens_map.json").write_text(json.dumps(edited_map))
    lors.merge(base, both, tmp_path / "out", vocabulary="union")
    added = read(tmp_path / "out" / "added_tokens.json")
    assert (added[FIRST], added[SECOND], added["<|de|>"]) == (
        ROWS,
        ROWS + 2,
        read(base / "added_tokens.json")["<|de|>"],
    )
    assert read(tmp_path / "out" / "special_tokens_map.json") == {
        "additional_special_tokens": ["<|de|>", FIRST, "<|notimestamps|>"]
    }
    decoder = read(tmp_path / "out" / "tokenizer_config.json")["added_tokens_decoder"]
    assert decoder["1024"]["content"] == FIRST and decoder["1024"]["special"] is True and "id" not in decoder["1024"]
    assert read(tmp_path / "out" / "vocab.json") == content["model"]["vocab"]

    (base / "tokenizer.json").unlink()
    lors.merge(base, both, tmp_path / "legacy", vocabulary="union")
    assert rows_of(tmp_path / "legacy").tobytes() == rows_of(tmp_path / "out").tobytes()
    assert read(tmp_path / "legacy" / "added_tokens.json") == added


def test_as_state_dicts(experts: dict[str, Path]) -> None:
    states = {name: load_file(path / "model.safetensors") for name, path in {"base": BASE, **experts}.items()}
    ids = {name: _ids(path) for name, path in {"base": BASE, **experts}.items()}
    base = states.pop("base")
    settings: dict[str, Any] = {"vocabulary": "union", "weight": {"one": 3.0, "two": 1.0}, "lam": 0.3}
    merged = lors.merge_state_dicts(base, states, vocabularies=ids, **settings)
    lors_out = merged[EMBEDDING]
    mean = (3 * states["one"][EMBEDDING][ROWS + 1].astype(np.float64) + states["two"][EMBEDDING][ROWS + 1]) / 4
    assert lors_out.shape == (ROWS + 3, WIDTH)
    assert lors_out[ROWS + 1].tobytes() == mean.astype(np.float32).astype(np.float16).tobytes()
    for wrong, said in (
        ({}, "vocabularies: expected label -> token -> id beside vocabulary: union, got nothing"),
        ({"vocabularies": {"base": ids["base"], "one": ids["one"]}}, "expected those of base, one, two; odd: 'two'"),
        ({"vocabularies": {**ids, "one": {"a": 0, "b": 0}}}, "expected one token for id 0, got 'a' and 'b'"),
        ({"vocabularies": {**ids, "one": {"a": 5000}}}, "token 'a' has id 5000: expected ids below 1026"),
        ({"vocabularies": {**ids, "one": {"a": "x"}}}, "one: token 'a': expected an id, got 'x'"),
        ({"vocabularies": {**ids, "one": 3}}, "vocabularies: one: expected token -> id, got 3"),
    ):
        with pytest.raises(LorsError) as caught:
            lors.merge_state_dicts(base, states, **{**settings, **wrong})
        assert said in str(caught.value)
    with pytest.raises(LorsError, match="vocabularies: expected none, or vocabulary: union beside them"):
        lors.merge_state_dicts(base, states, vocabularies=ids)


def _ids(path: Path) -> Mapping[str, int]:
    content = read(path / "tokenizer.json")
    return {**content["model"]["vocab"], **{entry["content"]: entry["id"] for entry in content["added_tokens"]}}


def add_row(content: Any) -> None:
    content["added_tokens"].append({**content["added_tokens"][-1], "id": 5000, "content": "<|far|>"})


def twice(content: Any) -> None:
    content["added_tokens"].append({**content["added_tokens"][-1], "content": "<|same|>"})


def retrained(content: Any) -> None:
    content["model"]["vocab"]["<unused>"] = content["model"]["vocab"].pop(next(iter(content["model"]["vocab"])))


def shorter(content: Any) -> None:
    del content["added_tokens"][-1]


def plain(content: Any) -> None:
    content["added_tokens"][-1]["special"] = False


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("tokenizer.json", add_row, "token '<|far|>' has id 5000: expected ids below 1026, the rows of two's embedding"),
        ("tokenizer.json", twice, "expected one token for id 1025, got '<|shared|>' and '<|same|>'"),
        ("tokenizer.json", retrained, "two: another tokenizer: token "),
        ("tokenizer.json", plain, "two: token '<|shared|>': expected special true as in one, got false"),
        ("tokenizer.json", shorter, "two: expected a token for each of the 1026 rows of the embedding, its tokenizer has 1025"),
        ("tokenizer.json", lambda c: c.update(model=3), "tokenizer.json: model.vocab: expected tokens and their ids, got nothing"),
        ("tokenizer.json", lambda c: c.update(added_tokens=[3]), "added_tokens[0]: expected an object with content and id, got 3"),
        ("config.json", lambda c: c.update(vocab_size=1030), "two: config.json: vocab_size: expected 1026, the rows of"),
        (
            "generation_config.json", lambda c: c["lang_to_id"].update(xx=9999),
            "two: generation_config.json: lang_to_id: xx: expected an id below 1026, the rows of its embedding, got 9999",
        ),
    ],
)  # fmt: skip
def test_vocabularies_that_contradict(
    file: str, change: Edit, said: str, experts: dict[str, Path], tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(experts["two"], tmp_path / "two"))
    edited(broken / file, change)
    with pytest.raises(LorsError) as caught:
        lors.merge(BASE, {"one": experts["one"], "two": broken}, tmp_path / "out", vocabulary="union")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_united(experts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        LorsError, match=r"one: another vocabulary: .*; vocabulary: union merges models with tokens of their own"
    ):
        lors.merge(BASE, experts, tmp_path / "out")
    with pytest.raises(LorsError, match=r"vocabulary: expected one of base, union, got 'both'"):
        lors.merge(BASE, experts, tmp_path / "out", vocabulary="both")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(experts["two"] / "model.safetensors", bare)
    shutil.copy(experts["two"] / "config.json", bare)
    with pytest.raises(
        LorsError, match=r"bare: expected tokenizer.json, or vocab.json and merges.txt, beside the weights"
    ):
        lors.merge(BASE, {"two": bare}, tmp_path / "out", vocabulary="union")
    same = expert(tmp_path / "same", [], 1)
    decompose(BASE, same, tmp_path / "same.lors.safetensors")
    with pytest.raises(
        LorsError, match=r"vocabulary: union: expected a checkpoint, got an expert file, which has no tokens"
    ):
        lors.merge(BASE, {"same": tmp_path / "same.lors.safetensors"}, tmp_path / "out", vocabulary="union")
    with pytest.raises(LorsError, match=r"another vocabulary: expected 1024 tokens as in base, got 1026"):
        decompose(BASE, experts["one"], tmp_path / "one.lors.safetensors")
    lors.merge(BASE, experts, tmp_path / "out", vocabulary="union")
    with pytest.raises(
        LorsError, match=r"vocabulary: union: an expert file has no tokens: merge again instead of editing"
    ):
        edit(tmp_path / "out", tmp_path / "same.lors.safetensors")
    with pytest.raises(LorsError, match=r"vocabulary: union: the result needs a tokenizer of its own"):
        load_merged(BASE, experts, vocabulary="union")
    (bare / "config.json").unlink()
    with pytest.raises(LorsError, match=r"vocabulary: union: expected config.json beside the weights of the base"):
        lors.merge(bare, experts, tmp_path / "again", vocabulary="union")


def test_a_recipe_keeps_the_key(tmp_path: Path) -> None:
    text = "merge_method: lors\nbase_model: a/b\nmodels:\n- model: c/d\nvocabulary: union\n"
    recipe = Recipe.from_yaml(text)
    assert recipe.vocabulary == "union" and "vocabulary: union" in recipe.to_yaml()
    assert "vocabulary" not in Recipe.from_yaml(text.replace("union", "base")).to_yaml()


def test_a_sweep_merges_each_setting(experts: dict[str, Path], tmp_path: Path) -> None:
    recipe = Recipe.from_arguments(BASE, experts, methods=SPECS, vocabulary="union")
    digests = {}

    def score(model: Path) -> Score:
        lam = yaml_of(model)["parameters"]["lambda"]
        digests[lam] = (model / "model.safetensors").read_bytes(), read(model / "config.json")["vocab_size"]
        return Score("complete", (lam,))

    sweep(recipe, {"lambda": "0.2,0.6", "rank": "3"}, score, tmp_path / "sweep")
    for lam, (weights, rows) in digests.items():
        lors.merge(BASE, experts, tmp_path / f"{lam}", vocabulary="union", rank=3, lam=lam)
        assert rows == ROWS + 3 and (tmp_path / f"{lam}" / "model.safetensors").read_bytes() == weights
    assert digests.keys() == {0.2, 0.6}


def test_on_the_command_line(experts: dict[str, Path], tmp_path: Path) -> None:
    options = ["--base", str(BASE), "--expert", f"one={experts['one']}", "--vocabulary"]
    done = CliRunner().invoke(application(["merge"]), ["merge", *options, "union", str(tmp_path / "out")])
    assert done.exit_code == 0 and "2 new tokens from id 1024 on" in done.output
    done = CliRunner().invoke(application(["merge"]), ["merge", *options, "both", str(tmp_path / "x")])
    assert done.exit_code != 0 and "expected one of base, union, got 'both'" in f"{done.output}{done.exception}"
