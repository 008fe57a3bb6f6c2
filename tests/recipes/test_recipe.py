"""Recipes: what is accepted, how a parameter is resolved (compared with mergekit itself), and every error message."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import module
from lors.checkpoints import layers
from lors.errors import LorsError
from lors.methods import SPECS
from lors.recipes import strict_yaml
from lors.recipes.entries import parse_size
from lors.recipes.parameters import MethodSpec, ParameterSpec, rank_of
from lors.recipes.recipe import Recipe

METHODS = {
    "lors": MethodSpec(
        "lors",
        (
            ParameterSpec("rank", "rank", 7),
            ParameterSpec("density", "float", 0.2, minimum=0, maximum=1),
            ParameterSpec("weight", "float", 1.0),
            ParameterSpec("lambda", "float", 0.2, scope="global"),
            ParameterSpec("normalize", "bool", False, scope="global"),
        ),
    ),
    "ties": MethodSpec(
        "ties",
        (
            ParameterSpec("weight", "float"),
            ParameterSpec("density", "float", 1.0, minimum=0, maximum=1),
            ParameterSpec("lambda", "float", 1.0, scope="global"),
            ParameterSpec("normalize", "bool", True, scope="global"),
        ),
    ),
    "linear": MethodSpec("linear", (ParameterSpec("weight", "float", 1.0),), base="optional"),
    "slerp": MethodSpec("slerp", (ParameterSpec("t", minimum=0, maximum=1, scope="global"),), max_experts=1),
    "choosy": MethodSpec(
        "choosy",
        (
            ParameterSpec("steps", "int", 1, minimum=1, maximum=9),
            ParameterSpec("sign", "str", "sum", choices=("sum", "count")),
            ParameterSpec("gamma", minimum=0),
            ParameterSpec("top", maximum=2, default=0.0),
        ),
        min_experts=2,
        max_experts=2,
    ),
}
HEAD = "merge_method: lors\nbase_model: b\nmodels: [{model: x}, {model: y}]\n"


def recipe(parameters: str, method: str = "lors", extra: str = "") -> Recipe:
    return Recipe.from_yaml(HEAD.replace("lors", method) + f"parameters: {parameters}\n{extra}", METHODS)


def message(text: str, methods: dict[str, MethodSpec] | None = METHODS) -> str:
    with pytest.raises(LorsError) as error:
        Recipe.from_yaml(text, methods)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- resolution ------------------------------------------------------------------------------------------------------


def test_paper_settings_are_what_an_empty_recipe_means() -> None:
    bound = Recipe.from_yaml(HEAD, SPECS)
    assert bound.params_for(tensor="w", model=1) == {"rank": 7, "density": 0.2, "weight": 1.0}
    assert bound.params_for(tensor="w") == {"lambda": 0.2}


def test_a_model_comes_before_the_global_value_before_the_default() -> None:
    bound = Recipe.from_yaml(
        """
        merge_method: lors
        base_model: b
        models:
          - model: x
            parameters: {weight: 2, density: [{filter: fc1, value: 0.5}]}
          - model: y
        parameters: {weight: 3, density: [{filter: fc, value: 0.25}]}
        """,
        METHODS,
    )

    def both(name: str, tensor: str) -> list[Any]:
        return [bound.resolve(name, tensor=tensor, model=model) for model in (0, 1)]

    assert both("weight", "w") == [2.0, 3.0]
    assert both("density", "a.fc1.weight") == [0.5, 0.25]
    assert both("density", "a.fc2.weight") == [0.25, 0.25]  # the model's filters say nothing: fall through
    assert both("density", "a.q_proj.weight") == [0.2, 0.2]  # nor do the global ones: the method's default
    assert bound.resolve("density", tensor="q", model=0, default=0.75) == 0.75
    assert both("rank", "w") == [7, 7]


def test_gradients_are_linear_between_their_points() -> None:
    bound = recipe("{weight: [0, 1, 0.5], density: [{filter: fc1, value: [0.1, 0.3]}, {value: 1}]}")
    at = {t: bound.resolve("weight", tensor="w", model=0, position=t) for t in (0, 0.25, 0.5, 0.75, 1)}
    assert at == {0: 0.0, 0.25: 0.5, 0.5: 1.0, 0.75: 0.75, 1: 0.5}
    assert bound.resolve("density", tensor="fc1", model=0, position=0.5) == pytest.approx(0.2)
    assert bound.resolve("density", tensor="fc2", model=0, position=0.5) == 1.0


def test_integers_are_rounded_inside_a_gradient_and_words_are_not_mixed() -> None:
    bound = recipe("{steps: [1, 2], sign: [sum, count, sum], gamma: 1e-3}", "choosy")
    assert [bound.resolve("steps", tensor="w", model=0, position=t) for t in (0, 0.49, 0.5, 1)] == [1, 1, 2, 2]
    assert [bound.resolve("sign", tensor="w", model=0, position=t) for t in (0, 0.49, 0.5, 1)] == [
        *("sum", "sum", "count", "sum")
    ]
    assert bound.resolve("gamma", tensor="w", model=0) == 0.001  # YAML 1.1 reads 1e-3 as a string

    ranks = recipe("{rank: [4, 9]}")
    assert [ranks.resolve("rank", tensor="w", model=0, position=t) for t in (0, 0.1, 0.5, 1)] == [4, 5, 7, 9]
    assert type(ranks.resolve("rank", tensor="w", model=0, position=0.5)) is int
    fractions = recipe("{rank: [0.01, 0.03]}")
    assert fractions.resolve("rank", tensor="w", model=0, position=0.5) == pytest.approx(0.02)


def test_rank_of_a_matrix() -> None:
    assert rank_of(0.01, 768, 768) == rank_of(0.01, 3072, 768) == 7  # the paper's int(768 * 0.01)
    assert rank_of(7, 3072, 768) == 7
    assert rank_of(0.001, 64, 64) == 1
    assert rank_of(0.999, 64, 32) == 31
    assert rank_of(32, 64, 32) == 32
    with pytest.raises(ValueError, match=r"^rank: expected at most min\(m, n\) = 32 for a 64 x 32 matrix, got 33$"):
        rank_of(33, 64, 32)


def test_a_value_that_nothing_gives_is_an_error_that_names_tensor_and_model() -> None:
    bound = recipe("{weight: [{filter: fc1, value: 1}]}", "ties")
    assert bound.resolve("weight", tensor="fc1", model=0) == 1.0
    with pytest.raises(LorsError) as error:
        bound.resolve("weight", tensor="fc2.weight", model=1)
    assert str(error.value) == "parameters.weight: missing for tensor fc2.weight of y, and weight has no default"


def test_unmatched_filters_are_reported() -> None:
    bound = Recipe.from_yaml(
        """
        merge_method: lors
        base_model: b
        models: [{model: x, parameters: {weight: [{filter: self_atn, value: 1}, {filter: "*", value: 0}]}}]
        parameters: {density: [{filter: fc1, value: 1}, {value: 0}]}
        """,
        METHODS,
    )
    assert bound.unmatched_filters(["a.self_attn.q", "a.fc1"]) == [
        "models[0].parameters.weight: filter 'self_atn' is a part of no tensor's name"
    ]


# --- the same, against mergekit --------------------------------------------------------------------------------------

SCALARS = st.floats(0, 1) | st.integers(0, 1) | st.sampled_from(["1e-3", "0.5"])
VALUES = SCALARS | st.lists(SCALARS, min_size=1, max_size=5)
FILTERS = st.sampled_from(["self_attn", "fc1", "layers.1", "*", None, "absent"])
CONDITIONS = st.fixed_dictionaries({"value": VALUES}, optional={"filter": FILTERS})
SETTINGS = VALUES | CONDITIONS | st.lists(CONDITIONS, min_size=1, max_size=4)
PARAMETERS = st.fixed_dictionaries({}, optional={"weight": SETTINGS, "density": SETTINGS})
TENSORS = ("layers.0.self_attn.q_proj.weight", "layers.1.fc1.weight", "layers.1.self_attn.k_proj.bias", "embed")


@settings(max_examples=150, deadline=None)
@given(own=PARAMETERS, shared=PARAMETERS, tensor=st.sampled_from(TENSORS), t=st.floats(0, 1))
def test_any_setting_means_what_it_means_to_mergekit(own: dict, shared: dict, tensor: str, t: float) -> None:
    config = module("mergekit.config", "peers")
    resolver = module("mergekit.parameter_resolver", "peers")
    base = module("mergekit.merge_methods.base", "peers")
    text = yaml.safe_dump(
        {
            "merge_method": "ties",
            "base_model": "b",
            "models": [{"model": "x", "parameters": own}],
            "parameters": {"weight": 0.625, **shared},
        }
    )
    theirs = config.MergeConfiguration.model_validate(yaml.safe_load(text))
    bound = Recipe.from_yaml(text, METHODS)
    for name in ("weight", "density"):
        spec = base.ParameterSpec(name, float, base.ParameterScope.NON_BASE, default=0.125)
        expected = resolver.resolve_parameter(
            spec, (theirs.models[0].parameters, theirs.parameters), tensor_name=tensor, t=t
        )
        # one rounding apart at most: ours never leaves the range between the two points
        got = bound.resolve(name, tensor=tensor, model=0, position=t, default=0.125)
        assert got == pytest.approx(expected, rel=1e-15, abs=1e-300)


WHISPER_YAML = """
merge_method: ties
base_model: {base}
models:
  - model: {a}
    parameters:
      weight: [0.0, 0.5, 1.0]
      density:
        - {{filter: encoder_attn, value: [0.2, 0.4]}}
        - {{filter: fc1, value: 0.7}}
  - model: {b}
    parameters:
      weight: [{{filter: decoder, value: [1.0, 0.25]}}]
parameters:
  weight: 0.3
  density: [{{filter: fc, value: 0.9}}, {{filter: "*", value: [0.1, 0.2, 0.8]}}]
  lambda: [{{filter: layers.0, value: 0.5}}, {{value: [0.6, 0.9]}}]
  normalize: [true, false]
"""


@pytest.mark.parametrize("depths", [(3, 4), (1, 2)])
def test_a_whole_whisper_gets_the_parameters_that_mergekit_plans(tmp_path: Path, depths: tuple[int, int]) -> None:
    """mergekit plans every tensor of a Whisper; its parameters are those of `resolve` at `layers.positions`."""
    config = module("mergekit.config", "peers")
    plan = module("mergekit.plan", "peers")
    from mergekit.architecture.json_definitions import NAME_TO_ARCH
    from mergekit.options import MergeOptions

    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        text = json.dumps(
            {
                "model_type": "whisper",
                "architectures": ["WhisperForConditionalGeneration"],
                "encoder_layers": depths[0],
                "decoder_layers": depths[1],
            }
        )
        (tmp_path / name / "config.json").write_text(text)
    text = WHISPER_YAML.format(**{name: tmp_path / name for name in ("base", "a", "b")})

    architecture = NAME_TO_ARCH["WhisperForConditionalGeneration"][0]
    decoder = architecture.modules["decoder"]  # 0.1.5 lacks the last dot of this prefix
    if decoder.weight_prefix == "model.decoder":
        decoder = decoder.model_copy(update={"weight_prefix": "model.decoder."})
    architecture = architecture.model_copy(update={"modules": {**architecture.modules, "decoder": decoder}})
    theirs = config.MergeConfiguration.model_validate(yaml.safe_load(text))
    planner = plan.MergePlanner(theirs, architecture, MergeOptions(), theirs.base_model.config())
    planner._plan()

    bound = Recipe.from_yaml(text, METHODS)
    position = layers.positions(weight.name for weight, _ in planner._tensors)
    assert len(position) == len(planner._tensors) > 60
    compared = 0
    for weight, task in planner._tensors:
        for name in ("lambda", "normalize"):
            got = bound.resolve(name, tensor=weight.name, position=position[weight.name])
            assert got == pytest.approx(task.parameters[name]), (name, weight.name)
        for index in (0, 1):
            reference = config.ModelReference.parse(bound.models[index].model)
            for name in ("weight", "density"):
                got = bound.resolve(name, tensor=weight.name, model=index, position=position[weight.name])
                assert got == pytest.approx(task.input_parameters[reference][name]), (name, weight.name)
                compared += 1
    assert compared == 4 * len(planner._tensors)


# --- reading and writing ---------------------------------------------------------------------------------------------

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


# --- errors ----------------------------------------------------------------------------------------------------------

SIZE = "expected a size such as '5GB' or '500MB', got"
LORA = "because an adapter is an expert of its own; give the adapter's directory as the model"
TOKENIZER = "because the base's tokenizer is kept and all vocabularies must be equal; only 'base' is accepted"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("seed: -1", "seed: expected an integer >= 0, got -1"),
        ("seed: true", "seed: expected an integer, got true"),
        ("seed: 9223372036854775808", "seed: expected an integer below 2**63, got 9223372036854775808"),
        ("seed: 0x" + "f" * 9000, "seed: expected an integer below 2**63, got an integer of 36000 bits"),
        ("dtype: fp16", "dtype: expected one of float32, float16, bfloat16, got 'fp16'"),
        (
            "out_dtype: bloat16",
            "out_dtype: expected one of float32, float16, bfloat16, got 'bloat16'",
        ),
        ("rest: avg", "rest: expected one of task_arithmetic, average, base, got 'avg'"),
        ("out_shard_size: 5B", f"out_shard_size: {SIZE} '5B'"),
        ("out_shard_size: 0GB", f"out_shard_size: {SIZE} '0GB'"),
        ("out_shard_size: -1", f"out_shard_size: {SIZE} -1"),
        ("out_shard_size: true", f"out_shard_size: {SIZE} true"),
        ("out_shard_size: [5]", f"out_shard_size: {SIZE} [5]"),
        ("name: [a]", "name: expected a string, got ['a']"),
        ("parmeters: {}", "parmeters: unknown key 'parmeters', did you mean 'parameters'?"),
        ("target: fc1", "target: expected a mapping, got 'fc1'"),
        ("target: {inclde: a}", "target.inclde: unknown key 'inclde', did you mean 'include'?"),
        ("target: {include: [1]}", "target.include[0]: expected a string, got 1"),
        ("target: {include: {a: 1}}", "target.include: expected a list, got a mapping"),
        (
            "target: {exclude: '('}",
            "target.exclude[0]: '(' is not a regular expression: missing ), unterminated subpattern at position 0",
        ),
        ("target: {include: a, select: mlp}", "target: expected 'select' or 'include', got both"),
        (
            "target: {select: attn}",
            "target.select: expected one of projections, attention, mlp, got 'attn'",
        ),
        (
            "slices: []",
            "slices: not supported by lors, because whole models are merged layer by layer; list them under 'models'",
        ),
        (
            "modules: {a: 1}",
            "modules: not supported by lors, because encoder and decoder are merged together; "
            "filters treat them differently",
        ),
        (
            "chat_template: auto",
            "chat_template: not supported by lors, because the base's tokenizer files are kept as they are",
        ),
        ("tokenizer_source: union", f"tokenizer_source: 'union' is not supported by lors, {TOKENIZER}"),
        ("tokenizer: {source: union}", f"tokenizer: not supported by lors, {TOKENIZER}"),
        ("parameters: [1]", "parameters: expected a mapping from parameters to values, got [1]"),
        (
            "parameters: {densty: 1}",
            "parameters.densty: unknown parameter 'densty' of method lors, did you mean 'density'?",
        ),
        (
            "parameters: {zzz: 1}",
            "parameters.zzz: unknown parameter 'zzz' of method lors; known: rank, density, weight, lambda, normalize",
        ),
        ("parameters: {lam: 1}", "parameters.lam: unknown parameter 'lam' of method lors, did you mean 'lambda'?"),
        ("parameters: {density: 1.5}", "parameters.density: expected a number in [0, 1], got 1.5"),
        ("parameters: {density: .nan}", "parameters.density: expected a number in [0, 1], got nan"),
        ("parameters: {weight: .inf}", "parameters.weight: expected a number, got inf"),
        ("parameters: {weight: true}", "parameters.weight: expected a number, got true"),
        ("parameters: {weight: x}", "parameters.weight: expected a number, got 'x'"),
        ("parameters: {weight: }", "parameters.weight: expected a number, true, false or a string, got nothing"),
        ("parameters: {density: [0.1, 2]}", "parameters.density[1]: expected a number in [0, 1], got 2"),
        (
            "parameters: {density: [0.1, [2]]}",
            "parameters.density[1]: expected a number, true, false or a string, got [2]",
        ),
        ("parameters: {density: []}", "parameters.density: expected a number, true, false or a string, got []"),
        (
            "parameters: {density: [{filter: a, value: [0, 2]}, {value: 1}]}",
            "parameters.density[0].value[1]: expected a number in [0, 1], got 2",
        ),
        (
            "parameters: {density: [{value: 1}, 0.5]}",
            "parameters.density[1]: expected {filter: ..., value: ...} like the other items, got 0.5",
        ),
        ("parameters: {density: {vale: 1}}", "parameters.density.vale: unknown key 'vale', did you mean 'value'?"),
        ("parameters: {density: {filter: a}}", "parameters.density.value: missing"),
        (
            "parameters: {density: {filter: '', value: 1}}",
            "parameters.density.filter: expected a part of tensor names, got ''",
        ),
        ("parameters: {normalize: maybe}", "parameters.normalize: expected true or false, got 'maybe'"),
        ("parameters: {normalize: 2}", "parameters.normalize: expected true or false, got 2"),
        *(
            (
                f"parameters: {{rank: {value}}}",
                f"parameters.rank: expected an integer >= 1 or a fraction of min(m, n) between 0 and 1, got {value}",
            )
            for value in ("0", "-1", "1.5", "true")
        ),
        ("parameters: {rank: [0.5, 2]}", "parameters.rank: expected either integers or fractions, got both: [0.5, 2]"),
    ],
)
def test_errors_of_a_key(line: str, expected: str) -> None:
    assert message(HEAD + line) == f"recipe: {expected}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "merge_metod: lors\nmodels: [{model: a}]",
            "merge_metod: unknown key 'merge_metod', did you mean 'merge_method'?",
        ),
        ("models: [{model: a}]", "merge_method: missing"),
        ("merge_method: lors", "models: missing"),
        ("merge_method: lros\nmodels: [{model: a}]", "merge_method: unknown method 'lros', did you mean 'lors'?"),
        (
            "merge_method: zzz\nmodels: [{model: a}]",
            "merge_method: unknown method 'zzz'; known: lors, ties, linear, slerp, choosy",
        ),
        ("merge_method: [lors]\nmodels: [{model: a}]", "merge_method: expected a string, got ['lors']"),
        ("merge_method: ''\nmodels: [{model: a}]", "merge_method: expected a string that is not empty, got ''"),
        ("merge_method: lors\nmodels: [{model: a}]", "base_model: missing; method lors merges differences to a base"),
        ("merge_method: lors\nmodels: []", "models: expected at least one model, got []"),
        ("merge_method: lors\nmodels: a", "models: expected a list, got 'a'"),
        ("merge_method: lors\nmodels: [a]", "models[0]: expected a mapping such as {model: a}, got 'a'"),
        (
            "merge_method: lors\nmodels: [{model: a}, {modl: b}]",
            "models[1].modl: unknown key 'modl', did you mean 'model'?",
        ),
        ("merge_method: lors\nmodels: [{model: }]", "models[0].model: expected a string, got nothing"),
        ("merge_method: lors\nmodels: [{model: 7}]", "models[0].model: expected a string, got 7"),
        ("merge_method: lors\nmodels: [{name: a}]", "models[0].model: missing"),
        (
            "merge_method: lors\nmodels: [{model: a, name: ' a'}]",
            "models[0].name: expected a short label of one line, got ' a'",
        ),
        (
            "merge_method: lors\nmodels: [{model: a, name: x}, {model: b, name: x}]",
            "models[1].name: 'x' is already the name of models[0]",
        ),
        (
            "merge_method: lors\nmodels: [{model: a+b}]",
            f"models[0].model: LoRA syntax 'a+b' is not supported by lors, {LORA}",
        ),
        (
            "merge_method: lors\nbase_model: a@b@c\nmodels: [{model: a}]",
            "base_model: expected at most one '@REVISION', got 'a@b@c'",
        ),
        (
            "merge_method: lors\nmodels: [{model: {model: a, lora: b}}]",
            f"models[0].model: a mapping is not supported by lors, {LORA}",
        ),
        (
            "merge_method: lors\nbase_model: {path: a}\nmodels: [{model: a}]",
            "base_model: a mapping is not supported by lors, because a model is a path, a hub id or ID@REVISION",
        ),
        (
            "merge_method: lors\nbase_model: b\nmodels: [{model: a, parameters: {lambda: 1}}]",
            "models[0].parameters.lambda: lambda is one value for the whole merge, "
            "expected it in the global parameters",
        ),
        (
            "merge_method: lors\nbase_model: b\nmodels: [{model: a}, {model: c, parameters: {densty: 1}}]",
            "models[1].parameters.densty: unknown parameter 'densty' of method lors, did you mean 'density'?",
        ),
        (
            "merge_method: lors\nbase_model: b\nmodels: [{model: b}]",
            "models: expected at least 1 besides the base for method lors, got 0",
        ),
        (
            "merge_method: choosy\nbase_model: b\nmodels: [{model: x}]",
            "models: expected 2 besides the base for method choosy, got 1",
        ),
        (
            HEAD.replace("lors", "choosy") + "parameters: {steps: 1.5}",
            "parameters.steps: expected an integer in [1, 9], got 1.5",
        ),
        (
            HEAD.replace("lors", "choosy") + "parameters: {sign: max}",
            "parameters.sign: expected one of sum, count, got 'max'",
        ),
        (
            HEAD.replace("lors", "choosy") + "parameters: {gamma: -1}",
            "parameters.gamma: expected a number >= 0, got -1",
        ),
        (HEAD.replace("lors", "choosy") + "parameters: {top: 3}", "parameters.top: expected a number <= 2, got 3"),
        (HEAD + "parameters: {density: '0_5'}", "parameters.density: expected a number in [0, 1], got '0_5'"),
        ("", "expected a mapping with merge_method and models, got nothing"),
        ("# only a comment", "expected a mapping with merge_method and models, got nothing"),
        ("recipe.yml", "expected a mapping with merge_method and models, got 'recipe.yml'"),
        ("[1, 2]", "expected a mapping with merge_method and models, got [1, 2]"),
    ],
)
def test_errors_of_a_document(text: str, expected: str) -> None:
    assert message(text) == f"recipe: {expected}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: c: d", "recipe:2:5: not valid YAML: mapping values are not allowed here"),
        ("a:\n\tb: 1", r"recipe:2:1: not valid YAML: found character '\t' that cannot start any token"),
        ("a: [1", "recipe:1:6: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        (
            "a: 1\n---\nb: 1",
            "recipe:2:1: not valid YAML: expected a single document in the stream, but found another document",
        ),
        ("a: 1\nb: 2\na: 3", "recipe:3:1: the key 'a' was already given in line 1"),
        ("{a: 1, 'a': 2}", "recipe:1:8: the key 'a' was already given in line 1"),
        ("a: 1\n1: 2", "recipe:2:1: expected a word as key, got '1' (quote it if it is one)"),
        ("? [a]\n: 2", "recipe:1:3: expected a word as key, got a list or mapping (quote it if it is one)"),
        ("a: x\0y", "recipe:1:5: not valid YAML: the character U+0000 is not allowed"),
        ("a: *b", "recipe:1:4: not valid YAML: found undefined alias 'b'"),
        ("a: &a [*a]", "recipe:1:4: nested deeper than 32 levels"),
        ("[" * 40 + "]" * 40, "recipe:1:34: nested deeper than 32 levels"),
        ("[" * 1000, "recipe: nested deeper than 32 levels"),
        (
            "a: 2024-01-02",
            "recipe:1:4: a value of the kind 'timestamp' is not supported, got '2024-01-02' (quote it if it is text)",
        ),
        ("a: !!set {b, c}", "recipe:1:4: a value of the kind 'set' is not supported"),
        (
            "a: !!python/object/apply:os.system [ls]",
            "recipe:1:4: a value of the kind 'python/object/apply:os.system' is not supported",
        ),
        ("a: !mine [ls]", "recipe:1:4: not valid YAML: could not determine a constructor for the tag '!mine'"),
        ("a" * (strict_yaml.MAX_BYTES + 1), "recipe: expected a recipe of at most 1048576 characters, got 1048577"),
    ],
)
def test_errors_of_yaml(text: str, expected: str) -> None:
    assert message(text) == expected


@pytest.mark.parametrize(
    "value",
    ["010", "1:30", "1_000", "0b11", "-0x1F", "1:30.5", "1_0.5", "!!int '1:30'", "!!float 1_0", "no", "Yes", "on"],
)
def test_what_yaml_1_1_and_1_2_read_differently_is_refused(value: str) -> None:
    """rank: 1:30 would be 90, 010 would be 8, and the label no (Norwegian) false."""
    for text in (f"{HEAD}parameters:\n  rank: {value}", f"{HEAD}parameters: {{density: [0.1, {value}]}}"):
        got = message(text)
        assert "means one thing in YAML 1.1 and another in 1.2: write " in got, got
        assert got.startswith(f"recipe:{text[: text.index(value)].count(chr(10)) + 1}:")
    assert "means one thing" in message(f"merge_method: lors\nbase_model: b\nmodels:\n- {{model: x, name: {value}}}")


def test_numbers_and_words_that_they_read_alike() -> None:
    values = {"1": 1, "-2": -2, "+3": 3, "0x1F": 31, "0.5": 0.5, ".5": 0.5, "1.": 1.0, "1.5e-3": 0.0015, "'010'": "010"}
    values |= {
        "true": True,
        "False": False,
        "~": None,
        "null": None,
        "": None,
        "'no'": "no",
        "nope": "nope",
        "1e3": "1e3",
    }
    for text, value in values.items():
        assert strict_yaml.parse(f"a: {text}", "x") == {"a": value}


def test_very_many_models() -> None:
    """Of one path, whose labels are made longer until they differ, and numbered where they never do."""
    start, entry = "merge_method: lors\nbase_model: b\nmodels:\n", "- {model: " + "a/" * 30 + "x}\n"
    assert message(start + entry * 9000) == "recipe: models: expected at most 1000 models, got a list of 9000"
    begun = time.process_time()
    labels = Recipe.from_yaml(start + entry * 1000).labels
    assert len(set(labels)) == 1000 and labels[0].startswith("a-a-a") and labels[999].endswith("x-1000")
    assert time.process_time() - begun < 5


def test_an_alias_bomb_is_refused_before_it_is_built() -> None:
    levels = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 20))
    assert "expands to more than 50000 values" in message(f"a0: &a0 [x]\n{levels}")
    for much in ("1," * 200_000, "[]," * 200_000):  # the parser takes 20 s for these
        begun = time.process_time()
        assert "has more than 50000 values" in message(f"a: [{much}]")
        assert time.process_time() - begun < 5


def test_anchors_and_merge_keys_are_fine() -> None:
    bound = Recipe.from_yaml(
        "merge_method: lors\nbase_model: b\nmodels:\n"
        "  - {model: x, parameters: &p {weight: 0.5, density: 0.1}}\n"
        "  - {model: y, parameters: {<<: *p, density: 0.3}}\n",
        METHODS,
    )
    assert bound.params_for(tensor="w", model=1) == {"rank": 7, "density": 0.3, "weight": 0.5}


def test_errors_of_a_file(tmp_path: Path) -> None:
    def of(path: Path) -> str:
        with pytest.raises(LorsError) as error:
            Recipe.from_yaml(path, METHODS)
        return str(error.value)

    missing = tmp_path / "no.yml"
    assert of(missing) == f"{missing}: cannot read the recipe: No such file or directory"
    assert of(tmp_path) == f"{tmp_path}: cannot read the recipe: Is a directory"
    path = tmp_path / "r.yml"
    path.write_bytes(b"merge_method: \xff")
    assert of(path) == f"{path}: expected UTF-8 text, got byte 0xff at offset 14"
    path.write_bytes(b"#" * (strict_yaml.MAX_BYTES + 1))
    assert of(path) == f"{path}: expected a recipe of at most 1048576 bytes"
    path.write_text(HEAD + "sed: 1")
    assert of(path) == f"{path}: sed: unknown key 'sed', did you mean 'seed'?"
    path.write_text("a: [")
    assert of(path).startswith(f"{path}:1:5: not valid YAML: ")
    path.write_text("\N{BYTE ORDER MARK}" + HEAD)
    assert Recipe.load(path, METHODS).merge_method == "lors"


def test_strange_model_strings_are_errors_or_names_but_never_tracebacks() -> None:
    for model in ("x" * 10_000, "~nobody-of-this-name/x", "~", "a\\0b", "a: b", "/" * 300):
        text = yaml.safe_dump({"merge_method": "lors", "models": [{"model": model}]})
        loaded = Recipe.from_yaml(text)
        assert loaded.models[0].model == model
        assert loaded.labels[0] and loaded.sources


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "examples").glob("*.yml")), ids=lambda p: p.name)
def test_the_examples_are_recipes(path: Path) -> None:
    bound = Recipe.load(path, SPECS)
    assert Recipe.from_yaml(bound.to_yaml(), SPECS).to_yaml() == bound.to_yaml()
    whisper = ["model.decoder.layers.0.self_attn.q_proj.weight", "model.encoder.layers.1.fc1.weight"]
    whisper += ["model.decoder.layers.1.encoder_attn.k_proj.weight", "model.decoder.embed_tokens.weight"]
    assert bound.unmatched_filters(whisper) == []
