"""From the stages' files to the numbers of the report: ``results.json``."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...public import public, public_text
from ..data.left_out import LeftOut
from ..scoring.metrics import Interval, Statistics, numbered, paired_bootstrap, share_of_gain
from .config import Config

__all__ = ["METRIC", "summarise"]

METRIC = {"transcribe": "wer", "translate": "bleu"}
_RANKS = (1, 2, 4, 8, 16)
_SPECTRA_MATRICES = 16  # per expert, spread over the depth: enough for a mean, seconds for a large model

Cell = tuple[str, str]  # task, language


@dataclass(frozen=True)
class Tested:
    """One model of one seed on the test set."""

    scores: dict[Cell, dict[str, Any]]
    statistics: dict[Cell, Statistics]

    @classmethod
    def read(cls, directory: Path) -> Tested:
        import numpy as np

        scores = {(s["task"], s["language"]): s for s in json.loads((directory / "scores.json").read_text("utf-8"))}
        counted: dict[Cell, list[dict[str, Any]]] = {}
        for line in (directory / "answers.jsonl").read_text("utf-8").splitlines():
            row = json.loads(line)
            counted.setdefault((row["task"], row["language"]), []).append(row)
        sums = {}
        for cell, rows in counted.items():
            bleu = None if rows[0]["bleu"] is None else np.array([row["bleu"] for row in rows])
            errors, words = np.array([r["errors"] for r in rows]), np.array([r["words"] for r in rows])
            sums[cell] = Statistics(errors, words, bleu, numbered([r.get("speaker") for r in rows]))
        return cls(scores, sums)

    def only(self, cells: Sequence[Cell]) -> Tested:
        return Tested({c: self.scores[c] for c in cells}, {c: self.statistics[c] for c in cells})


def summarise(config: Config, stages: Mapping[str, Path]) -> dict[str, Any]:
    """Everything the report shows, as plain data."""
    tested = _tested(config, stages)
    result = {
        "name": config.name,
        "config": config.model_dump(mode="json") | {"base": public(config.base)},
        "versions": _versions(),
        "machine": {"os": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count(), "commit": _commit()},
        "signatures": _signatures(tested["base"]),
        "utterances": {"/".join(c): s["utterances"] for c, s in _first(tested["base"]).scores.items()},
        "dropped": sum(s["dropped"] for s in _first(tested["base"]).scores.values()),
        "left_out": _left_out(stages["test-base"]),
        "models": {label: _model(config, runs, tested) for label, runs in tested.items()},
        "comparisons": _comparisons(config, tested),
        "grids": {label: _grid(config, label, stages) for label in config.grids},
        "spectra": _spectra(config, stages),
    }
    reference = stages.get(f"test-lors-s{config.seeds[0]}")
    if reference is not None:
        result["reference"] = json.loads((reference / "reference.json").read_text("utf-8"))
    return result


def _left_out(directory: Path) -> dict[str, Any]:
    """Of the test split; stages from before it was counted ended at the first."""
    file = directory / "left_out.json"
    return dict(json.loads(public_text(file.read_text("utf-8")))) if file.exists() else asdict(LeftOut())


def _tested(config: Config, stages: Mapping[str, Path]) -> dict[str, dict[int, Tested]]:
    """label -> seed -> test results; "own expert" takes each language's answers from that language's expert."""
    base = Tested.read(stages["test-base"])
    found: dict[str, dict[int, Tested]] = {"base": dict.fromkeys(config.seeds, base)}
    labels = [*config.grids]
    labels += ["multi_task"] * (config.multi_task_steps is not None)
    labels += ["sequential"] * (config.sequential_steps is not None)
    for label in labels:
        found[label] = {seed: Tested.read(stages[f"test-{label}-s{seed}"]) for seed in config.seeds}
    own: dict[int, Tested] = {}
    for language in config.experts:
        runs = {seed: Tested.read(stages[f"test-expert-{language}-s{seed}"]) for seed in config.seeds}
        found[f"expert {language}"] = runs
        for seed, run in runs.items():
            part = run.only([(task, language) for task in config.tasks])
            before = own.get(seed, Tested({}, {}))
            own[seed] = Tested({**before.scores, **part.scores}, {**before.statistics, **part.statistics})
    return {"base": found.pop("base"), "own expert": own, **found}


def _first(runs: Mapping[int, Tested]) -> Tested:
    return next(iter(runs.values()))


def _model(config: Config, runs: Mapping[int, Tested], tested: Mapping[str, Mapping[int, Tested]]) -> dict[str, Any]:
    others = [language for language in config.languages if language not in config.experts]
    cells = {
        "/".join(cell): {
            name: _mean([run.scores[cell][name] for run in runs.values()])
            for name in ("wer", "wer_raw", "cer", "bleu", "chrf")
            if _first(runs).scores[cell][name] is not None
        }
        for cell in _first(runs).scores
    }
    groups = {}
    for task in config.tasks:
        for group, languages in (("experts", config.experts), ("others", others)):
            values = [_group(run, task, languages) for run in runs.values()] if languages else [None]
            if None not in values:
                groups[f"{task}/{group}"] = _spread([v for v in values if v is not None])
    return {"cells": cells, "means": groups, "normalised": _normalised(config, runs, tested)}


def _group(run: Tested, task: str, languages: Iterable[str]) -> float | None:
    cells = [(task, language) for language in languages]
    if any(cell not in run.scores for cell in cells):
        return None
    return _mean([run.scores[cell][METRIC[task]] for cell in cells])


def _normalised(
    config: Config, runs: Mapping[int, Tested], tested: Mapping[str, Mapping[int, Tested]]
) -> dict[str, Any]:
    """Mean over the tasks of what the model gained over the base, summed over the experts' languages, as a share of what
    each language's own expert gained; 1 is as good as every single expert. `flat`: cells in which the expert gained nothing,
    or lost; they count like any other.
    """
    import numpy as np

    cells = [(task, language) for task in config.tasks for language in config.experts]
    flat = {
        "/".join(cell)
        for cell in cells
        for seed in runs
        if _gain(tested["base"][seed].scores[cell], tested["own expert"][seed].scores[cell], METRIC[cell[0]]) <= 0
    }
    shares = []
    for task in config.tasks:
        base, own, model = (
            _of_task(side, task, config.experts, runs) for side in (tested["base"], tested["own expert"], runs)
        )
        shares.append(share_of_gain(base, own, model, METRIC[task]))
    means = [_mean([share.seeds[i] for share in shares]) for i in range(len(runs))]
    low, high = Interval.ends(np.mean([share.draws for share in shares], axis=0))
    return {**_spread(means), "low": low, "high": high, "flat": sorted(flat)}


def _of_task(
    side: Mapping[int, Tested], task: str, languages: Sequence[str], seeds: Iterable[int]
) -> list[dict[str, Statistics]]:
    """Language -> statistics, for each training."""
    return [{language: side[seed].statistics[task, language] for language in languages} for seed in seeds]


def _gain(base: Mapping[str, Any], own: Mapping[str, Any], metric: str) -> float:
    """What the expert is better by."""
    difference = float(own[metric] - base[metric])
    return -difference if metric == "wer" else difference


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _spread(values: list[float]) -> dict[str, Any]:
    return {"mean": _mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None, "seeds": values}


def _comparisons(config: Config, tested: Mapping[str, Mapping[int, Tested]]) -> dict[str, Any]:
    """Each merge minus `against`: intervals over utterances, over utterances and seeds, and the seeds one by one."""
    compared = {}
    for label in config.grids:
        if label == config.against:
            continue
        pair = tested[label], tested[config.against]
        compared[label] = {task: _comparison(config, *pair, task) for task in config.tasks}
    return compared


def _comparison(config: Config, runs: Mapping[int, Tested], others: Mapping[int, Tested], task: str) -> dict[str, Any]:
    first, second = (_of_task(side, task, config.experts, config.seeds) for side in (runs, others))
    metric, cells = METRIC[task], [(task, language) for language in config.experts]
    differences = [
        _mean([runs[seed].scores[cell][metric] - others[seed].scores[cell][metric] for cell in cells])
        for seed in config.seeds
    ]
    return {
        "metric": metric,
        **asdict(paired_bootstrap(first, second, metric)),
        "seeds": _spread(differences),
    }


def _grid(config: Config, label: str, stages: Mapping[str, Path]) -> dict[str, Any]:
    searches = [json.loads((stages[f"dev-{label}-s{seed}"] / "grid.json").read_text("utf-8")) for seed in config.seeds]
    tried = [
        {"setting": records[0]["setting"], **_spread([record["wer"] for record in records])}
        for records in zip(*(search["grid"] for search in searches), strict=True)
    ]
    chosen = [
        {"seed": seed, "setting": search["best"]["setting"], "wer": search["best"]["wer"]}
        for seed, search in zip(config.seeds, searches, strict=True)
    ]
    rest = [{"setting": r["setting"], "wer": r["wer"]} for r in searches[0]["rest"]]
    return {"tried": tried, "chosen": chosen, "rest": rest}


def _signatures(runs: Mapping[int, Tested]) -> dict[str, str]:
    scores = [s for s in _first(runs).scores.values() if s["bleu_signature"]]
    return {"bleu": scores[0]["bleu_signature"], "chrf": scores[0]["chrf_signature"]} if scores else {}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("lors-merging", "torch", "transformers", "jiwer", "sacrebleu", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _commit() -> str | None:
    """Of the code that sums up, where it runs from its repository; the stages may be older."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent.parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _spectra(config: Config, stages: Mapping[str, Path]) -> dict[str, Any]:
    """Per expert of the first seed: share of |delta|^2 in r triplets, sigma_{r+1} / sigma_r, share in matrices."""
    import numpy as np

    from ...checkpoints.layers import decomposed
    from ...checkpoints.reader import open_checkpoint
    from ..model.whisper import resolve_model

    spectra = {}
    with open_checkpoint(resolve_model(config.base)) as base:
        matrices = sorted(decomposed({n: t.shape for n, t in base.tensors.items()}, base.naming, base.config))
        sampled = matrices[:: max(1, len(matrices) // _SPECTRA_MATRICES)]
        for language in config.experts:
            with open_checkpoint(stages[f"expert-{language}-s{config.seeds[0]}"] / "model") as expert:

                def delta(name: str, expert: Any = expert) -> Any:
                    return expert.read(name).astype(np.float32) - base.read(name).astype(np.float32)

                energy = {name: float(np.square(delta(name)).sum()) for name in base.tensors}
                values = [np.linalg.svd(delta(n).reshape(base.tensors[n].shape), compute_uv=False) for n in sampled]
            kept = [np.cumsum(v**2) / np.sum(v**2) for v in values if v.any()]
            ratios = [v[1:] / v[:-1] for v in values if v.any()]
            spectra[language] = {
                "energy": {str(r): float(np.mean([k[r - 1] for k in kept])) for r in _RANKS if r <= len(values[0])},
                "ratio": {str(r): float(np.mean([q[r - 1] for q in ratios])) for r in _RANKS if r < len(values[0])},
                "matrices_share": sum(energy[name] for name in matrices) / (sum(energy.values()) or 1.0),
            }
    return spectra
