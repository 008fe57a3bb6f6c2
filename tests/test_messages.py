"""What a newcomer sees: typical mistakes, one line each, that says what to do."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

import tiny
from lors.cli import main
from lors.experts.decompose import decompose

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 967061824\n"
RECIPE = "merge_method: {}\nbase_model: models/base\nmodels: [{{model: models/ca}}, {{model: models/de}}]\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with models, recipes, a merged model, and what people take for models."""
    import lors

    root = tmp_path_factory.mktemp("newcomer")
    paths = tiny.family(root / "models", ("ca", "de"))
    lors.merge(paths["base"], {"ca": paths["ca"], "de": paths["de"]}, root / "merged")
    decompose(paths["base"], paths["de"], root / "de.lors.safetensors", name="de")
    shutil.copytree(paths["ca"], root / "trainer/checkpoint-100")
    shutil.copytree(paths["ca"], root / "trainer/checkpoint-1000")
    for name, file in (("lfs", "model.safetensors"), ("lfs2", "tokenizer.json")):
        shutil.copytree(paths["ca"], root / name)
        (root / name / file).write_text(POINTER)
    tokens = "model.decoder.embed_tokens.weight"
    state = {name: np.concatenate([a, a[:1]]) if name == tokens else a for name, a in tiny.tensors(0, 0.5).items()}
    tiny.write(root / "more", state)
    (root / "empty").mkdir()
    (root / "audio.mp3").write_bytes(b"ID3" + bytes(100))
    (root / "r.yml").write_text(RECIPE.format("lors"))
    (root / "linear.yml").write_text(RECIPE.format("linear"))
    (root / "typo.yml").write_text(RECIPE.format("lors").replace("models/de", "models/dee"))
    (root / "weight.yml").write_text(RECIPE.format("lors").replace("models/de", "models/de, weight: 2"))
    (root / "list.yml").write_text("merge_method: lors\nbase_model: models/base\nmodels: [models/ca]\n")
    return root


def said(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a command line: one line on stderr, nothing on stdout, exit code 2."""
    monkeypatch.setattr("sys.argv", ["lors", *shlex.split(line)])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1, (out, err)
    return err.removeprefix("error: ").rstrip("\n")


BASE = "merge --base models/base "
MERGE = BASE + "--expert ca=models/ca --expert de=models/de "
SWEEP = "sweep r.yml -o s --score true --objective bleu "
USAGE = "lors merge --base DIR --expert NAME=DIR OUT"
MISTAKES = {
    # commands and options
    "mrge r.yml out": "lors: no such command 'mrge', did you mean 'merge'?",
    "merge --densty 0.1 out": "lors merge: unknown option --densty, did you mean --density?",
    "merge --experts ca=models/ca out": "lors merge: unknown option --experts, did you mean --expert?",
    "merge": "lors merge: missing argument [RECIPE.yml] OUT; see lors merge --help",
    "inspect a b": "lors inspect: expected no further argument, got b; see lors inspect --help",
    "merge out --rank": "lors: option '--rank' requires an argument; see lors --help",
    MERGE + "--rank seven out": "--rank: expected a number, got 'seven'",
    MERGE + "--threads many out": "--threads: expected an integer, got 'many'",
    MERGE + "--threads=0 out": "--threads: expected at least 1, got '0'",
    # recipe and OUT
    "merge r.yml": "merge: expected OUT, the directory to write, after the recipe: lors merge r.yml OUT",
    "merge out": f"merge: expected a recipe before OUT, or options that describe the merge: {USAGE}",
    BASE
    + "--expert models/ca models/de out": "merge: 'models/de' is no recipe (.yml); every model has an --expert of its "
    "own: --expert models/de",
    BASE
    + "--expert models/ca models/de -o out": "merge: 'models/de' is no recipe (.yml); every model has an --expert of "
    "its own: --expert models/de",
    BASE + "out": "merge: expected at least one --expert NAME=DIR",
    "merge out r.yml": "out: there is no such recipe; the output comes last: lors merge r.yml out",
    "merge s.yml out": "s.yml: cannot read the recipe: No such file or directory, did you mean 'r.yml'?",
    "merge models/base out": f"models/base: expected a recipe, a YAML file, got a directory; models are options: {USAGE}",
    BASE + "ca=models/ca out": f"merge: expected [RECIPE.yml] OUT, got ca=models/ca out; models are options: {USAGE}",
    "merge a b c": f"merge: expected [RECIPE.yml] OUT, got a b c; models are options: {USAGE}",
    "merge r.yml out --rank 3": "merge: expected a recipe or options that describe the merge, got both; put them in the recipe",
    "merge list.yml out": "list.yml: models[0]: expected a mapping such as {model: models/ca}, got 'models/ca'",
    "merge typo.yml out": "typo.yml: models[1].model: models/dee: not a file or directory here, not in the hub cache, and "
    "the hub cannot be reached; looked for in {cwd}, did you mean 'models/de'?",
    "merge weight.yml out": "weight.yml: models[1].weight: unknown key 'weight'; it is a parameter: put it under "
    "models[1].parameters:",
    "merge linear.yml out": "models[0].parameters.weight: missing; method linear has no default for it",
    # models
    BASE + "--expert ca=trainer out": "trainer: no weights in this directory: expected model.safetensors, "
    "model.safetensors.index.json or pytorch_model.bin; did you mean trainer/checkpoint-1000, trainer/checkpoint-100?",
    BASE + "--expert ca=models out": "models: no weights in this directory: expected model.safetensors, "
    "model.safetensors.index.json or pytorch_model.bin; did you mean models/base, models/ca, models/de?",
    BASE + "--expert ca=empty out": "empty: no weights in this directory: expected model.safetensors, "
    "model.safetensors.index.json or pytorch_model.bin; it is empty",
    BASE
    + "--expert ca=lfs out": "lfs/model.safetensors: a git-lfs pointer, not the file itself: run `git lfs pull` in lfs",
    BASE
    + "--expert ca=lfs2 out": "lfs2/tokenizer.json: a git-lfs pointer, not the file itself: run `git lfs pull` in lfs2",
    BASE + "--expert ca=audio.mp3 out": "audio.mp3: not weights: expected a .safetensors file, a .pt or .bin as torch "
    "writes it, or a .nemo",
    BASE + "--expert ca=/nowhere out": "--expert ca: /nowhere: no such file or directory",
    BASE + "--expert ca=models/base out": "--expert ca: expected a model that was trained from the base, got the base: "
    "models/base",
    BASE + "--expert models/ca --expert trainer/../models/ca/ out": "--expert: 'ca' is given twice: models/ca and "
    "trainer/../models/ca/; NAME=PATH gives another name",
    BASE + "--expert =models/ca out": "--expert: expected NAME=PATH, or a path, got '=models/ca'",
    "merge --base bases --expert ca=models/ca out": "--base: bases: no such file or directory; looked for in {cwd}",
    "merge --base https://huggingface.co/openai/whisper-small --expert ca=models/ca out": "https://huggingface.co/openai/"
    "whisper-small: a page of the hub: expected its id, openai/whisper-small",
    "merge --expert ca=models/ca out": "--base: missing; method lors merges differences to a base",
    # settings
    MERGE + "--method TIES out": "--method: unknown method 'TIES', did you mean 'ties'?",
    MERGE + "--method linear out": "--weight ca: missing; method linear has no default for it",
    BASE + "--expert ca=models/ca --method slerp out": "--param t=VALUE: missing; method slerp has no default for it",
    MERGE + "--method slerp out": "--expert: expected 1 besides the base for method slerp, got 2",
    MERGE + "--density 20 out": "--density: expected a number in [0, 1], got 20.0",
    MERGE + "--rank 99 out": "--rank: expected at most min(m, n) = 32 for a 32 x 32 matrix, got 99: tensor "
    "'model.encoder.layers.0.self_attn.q_proj.weight'",
    MERGE + "--weight 0.5 out": "--weight: expected NAME=VALUE, got '0.5'; for all experts alike: --param weight=0.5",
    MERGE + "--weight cat=0.5 out": "--weight: unknown expert 'cat', did you mean 'ca'?",
    MERGE
    + "--param x=[ out": "--param x: '[':1:2: not valid YAML: expected the node content, but found '<stream end>'",
    MERGE
    + "--param rank=010 out": "--param rank: '010':1:1: '010' means one thing in YAML 1.1 and another in 1.2: write a "
    "decimal number, or quote it if it is text",
    MERGE
    + "--param gamma=1 out": "--param gamma: unknown parameter 'gamma' of method lors; known: rank, density, weight, "
    "lambda, rest_lambda, boost, boost_merged",
    MERGE
    + "--rest base --rest-lambda 0.5 out": "--rest-lambda: expected no value with rest: base, which adds nothing there",
    MERGE + "--dtype int8 out": "--dtype: expected one of float32, float16, bfloat16, got 'int8'",
    MERGE
    + "--include *.weight out": "--include: '*.weight' is not a regular expression: nothing to repeat at position 0; "
    "as a regular expression, * is .*: '.*.weight'",
    MERGE + "--exclude . out": "--exclude: '.' takes out all 32 chosen matrices",
    MERGE + "--seed -1 out": "--seed: expected an integer >= 0, got -1",
    MERGE + "--backend gpu out": "--backend: expected one of cpu, cuda, triton, reference or None, got 'gpu'",
    MERGE + "merged": "{cwd}/merged: exists already; --force replaces it",
    # sweeps
    SWEEP
    + "--lambda 0.1": "--objective: expected bleu:max (or bleu:min), for the least is taken otherwise, got 'bleu'",
    "sweep r.yml -o s --score true --rank 0": "--rank: 0: expected an integer >= 1 or a fraction of min(m, n) between 0 "
    "and 1, got 0.0",
    "sweep r.yml -o s --score true --param rank=a:1:1": "--param rank: a:1:1: expected numbers as FROM:TO or FROM:TO:STEP",
    # expert files and edits
    "decompose models/base models/ca -o x.safetensors --density 2": "--density: expected a number in [0, 1], got 2.0",
    "decompose models/base models/ca -o x.safetensors --values fp16": "--values: expected one of float32, float16, "
    "bfloat16, got 'fp16'",
    "decompose models/base models/ca -o x.safetensors --include [": "--include: '[' is not a regular expression: "
    "unterminated character set at position 0",
    "decompose models/base more -o x.safetensors": "more: another vocabulary: expected 61 tokens as in base, got 62 (tensor "
    "'model.decoder.embed_tokens.weight'); an expert file holds no tokens: merge the checkpoint with --vocabulary union",
    "remove merged es": "es: no such file or directory; expected an expert file, as `lors decompose` writes it; {cwd}/merged "
    "has ca, de",
    "remove de.lors.safetensors merged": "de.lors.safetensors: expected the directory of a merged model; the model comes "
    "first: merged de.lors.safetensors",
    "report models/base ca=models/ca ca=models/de -o r.html": "report: 'ca' is given twice: models/ca and models/de; "
    "NAME=PATH gives another name",
    "report models/base models/ca -o r.html --density 3": "--density: expected a number in [0, 1], got 3.0",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_do(
    line: str, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    before = sorted(made.iterdir())
    assert said(line, monkeypatch, capsys) == MISTAKES[line].replace("{cwd}", str(made))
    assert sorted(made.iterdir()) == before


@pytest.mark.parametrize(("built", "reason"), [(None, "is for CPUs only"), ("12.8", "PyTorch sees no GPU: ")])
@pytest.mark.parametrize("dry", ["", "--dry-run"])
def test_no_gpu_is_told_with_its_reason(
    built: str | None,
    reason: str,
    dry: str,
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    monkeypatch.chdir(made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    got = said(MERGE + f"--device cuda {dry} out", monkeypatch, capsys)
    assert got.startswith("--device: ") and reason in got and got.endswith(", got 'cuda'")


def test_an_expert_may_be_a_path_alone(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    paths = ("models/ca/", "de.lors.safetensors", "trainer/checkpoint-100/model.safetensors")
    arguments = ["merge", "--base", "models/base", *(f"--expert={path}" for path in paths), str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["lors", *arguments])
    main()
    assert "3 experts" in capsys.readouterr().out
    ledger = json.loads((tmp_path / "out" / "lors_ledger.json").read_text())
    assert [expert["name"] for expert in ledger["experts"]] == ["ca", "de", "checkpoint-100"]
