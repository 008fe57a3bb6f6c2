"""Recipes: what is accepted, how a parameter is resolved (compared with mergekit itself), and every error message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lors.errors import LorsError
from lors.recipes.entries import parse_size
from lors.recipes.recipe import Recipe
from recipes import METHODS

WORDS = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"], exclude_characters="+@~"), min_size=1, max_size=12)
NAMES = WORDS.filter(lambda text: text == text.strip() and text.isprintable())
SOME_SETTING = (
    (v := st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.booleans() | WORDS)
    | st.lists(v, min_size=1, max_size=4)
    | st.lists(st.fixed_dictionaries({"value": v, "filter": WORDS}), min_size=1, max_size=3)
)
SOME_PARAMETERS = st.dictionaries(WORDS, SOME_SETTING, max_size=3)
DOCUMENTS = st.fixed_dictionaries(
    {
        "merge_method": WORDS,
        "models": st.lists(
            st.fixed_dictionaries({"model": WORDS}, optional={"parameters": SOME_PARAMETERS, "name": NAMES}),
            min_size=1,
            max_size=3,
            unique_by=lambda entry: entry.get("name", object()),
        ),
    },
    optional={
        "name": WORDS,
        "base_model": WORDS,
        "parameters": SOME_PARAMETERS,
        "rest": st.sampled_from(["task_arithmetic", "average", "base"]),
        "seed": st.integers(0, 2**63 - 1),
        "dtype": st.sampled_from(["float32", "float16", "bfloat16"]),
        "out_dtype": st.sampled_from(["float32", "torch.bfloat16"]),
        "out_shard_size": st.sampled_from(["5GB", "1.5 MiB", 1000]),
        "tokenizer_source": st.just("base"),
        "target": st.fixed_dictionaries({}, optional={"include": st.just("fc1"), "exclude": st.just(["a", "é|ß"])}),
    },
)


@settings(max_examples=150, deadline=None)
@given(DOCUMENTS)
def test_a_recipe_survives_writing_and_reading(document: dict) -> None:
    first = Recipe.from_yaml(yaml.safe_dump(document, allow_unicode=True))
    text = first.to_yaml()
    second = Recipe.from_yaml(text)
    assert second == first
    assert second.to_yaml() == text
    assert first.merge_method == document["merge_method"]
    assert [entry.model for entry in first.models] == [entry["model"] for entry in document["models"]]
    for key, setting in document.get("parameters", {}).items():
        assert first.to_dict()["parameters"][key] == setting
        assert type(first.to_dict()["parameters"][key]) is type(setting)


def test_yaml_is_canonical_and_complete() -> None:
    text = """
    dtype: torch.float16
    parameters: {lambda: 3e-1, density: {value: 1}, rank: [4, 8]}
    models:
      - {parameters: {weight: [{filter: fc1, value: [0, 1]}]}, model: x, name: Català}
    base_model: b
    merge_method: lors
    chat_template: null
    tokenizer: {source: base}
    target: {exclude: fc2}
    seed: 0
    """
    assert Recipe.from_yaml(text, METHODS).to_yaml() == (
        "merge_method: lors\n"
        "base_model: b\n"
        "models:\n"
        "- model: x\n"
        "  name: Català\n"
        "  parameters:\n"
        "    weight:\n"
        "    - filter: fc1\n"
        "      value: [0.0, 1.0]\n"
        "parameters:\n"
        "  lambda: 0.3\n"
        "  density: 1.0\n"
        "  rank: [4, 8]\n"
        "target:\n"
        "  exclude: [fc2]\n"
        "dtype: float16\n"
    )


def test_arguments_make_the_recipe_that_yaml_makes() -> None:
    by_arguments = Recipe.from_arguments(
        "b",
        {"ca": "x", "de": Path("y")},
        "lors",
        methods=METHODS,
        lam=np.float32(0.5),
        rank=np.int64(4),
        density=(0.1, 0.2),
        weight={"ca": 1, "de": [0, 1]},
        normalize=None,
        target={"exclude": ["fc2"]},
        rest="average",
        seed=3,
        out_dtype="bfloat16",
        out_shard_size="1GB",
    )
    by_yaml = Recipe.from_yaml(
        """
        merge_method: lors
        base_model: b
        models:
          - {model: x, name: ca, parameters: {weight: 1}}
          - {model: y, name: de, parameters: {weight: [0, 1]}}
        parameters: {rank: 4, density: [0.1, 0.2], lambda: 0.5}
        target: {exclude: fc2}
        rest: average
        seed: 3
        out_dtype: bfloat16
        out_shard_size: 1GB
        """,
        METHODS,
    )
    assert by_arguments == by_yaml
    assert by_arguments.shard_bytes == 10**9
    assert by_arguments.output_dtype == "bfloat16"
    assert by_arguments.labels == ("ca", "de")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"densty": 0.5}, "parameters.densty: unknown parameter 'densty' of method lors, did you mean 'density'?"),
        ({"density": 2}, "parameters.density: expected a number in [0, 1], got 2"),
        ({"density": object}, "parameters.density: expected a number, true, false or a string, got <class 'object'>"),
        ({"lam": 1, "lambda": 1}, "parameters.lambda: given twice, as 'lam' and as 'lambda'"),
        ({"weight": {"ce": 1}}, "parameters.weight: unknown expert 'ce'; known: de"),
        ({"method": "lros"}, "merge_method: unknown method 'lros', did you mean 'lors'?"),
        ({"experts": {}}, "models: expected at least one model, got []"),
        ({"experts": ["x"]}, "experts: expected a mapping of labels to models, got ['x']"),
        ({"method": ""}, "merge_method: expected a string that is not empty, got ''"),
        ({"method": []}, "merge_method: expected a string, got []"),
        ({"target": "attention"}, "target: expected a mapping, got 'attention'"),
        ({"target": {"selct": "mlp"}}, "target.selct: unknown key 'selct', did you mean 'select'?"),
        ({"base": None}, "base_model: missing; method lors merges differences to a base"),
        (
            {"dtype": "float64"},
            "dtype: expected one of float32, float16, bfloat16, got 'float64'",
        ),
    ],
)
def test_errors_of_arguments(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(LorsError) as error:
        Recipe.from_arguments(**({"base": "b", "experts": {"de": "x"}, "methods": METHODS} | arguments))
    assert str(error.value) == expected


def test_paths_are_looked_up_beside_the_recipe_then_left_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "experts" / "c+a").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "home" / "de").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    text = (
        "merge_method: lors\nbase_model: openai/whisper-small@main\n"
        "models: [{model: ../experts/c+a}, {model: here}, {model: ~/de}, {model: org/model}]\n"
    )
    path = tmp_path / "recipes" / "r.yml"
    path.write_text(text)
    loaded = Recipe.load(path, METHODS)
    assert loaded.base_source == "openai/whisper-small@main"
    assert loaded.sources == (str(tmp_path / "experts" / "c+a"), "here", str(tmp_path / "home" / "de"), "org/model")
    assert [entry.model for entry in loaded.models] == ["../experts/c+a", "here", "~/de", "org/model"]
    assert loaded.labels == ("c+a", "here", "de", "model")
    elsewhere = yaml.safe_load(loaded.to_yaml(resolved=True))
    assert [entry["model"] for entry in elsewhere["models"]] == [
        str(tmp_path / "experts" / "c+a"),
        str(tmp_path / "here"),
        str(tmp_path / "home" / "de"),
        "org/model",
    ]


@pytest.mark.parametrize(
    ("models", "labels"),
    [
        (["x/ca", "x/de"], ("ca", "de")),
        (["ca/final", "de/final"], ("ca-final", "de-final")),
        (["ca/model.safetensors", "/d/de/model.safetensors"], ("ca", "de")),
        (["runs/ca.safetensors", "runs/de.pt"], ("ca", "de")),
        (["org/whisper-ca@main"], ("whisper-ca",)),
        (["a/ca", "a/ca", "ca-2"], ("a-ca", "a-ca-2", "ca-2")),
        (["..", "model.safetensors"], ("model", "model-2")),
        (["x/ca", {"model": "y", "name": "ca"}], ("x-ca", "ca")),
        ([{"model": "y", "name": "ca"}, "ca"], ("ca", "ca-2")),
    ],
)
def test_labels_are_short_and_unique(models: list[Any], labels: tuple[str, ...]) -> None:
    entries = [{"model": entry} if isinstance(entry, str) else entry for entry in models]
    assert Recipe.from_yaml(yaml.safe_dump({"merge_method": "lors", "models": entries})).labels == labels


def test_the_base_may_be_among_the_models() -> None:
    text = "merge_method: slerp\nbase_model: ./b\nmodels: [{model: x}, {model: b}]\nparameters: {t: 0.5}"
    bound = Recipe.from_yaml(text, METHODS)
    assert bound.base_index == 1
    assert bound.experts == (0,)
    assert Recipe.from_yaml("merge_method: linear\nmodels: [{model: x}]", METHODS).base_index is None


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5 kB", 1500), ("2GiB", 2**31), ("10", 10), (7, 7), ("1TiB", 2**40)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size
