"""A method of every kind of parameter, and recipes for it."""

from __future__ import annotations

from lors.recipes.parameters import MethodSpec, ParameterSpec
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
