"""What a setting means for a tensor, here and to mergekit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import module
from lors.checkpoints import layers
from lors.errors import LorsError
from lors.methods import SPECS
from lors.recipes.parameters import rank_of
from lors.recipes.recipe import Recipe
from recipes import HEAD, METHODS, recipe


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
