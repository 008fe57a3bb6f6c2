"""The peers' own tests, before our functions are put under theirs and after: what passed has to pass.

    python tests/support/peers_own.py [mergekit] [peft] [fusion-bench]

Run on demand: pip fetches the source distribution of each installed version, and nothing else needs the network. Two
things that the distributions leave out are made here: mergekit's helper with its small models, and small random models
under the names of those that PEFT's tests take from the hub. docs/integrations.md says what is left out.
"""

from __future__ import annotations

import collections
import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import types
import xml.etree.ElementTree as ElementTree
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from typing import Any

# what pytest is given, in a folder that holds the distribution's `tests`
ARGUMENTS = {
    "mergekit": ["tests"],
    # the tests that reach the functions we replace: merged adapters
    "peft": [
        *("-k", "weighted and not Deberta and not qwen2 and not Gemma", "tests/test_custom_models.py"),
        *(f"tests/test_{kind}_models.py" for kind in ("decoder", "encoder_decoder", "feature_extraction")),
    ],
    # nothing of it is replaced: its algorithms beside ours
    "fusion-bench": ["tests"],
}
BRIDGES = {"mergekit": "lors.integrations.mergekit", "peft": "lors.integrations.peft"}


def main(distributions: list[str]) -> int:
    failed = False
    for distribution in distributions or list(ARGUMENTS):
        with tempfile.TemporaryDirectory() as scratch:
            unpack(distribution, Path(scratch))
            before, _ = outcomes(distribution, Path(scratch), ours=False)
            after, calls = outcomes(distribution, Path(scratch), ours=True)
        broken = sorted(test for test, outcome in before.items() if after.get(test) != outcome)
        print(f"{distribution} {version(distribution)}: before {counted(before)}; after {counted(after)}", flush=True)
        if distribution in BRIDGES:
            print(f"  {calls} selections were ours", flush=True)
        print(*(f"  {test}: {before[test]}, now {after.get(test, 'gone')}" for test in broken), sep="\n", end="")
        failed |= bool(broken) or not before or (distribution in BRIDGES and not calls)
    return int(failed)


def counted(outcomes: dict[str, str]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(collections.Counter(outcomes.values()).items()))


def unpack(distribution: str, folder: Path) -> None:
    """The `tests` of the source distribution of the installed version, without its package: the installed one is tested."""
    wanted = f"{distribution}=={version(distribution)}"
    options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", *options, wanted], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        for member in files:
            member.name = member.name.partition("/")[2]
            if member.name.startswith("tests/"):
                files.extract(member, folder, filter="data")
    (folder / "tests" / "__init__.py").touch()


def outcomes(distribution: str, folder: Path, *, ours: bool) -> tuple[dict[str, str], int]:
    """Test -> passed, failed, error or skipped; and how often our selection was called."""
    report = folder / f"ours-{ours}.xml"
    here = Path(__file__).resolve().parent
    root = here.parent.parent
    paths = [str(here), str(root), str(root / "python_api")]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "PEERS_OWN": distribution, "PEERS_OURS": str(int(ours)),
        "HF_HUB_CACHE": str(folder / "hub"), "HF_ENDPOINT": "http://127.0.0.1:9", "PEERS_CALLS": str(folder / "calls"),
    }  # fmt: skip
    options = ["-q", "-p", "peers_own", "-p", "no:cacheprovider", f"--junitxml={report}", "--tb=short"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *ARGUMENTS[distribution]],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if not report.exists():
        sys.exit(f"{distribution}: pytest did not run: {done.stdout[-3000:]}{done.stderr[-3000:]}")
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        found[f"{case.get('classname')}::{case.get('name')}"] = kinds[0] if kinds else "passed"
    return found, int((folder / "calls").read_text()) if ours and distribution in BRIDGES else 0


# --- as a plugin of pytest, in the process of the peer's tests ---------------------------------------------------------

_calls = 0


def pytest_configure() -> None:
    distribution = os.environ["PEERS_OWN"]
    if distribution == "mergekit":
        sys.modules["tests.common"] = common()
    if distribution == "peft":
        make_models(Path(os.environ["HF_HUB_CACHE"]))
        sys.modules["diffusers"] = empty_diffusers()
    if os.environ["PEERS_OURS"] == "0":
        return
    if distribution not in BRIDGES:
        importlib.import_module("lors.integrations.fusion_bench")
        return
    bridge: Any = importlib.import_module(BRIDGES[distribution])
    bridge.largest_entries = counting(bridge.largest_entries)
    bridge.accelerate()
    if distribution == "mergekit":
        bridge.register()


def pytest_unconfigure() -> None:
    Path(os.environ["PEERS_CALLS"]).write_text(str(_calls))


def counting(function: Any) -> Any:
    def counted(*arguments: Any) -> Any:
        global _calls
        result = function(*arguments)
        _calls += result is not None
        return result

    return counted


def common() -> types.ModuleType:
    """What mergekit's tests import from a file that its distribution has not got."""
    import torch
    import transformers as t
    from mergekit.merge import MergeOptions, run_merge
    from safetensors.torch import load_file

    def saved(path: Any, model: Any) -> str:
        model.save_pretrained(path)
        return str(path)

    text = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 16, "num_hidden_layers": 2}

    def make_picollama(path: Any, vocab_size: int = 64) -> str:
        return saved(path, t.LlamaForCausalLM(t.LlamaConfig(vocab_size=vocab_size, **text)))

    def make_picogranite(path: Any, vocab_size: int = 64) -> str:
        return saved(path, t.GraniteForCausalLM(t.GraniteConfig(vocab_size=vocab_size, **text)))

    def make_gpt2size(path: Any, vocab_size: int = 64) -> str:
        config = t.GPT2Config(vocab_size=vocab_size, n_ctx=128, n_embd=32, n_layer=12, n_head=4)
        return saved(path, t.GPT2LMHeadModel(config))

    def make_picoLlaVa(path: Any) -> str:
        vision = t.CLIPVisionConfig(image_size=32, patch_size=8, **text)
        config = t.LlavaConfig(
            vision_config=vision, text_config=t.LlamaConfig(vocab_size=64, **text), image_token_index=63
        )
        return saved(path, t.LlavaForConditionalGeneration(config))

    def run_and_check_merge(config: Any, check_nan: bool = True, validate: Any = None, **_: Any) -> None:
        with tempfile.TemporaryDirectory() as out:
            run_merge(config, out_path=out, options=MergeOptions())
            assert (Path(out) / "config.json").exists()
            shards = [load_file(path) for path in Path(out).glob("*.safetensors")]
            assert shards
            assert not check_nan or not any(torch.isnan(tensor).any() for shard in shards for tensor in shard.values())
            if validate:
                validate(out)

    module = types.ModuleType("tests.common")
    made = (make_picollama, make_picogranite, make_gpt2size, make_picoLlaVa, run_and_check_merge)
    module.__dict__.update({function.__name__: function for function in made})
    return module


def make_models(cache: Path) -> None:
    """Random models under the names of those on the hub, once."""
    import torch
    import transformers as t

    size = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    gpt = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4}
    t5 = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    bart = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    bart |= {"vocab_size": 100, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    opt = {"vocab_size": 100, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    peft, trl = "peft-internal-testing/tiny-random-", "trl-internal-testing/tiny-random-"
    for name, config in {
        f"{peft}OPTForCausalLM": t.OPTConfig(num_attention_heads=4, **opt),
        f"{peft}GPT2LMHeadModel": t.GPT2Config(**gpt),
        f"{peft}GPTJForCausalLM": t.GPTJConfig(rotary_dim=4, **gpt),
        f"{trl}LlamaForCausalLM": t.LlamaConfig(**size),
        f"{peft}T5ForConditionalGeneration-calibrated": t.T5Config(**t5),
        f"{peft}BartForConditionalGeneration": t.BartConfig(**bart),
        f"{peft}BertModel": t.BertConfig(**size),
        f"{peft}RobertaModel": t.RobertaConfig(**size),
    }.items():
        folder = cache / ("models--" + name.replace("/", "--"))
        if folder.exists():
            continue
        torch.manual_seed(0)
        model = getattr(t, name.partition("random-")[2].removesuffix("-calibrated"))(config)
        model.save_pretrained(folder / "snapshots" / "0")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0")


def empty_diffusers() -> types.ModuleType:
    """PEFT's helpers ask whether a model is one of its pipelines; none is."""
    module = types.ModuleType("diffusers")
    module.__spec__ = ModuleSpec("diffusers", None)
    module.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
    return module


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
