"""What is fuzzed: each target takes bytes, and either returns or raises LorsError of one line. Anything else is a fault."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import lors
import pickles
import tiny
from fuzz.mutate import mutate, repickled, resealed, swapped
from lors.checkpoints import layers
from lors.checkpoints.reader import open_checkpoint
from lors.errors import LorsError
from lors.experts.decompose import decompose
from lors.experts.expert_source import open_expert
from lors.experts.opening import source_of
from lors.experts.source import Slot
from lors.merging.card import carried_over, write_card
from lors.merging.edit import _addition, _recipe
from lors.merging.in_memory import merge_in_memory
from lors.merging.ledger import Ledger
from lors.merging.united import align, documents, tables_of
from lors.methods import SPECS
from lors.recipes.recipe import Recipe
from lors.speech.model.whisper import SHIPPED
from lors.sweep.trials import load_trials

__all__ = ["Corpus"]

UNION = SHIPPED["tiny"]
UNITED = {"tokenizer": "tokenizer", "tokens": "tokenizer_config", "generation": "generation_config"}
CARD = b"""---
language:
- en
- "ca"
license: apache-2.0   # of the weights
license_name: mine
license_link: https://example.org/LICENSE
tags: [audio, whisper]
model-index: [{name: x, results: [{value: 1.5, date: 2024-01-31}]}]
---
# Whisper
"""


class Corpus:
    """Good files under `root`, and the targets that read mutated ones. `header`: where a file's meaning is."""

    def __init__(self, root: Path) -> None:
        self.root = root
        family = tiny.family(root / "in", ("ca",))
        self.base = family["base"]
        self._state = self._read(family["ca"])
        expert = decompose(family["base"], family["ca"], root / "ca.lors.safetensors", name="ca").path
        gaps = decompose(
            family["base"], family["ca"], root / "gaps.lors.safetensors", density=0.05, index="gaps", remainder="int8"
        ).path
        lors.merge(family["base"], {"ca": expert}, root / "merged")
        self._updates = {path: self._parts(Path(path)) for path in (expert, gaps)}
        self._adapter_state, adapter = adapter_of(family["base"])
        index = {"metadata": {}, "weight_map": dict.fromkeys(self._state, "a.safetensors")}
        config = (family["base"] / "config.json").read_bytes()
        recipe = Path(__file__).parents[3] / "examples" / "filters.yml"
        trial = {"method": "lors", "number": 0, "settings": {"rank": 1}, "state": "complete", "values": [1.0]}
        checkpoint = (family["ca"] / "model.safetensors").read_bytes()
        self.seeds: dict[str, list[tuple[bytes, int | None]]] = {
            "checkpoint": [(checkpoint, 8 + int.from_bytes(checkpoint[:8], "little"))],
            "expert": [
                (data, 8 + int.from_bytes(data[:8], "little"))
                for data in (Path(p).read_bytes() for p in (expert, gaps))
            ],
            "recipe": [(recipe.read_bytes(), None)],
            "ledger": [((root / "merged" / "lors_ledger.json").read_bytes(), None)],
            "trials": [(json.dumps(trial).encode() + b"\n", None)],
            "index": [(json.dumps(index).encode(), None)],
            "torch": [(data, None) for data in archives()],
            "nemo": [(data, None) for data in nemo_archives()],
            **{key: [((UNION / f"{name}.json").read_bytes(), None)] for key, name in UNITED.items()},
            "sealed": [(Path(path).read_bytes(), None) for path in (expert, gaps)],
            "adapter": [(json.dumps(adapter).encode(), None)],
            "config": [(config, None)],
            "card": [(CARD, 200)],
            "manifest": [(b"id\taudio\tlanguage\tsplit\ttext\ttranslation\na\ta.wav\tca\tdev\thola\thello\n", None)],
        }
        self.targets: dict[str, Callable[[bytes], None]] = {
            name: getattr(self, f"_{name}", None) or partial(self._united, name) for name in self.seeds
        }
        self.mutators: dict[str, Callable[[bytes, int, int | None], bytes]] = {
            **dict.fromkeys(self.seeds, mutate),
            **dict.fromkeys(("ledger", "trials", "index", "adapter", "config", *UNITED), swapped),
            "torch": repickled,
            "sealed": resealed,
        }

    def file(self, name: str, data: bytes) -> Path:
        path = self.root / name
        path.write_bytes(data)
        return path

    @staticmethod
    def _read(path: Path) -> dict[str, np.ndarray]:
        with open_checkpoint(path) as checkpoint:
            return {name: checkpoint.read(name) for name in checkpoint.tensors}

    def _parts(self, path: Path) -> dict[str, np.ndarray]:
        source = open_expert(path)
        with source.checkpoint:
            return {name: source.update(name) for name in source.tensors}

    def _checkpoint(self, data: bytes) -> None:
        """Reads what the header says; data bytes are the caller's own."""
        with open_checkpoint(self.file("mutant.safetensors", data)) as checkpoint:
            for name, info in checkpoint.tensors.items():
                assert info.nbytes <= len(data)
                if not info.packed:
                    assert checkpoint.read(name).nbytes == info.nbytes

    def _expert(self, data: bytes) -> None:
        """A file that is accepted says exactly what a good one said: every bit is under a checksum."""
        found = self._parts(self.file("mutant.lors.safetensors", data))
        for good in self._updates.values():
            if found.keys() == good.keys() and all(np.array_equal(found[name], good[name]) for name in good):
                return
        raise AssertionError("a damaged expert file was read as something else")

    def _sealed(self, data: bytes) -> None:
        """A file whose checksums are right may hold anything: what it does not refuse is merged and decomposed."""
        path = self.file("sealed.lors.safetensors", data)
        with open_expert(path).checkpoint:
            pass
        merge_in_memory(self.base, {"x": path}, rank=1, density=0.01, threads=1)
        merge_in_memory(self.base, {"x": path}, "task_arithmetic", threads=1)

    def _torch(self, data: bytes) -> None:
        with open_checkpoint(self.file("mutant.pt", data)) as checkpoint:
            assert sum(info.nbytes for info in checkpoint.tensors.values()) <= 16 * len(data)
            layers.positions(checkpoint.tensors)
            for name, info in checkpoint.tensors.items():
                assert checkpoint.read(name).nbytes == info.nbytes
            json.dumps(checkpoint.dims)

    def _nemo(self, data: bytes) -> None:
        with open_checkpoint(self.file("mutant.nemo", data)) as checkpoint:
            for name, extent in (checkpoint.archive or {}).items():
                assert (
                    not name.startswith("/") and ".." not in name.split("/") and extent.start + extent.size <= len(data)
                )
            for name, info in checkpoint.tensors.items():
                assert checkpoint.read(name).nbytes == info.nbytes

    def _united(self, name: str, data: bytes) -> None:
        """A model with a mutated file that says which tokens it has, merged by token, as the base and as the expert."""
        home = self.root / f"united-{name}"
        if not home.exists():
            shutil.copytree(UNION, home)
        (home / f"{UNITED[name]}.json").write_bytes(data)
        for pair in ((UNION, home), (home, UNION)):
            with open_checkpoint(pair[0]) as base, open_checkpoint(pair[1]) as expert:
                alignment = align(base, [expert], tables_of(base))
                for text in documents(alignment, (base, expert), base.sidecars()).values():
                    json.loads(text)

    def _adapter(self, data: bytes) -> None:
        home = self.root / "adapter"
        if not home.exists():
            home.mkdir()
            save_file(self._adapter_state, home / "adapter_model.safetensors")
        (home / "adapter_config.json").write_bytes(data)
        with open_checkpoint(self.base) as base, open_checkpoint(home) as checkpoint:
            source = source_of(checkpoint, base)
            for name, spec in source.tensors.items():
                assert np.isfinite(source.fetch(name, 0, spec.numel, Slot()).astype(np.float32)).all()

    def _config(self, data: bytes) -> None:
        home = self.root / "configured"
        home.mkdir(exist_ok=True)
        (home / "config.json").write_bytes(data)
        if not (home / "model.safetensors").exists():
            (home / "model.safetensors").write_bytes(self.seeds["checkpoint"][0][0])
        with open_checkpoint(home) as checkpoint:
            layers.select(checkpoint.tensors, "other", checkpoint.config)
            assert checkpoint.head_is_tied in (True, False)

    def _card(self, data: bytes) -> None:
        carried, _ = carried_over(self.file("base.md", data))
        self._write_card(Ledger.load(self.root / "merged"), carried)

    def _write_card(self, ledger: Ledger, carried: dict[str, Any]) -> None:
        import yaml

        write_card(
            self.root, base=ledger.base, experts=ledger.experts, method="lors", parameters={}, recipe="a: b", backend="cpu",
            carried=carried,
        )  # fmt: skip
        text = (self.root / "README.md").read_text(encoding="utf-8")
        _, header, _ = text.split("---\n", 2)
        assert isinstance(yaml.safe_load(header), dict)

    def _recipe(self, data: bytes) -> None:
        Recipe.load(self.file("mutant.yml", data), SPECS)

    def _ledger(self, data: bytes) -> None:
        self.file("lors_ledger.json", data)
        ledger = Ledger.load(self.root)
        self._write_card(ledger, {})
        source = open_expert(self.root / "gaps.lors.safetensors", "new")
        with source.checkpoint:
            _addition(_recipe(self.root / "merged"), ledger, source, "x", None)

    def _trials(self, data: bytes) -> None:
        self.file("trials.jsonl", data)
        load_trials(self.root)

    def _index(self, data: bytes) -> None:
        home = self.root / "sharded"
        home.mkdir(exist_ok=True)
        (home / "model.safetensors.index.json").write_bytes(data)
        if not (home / "a.safetensors").exists():
            (home / "a.safetensors").write_bytes(self.seeds["checkpoint"][0][0])
        open_checkpoint(home).close()

    def _manifest(self, data: bytes) -> None:
        from lors.speech.data.corpus import load_corpus

        load_corpus(self.file("manifest.tsv", data), languages=["ca"], split="dev")


def survives(target: Callable[[bytes], None], data: bytes) -> bool:
    """True when the bytes were accepted, False when they were refused properly; anything else is raised."""
    try:
        target(data)
    except LorsError as error:
        assert "\n" not in str(error) and 0 < len(str(error)) < 2000, str(error)[:300]
        return False
    return True


def adapter_of(base: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A LoRA of two matrices: its tensors, and its configuration with every key that is read."""
    rng, state = np.random.default_rng(0), {}
    modules = ("model.encoder.layers.0.self_attn.q_proj", "model.decoder.layers.1.fc1")
    for module in modules:
        m, n = tiny.shapes()[f"{module}.weight"]
        state[f"base_model.model.{module}.lora_A.weight"] = rng.standard_normal((3, n)).astype(np.float32)
        state[f"base_model.model.{module}.lora_B.weight"] = rng.standard_normal((m, 3)).astype(np.float32)
    config = {
        "peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 4, "use_rslora": False,
        "fan_in_fan_out": False, "rank_pattern": {"q_proj": 3, "layers.1.fc1": 3}, "alpha_pattern": {"fc1": 1.5},
        "target_modules": ["q_proj", "fc1"], "use_dora": False, "layer_replication": None, "modules_to_save": None,
    }  # fmt: skip
    return state, config


def nemo_archives() -> Iterator[bytes]:
    """A torch archive in a tar file of each form."""
    import tarfile

    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w:", format=form) as tar:
            for name, content in (("./model_config.yaml", b"a: 1\n"), ("./model_weights.ckpt", next(archives()))):
                info = tarfile.TarInfo(name)
                info.size, info.mtime = len(content), 1.5
                tar.addfile(info, io.BytesIO(content))
        yield stream.getvalue()


def archives() -> Iterator[bytes]:
    """Torch archives: one as openai-whisper's, one of a state dict with all that torch writes."""
    import torch

    state: Any = torch.nn.Linear(3, 2).half().state_dict()
    state["encoder.blocks.0.attn.query.weight"] = torch.arange(12.0).reshape(3, 4)[1:]
    state["parameter"] = torch.nn.Parameter(torch.ones(2))
    state["f8"] = torch.ones(3).to(torch.float8_e4m3fn)
    for content in ({"dims": {"n_mels": 80, "n_vocab": 51865}, "model_state_dict": state}, state):
        for protocol in (2, 4):
            stream = io.BytesIO()
            torch.save(content, stream, pickle_protocol=protocol)
            yield stream.getvalue()
    yield pickles.archived("x", pickles.state(a=pickles.tensor(), b=pickles.tensor((2, 2), (2, 1))))
