"""What a sweep is made from, file by file and by digest: trials of one sweep come from the same bytes or not at all.

`of` hashes everything when a sweep begins, `record` is kept in sweep.json, `require_recorded` compares the two when it
goes on. `require_unchanged` looks at the files again before a score is kept.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.reader import Checkpoint, open_checkpoint
from ..errors import LorsError
from ..files.digest import sha256_file, sha256_files
from ..public import public
from ..recipes.recipe import Recipe

__all__ = ["BASE", "Inputs"]

BASE, SCORER = "the base", "the scorer's data"
State = tuple[int, ...]


@dataclass
class Inputs:
    """Files of the base, of each expert and of the scorer.

    record: whose -> what the file is called -> SHA-256. paths: the same names -> where it lies here. weights: whose -> name of
    a weight file -> SHA-256, as expert files keep it.
    """

    record: dict[str, dict[str, str]]
    paths: dict[str, Path]
    weights: dict[str, dict[str, str]]
    _states: dict[Path, State]

    @classmethod
    def of(cls, recipe: Recipe, data: Path | None, threads: int | None = None) -> Inputs:
        """data: a file that the scorer reads."""
        named: dict[str, dict[str, Path]] = {}
        weights: dict[str, list[Path]] = {}
        for whose, source in _sources(recipe).items():
            with open_checkpoint(source) as checkpoint:
                named[whose] = {_called(checkpoint, path): path for path in _files(checkpoint)}
                weights[whose] = list(checkpoint.files)
        if data is not None:
            named[SCORER] = {str(data): data}
        paths = {name: path for files in named.values() for name, path in files.items()}
        states = {path: _state(path) for path in paths.values()}  # before they are read
        digests = sha256_files(list(states), threads)
        record = {whose: {name: digests[path] for name, path in files.items()} for whose, files in named.items()}
        return cls(
            record, paths, {whose: {p.name: digests[p] for p in files} for whose, files in weights.items()}, states
        )

    def require_recorded(self, home: object, recorded: Any) -> None:
        """LorsError that names the first file that is not what sweep.json says."""
        if recorded == self.record:
            return
        before = recorded if isinstance(recorded, Mapping) else {}
        for whose in dict.fromkeys((*self.record, *before)):
            now, then = self.record.get(whose, {}), before.get(whose, {})
            if not isinstance(then, Mapping):
                break
            for name in dict.fromkeys((*now, *then)):
                if now.get(name) != then.get(name):
                    what = "is new" if name not in then else "is gone" if name not in now else "has changed"
                    raise LorsError(
                        f"{home}: {whose}: {name} {what} since this sweep began; put back what was there, or use a new directory"
                    )
        raise LorsError(f"{home}: sweep.json: expected digests of the inputs; use a new directory")

    def require_unchanged(self) -> None:
        """LorsError when a file is not what it was at the beginning; what was only touched or linked is."""
        for whose, files in self.record.items():
            for name, digest in files.items():
                path = self.paths[name]
                state = _state(path)
                if state == self._states[path]:
                    continue
                if sha256_file(path) != digest:
                    raise LorsError(f"{whose}: {name} changed during the sweep; what was scored before it is kept")
                self._states[path] = state


def _sources(recipe: Recipe) -> dict[str, str]:
    """Whose -> where."""
    experts = {f"expert {recipe.labels[index]!r}": recipe.sources[index] for index in recipe.experts}
    return experts if recipe.base_source is None else {BASE: str(recipe.base_source), **experts}


def _files(checkpoint: Checkpoint) -> list[Path]:
    """Weights, and what lies beside them and becomes part of a merge."""
    adapter = checkpoint.path / "adapter_config.json"
    return [*checkpoint.files, *checkpoint.sidecars(), *([adapter] if adapter.is_file() else [])]


def _called(checkpoint: Checkpoint, path: Path) -> str:
    """The same on every machine, where a file came from a URL or the hub."""
    origin = public(checkpoint.url) if checkpoint.url else checkpoint.hub_id
    return f"{origin}/{path.name}" if origin else str(path.absolute())


def _state(path: Path) -> State:
    try:
        status = os.stat(path)
    except OSError as error:
        raise LorsError(f"cannot read {path}: {error.strerror or error}") from error
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
