"""What is wrong with a recipe, in one line."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from lors.errors import LorsError
from lors.methods import SPECS
from lors.recipes import strict_yaml
from lors.recipes.parameters import MethodSpec
from lors.recipes.recipe import Recipe
from recipes import HEAD, METHODS


def message(text: str, methods: dict[str, MethodSpec] | None = METHODS) -> str:
    with pytest.raises(LorsError) as error:
        Recipe.from_yaml(text, methods)
    assert "\n" not in str(error.value)
    return str(error.value)


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
        ("base: b", "base: unknown key 'base', did you mean 'base_model'?"),
        ("lambda: 0.4", "lambda: unknown key 'lambda'; it is a parameter: put it under parameters:"),
        ("steps: 2", "steps: unknown key 'steps'; it is a parameter: put it under parameters:"),
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
        (
            "parameters: {lam: 1}",
            "parameters.lam: unknown parameter 'lam' of method lors, did you mean 'lambda' (lam in Python)?",
        ),
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
