"""What is fuzzed: each target takes bytes, and either returns or raises LorsError of one line. Anything else is a fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tiny

import lors
from lors.checkpoint import open_checkpoint
from lors.errors import LorsError
from lors.ledger import Ledger
from lors.methods import SPECS
from lors.recipe import Recipe
from lors.sweep import _load_trials
from lors.task_vector import decompose, open_expert

__all__ = ["Corpus"]


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
        recipe = Path(__file__).parents[2] / "examples" / "filters.yml"
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
            "index": [
                (json.dumps({"metadata": {}, "weight_map": dict.fromkeys(self._state, "a.safetensors")}).encode(), None)
            ],
            "manifest": [(b"id\taudio\tlanguage\tsplit\ttext\ttranslation\na\ta.wav\tca\tdev\thola\thello\n", None)],
        }
        self.targets: dict[str, Callable[[bytes], None]] = {name: getattr(self, f"_{name}") for name in self.seeds}

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

    def _recipe(self, data: bytes) -> None:
        Recipe.load(self.file("mutant.yml", data), SPECS)

    def _ledger(self, data: bytes) -> None:
        self.file("lors_ledger.json", data)
        Ledger.load(self.root)

    def _trials(self, data: bytes) -> None:
        self.file("trials.jsonl", data)
        _load_trials(self.root)

    def _index(self, data: bytes) -> None:
        home = self.root / "sharded"
        home.mkdir(exist_ok=True)
        (home / "model.safetensors.index.json").write_bytes(data)
        if not (home / "a.safetensors").exists():
            (home / "a.safetensors").write_bytes(self.seeds["checkpoint"][0][0])
        open_checkpoint(home).close()

    def _manifest(self, data: bytes) -> None:
        from lors.speech.corpus import load_corpus

        load_corpus(self.file("manifest.tsv", data), languages=["ca"], split="dev")


def survives(target: Callable[[bytes], None], data: bytes) -> bool:
    """True when the bytes were accepted, False when they were refused properly; anything else is raised."""
    try:
        target(data)
    except LorsError as error:
        assert "\n" not in str(error) and 0 < len(str(error)) < 2000, str(error)[:300]
        return False
    return True
