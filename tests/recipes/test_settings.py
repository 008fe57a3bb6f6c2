"""The keywords of `lors.merge` as a type checker sees them."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lors
import tiny
from lors.errors import LorsError
from lors.methods import SPECS
from lors.recipes.recipe import Recipe
from lors.recipes.settings import Settings

ROOT = Path(__file__).parents[2]

RIGHT = """
import numpy as np

import lors
from lors.integrations.transformers import load_merged

experts = {"ca": "whisper-ca", "de": "whisper-de"}
lors.merge("base", experts, "out", lam=0.2, rank=7, density=0.2, weight={"ca": 1.0, "de": 0.5}, seed=1)
lors.merge("base", experts, out="out", method="ties", density=[0.1, 0.3], normalize=False, force=True, threads=2)
lors.merge("base", experts, "out", density=[{"filter": "fc1", "value": 0.3}, {"value": 0.1}], target={"include": ["fc"]})
lors.merge("base", experts, "out", "regmean", statistics={"ca": "ca.safetensors"}, rest="average", out_dtype="bfloat16")
lors.merge_state_dicts({"w": np.zeros(2)}, {"ca": {"w": np.ones(2)}}, "task_arithmetic", lam=None)
load_merged("base", experts, lam=0.2)
"""
WRONG = {  # a line that must not pass -> what is said of it
    'lors.merge("base", experts, "out", lamda=0.2)': '"lamda"',
    'lors.merge("base", experts, "out", rank="seven")': '"rank"',
    'lors.merge("base", experts, "out", normalize="yes")': '"normalize"',
    'lors.merge("base", experts, "out", rest="averge")': '"rest"',
    'lors.merge("base", experts, "out", out_dtype="float64")': '"out_dtype"',
    'lors.merge_state_dicts({}, {}, densty=0.2)': '"densty"',
    'load_merged("base", experts, lamda=0.2)': '"lamda"',
}  # fmt: skip


def test_every_parameter_of_every_method_is_a_keyword() -> None:
    parameters = {parameter.name for spec in SPECS.values() for parameter in spec.parameters}
    of_recipes = set(inspect.signature(Recipe.from_arguments).parameters) - {
        *("cls", "base", "experts", "method", "methods", "parameters"),
    }
    assert set(Settings.__annotations__) == {"lam" if name == "lambda" else name for name in parameters} | of_recipes


def test_a_type_checker_sees_what_is_wrong(tmp_path: Path) -> None:
    code = tmp_path / "calls.py"
    code.write_text(RIGHT + "\n".join(WRONG) + "\n")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    first = len(RIGHT.splitlines()) + 1
    found = {int(line.split(":")[1]): line for line in done.stdout.splitlines() if "error:" in line}
    assert sorted(found) == list(range(first, first + len(WRONG))), done.stdout + done.stderr
    for number, said in enumerate(WRONG.values(), first):
        assert said in found[number]


def test_at_run_time_it_is_one_line_that_suggests_the_right_name(tmp_path: Path) -> None:
    paths = tiny.family(tmp_path / "models", ("ca",))
    with pytest.raises(
        LorsError, match=r"unknown parameter 'lamda' of method lors, did you mean 'lambda' \(lam in Python\)\?"
    ):
        lors.merge(paths["base"], {"ca": paths["ca"]}, tmp_path / "out", **{"lamda": 0.2})  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
