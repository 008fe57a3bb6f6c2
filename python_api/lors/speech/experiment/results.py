"""From answers to the numbers of the report, ``results.json``: from the stages, or again from the answers alone."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...public import public, public_text
from ..data.left_out import LeftOut
from ..scoring.metrics import Interval, Statistics, holm, numbered, paired_bootstrap, score, share_of_gain
from .answers import Answers, Rows, read_stage
from .config import Config
from .criterion import METRIC
from .spectra import spectra
from .tried import spread, tried

__all__ = ["summarise", "summarise_again"]

Cell = tuple[str, str]  # task, language


@dataclass(frozen=True)
class Tested:
    """One model of one seed on the test set."""

    scores: dict[Cell, dict[str, Any]]
    statistics: dict[Cell, Statistics]

    @classmethod
    def read(cls, directory: Path) -> Tested:
        """What a stage counted when it answered."""
        import numpy as np

        scores = {(s["task"], s["language"]): s for s in json.loads((directory / "scores.json").read_text("utf-8"))}
        sums = {}
        for cell, rows in _by_cell(read_stage(directory)).items():
            bleu = None if rows[0]["bleu"] is None else np.array([row["bleu"] for row in rows])
            errors, words = np.array([r["errors"] for r in rows]), np.array([r["words"] for r in rows])
            sums[cell] = Statistics(errors, words, bleu, numbered([r.get("speaker") for r in rows]))
        return cls(scores, sums)

    @classmethod
    def score(cls, rows: Rows, normaliser: str) -> Tested:
        """The same from the answers alone."""
        found = cls({}, {})
        for (task, language), cell in _by_cell(rows).items():
            summary, sums = score(
                [row["reference"] for row in cell], [row["hypothesis"] for row in cell],
                language=language if task == "transcribe" else "en", task=task, kind=normaliser,
            )  # fmt: skip
            found.scores[task, language] = asdict(summary)
            found.statistics[task, language] = replace(sums, speakers=numbered([row.get("speaker") for row in cell]))
        return found

    def only(self, cells: Sequence[Cell]) -> Tested:
        return Tested({c: self.scores[c] for c in cells}, {c: self.statistics[c] for c in cells})


def _by_cell(rows: Rows) -> dict[Cell, Rows]:
    cells: dict[Cell, Rows] = {}
    for row in rows:
        cells.setdefault((row["task"], row["language"]), []).append(row)
    return cells


def summarise(config: Config, stages: Mapping[str, Path]) -> dict[str, Any]:
    """Everything the report shows, as plain data."""
    recorded = {
        "left_out": _left_out(stages["test-base"]),
        "grids": {label: tried(config, label, stages) for label in config.grids},
        "spectra": spectra(config, stages),
    }
    reference = stages.get(f"test-lors-s{config.seeds[0]}")
    if reference is not None:
        recorded["reference"] = json.loads((reference / "reference.json").read_text("utf-8"))
    return _summary(config, lambda stage: Tested.read(stages[stage]), recorded)


def summarise_again(results: Mapping[str, Any], answers: Answers) -> dict[str, Any]:
    """The same from earlier results and the answers: what is computed from answers is computed again; what dev, the weights
    and the reference said is taken over."""
    config = Config(**results["config"])
    recorded = {name: results[name] for name in ("left_out", "grids", "spectra", "reference") if name in results}
    return _summary(config, lambda stage: Tested.score(answers.rows(stage), config.normaliser), recorded)


def _summary(config: Config, read: Callable[[str], Tested], recorded: Mapping[str, Any]) -> dict[str, Any]:
    tested = _tested(config, read)
    return {
        "name": config.name,
        "config": config.model_dump(mode="json") | {"base": public(config.base)},
        "versions": _versions(),
        "machine": {"os": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count(), "commit": _commit()},
        "signatures": _signatures(tested["base"]),
        "normaliser": config.normaliser,
        "units": {"/".join(c): s["unit"] for c, s in _first(tested["base"]).scores.items()},
        "utterances": {"/".join(c): s["utterances"] for c, s in _first(tested["base"]).scores.items()},
        "dropped": sum(s["dropped"] for s in _first(tested["base"]).scores.values()),
        "models": {label: _model(config, runs, tested) for label, runs in tested.items()},
        "comparisons": _comparisons(config, tested),
        **recorded,
    }


def _left_out(directory: Path) -> dict[str, Any]:
    """Of the test split; stages from before it was counted ended at the first."""
    file = directory / "left_out.json"
    return dict(json.loads(public_text(file.read_text("utf-8")))) if file.exists() else asdict(LeftOut())


def _tested(config: Config, read: Callable[[str], Tested]) -> dict[str, dict[int, Tested]]:
    """label -> seed -> test results; "own expert" takes each answer from the expert of that language (and task)."""
    base = read("test-base")
    found: dict[str, dict[int, Tested]] = {"base": dict.fromkeys(config.seeds, base)}
    labels = [*config.grids]
    labels += ["multi_task"] * (config.multi_task_steps is not None)
    labels += ["sequential"] * (config.sequential_steps is not None)
    for label in labels:
        found[label] = {seed: read(f"test-{label}-s{seed}") for seed in config.seeds}
    own: dict[int, Tested] = {}
    for expert in config.trained():
        runs = {seed: read(f"test-expert-{expert.name}-s{seed}") for seed in config.seeds}
        found[f"expert {expert.name}"] = runs
        for seed, run in runs.items():
            part = run.only([(task, expert.language) for task in expert.tasks])
            before = own.get(seed, Tested({}, {}))
            own[seed] = Tested({**before.scores, **part.scores}, {**before.statistics, **part.statistics})
    return {"base": found.pop("base"), "own expert": own, **found}


def _first(runs: Mapping[int, Tested]) -> Tested:
    return next(iter(runs.values()))


def _model(config: Config, runs: Mapping[int, Tested], tested: Mapping[str, Mapping[int, Tested]]) -> dict[str, Any]:
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
        for group, languages in _groups(config).items():
            values = [_group(run, task, languages) for run in runs.values()]
            if None not in values:
                groups[f"{task}/{group}"] = spread([v for v in values if v is not None])
    return {"cells": cells, "means": groups, "normalised": _normalised(config, runs, tested)}


def _groups(config: Config) -> dict[str, Sequence[str]]:
    """The languages with an expert, and those without, if any."""
    others = [language for language in config.languages if language not in config.experts]
    return {"experts": config.experts} | ({"others": others} if others else {})


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
    return {**spread(means), "low": low, "high": high, "flat": sorted(flat)}


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


def _comparisons(config: Config, tested: Mapping[str, Mapping[int, Tested]]) -> list[dict[str, Any]]:
    """Each merge minus `against`, for each task and group of languages: intervals over utterances, over utterances and seeds,
    the seeds one by one, and p, also corrected for the number of all these comparisons (Holm)."""
    rows = []
    for label in config.grids:
        if label == config.against:
            continue
        for task in config.tasks:
            for group, languages in _groups(config).items():
                sides = tested[label], tested[config.against]
                about = {"merge": label, "task": task, "group": group, "metric": METRIC[task]}
                rows.append(about | _comparison(config, *sides, task, languages))
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p
    return rows


def _comparison(
    config: Config, runs: Mapping[int, Tested], others: Mapping[int, Tested], task: str, languages: Sequence[str]
) -> dict[str, Any]:
    first, second = (_of_task(side, task, languages, config.seeds) for side in (runs, others))
    metric, cells = METRIC[task], [(task, language) for language in languages]
    differences = [
        _mean([runs[seed].scores[cell][metric] - others[seed].scores[cell][metric] for cell in cells])
        for seed in config.seeds
    ]
    return {**asdict(paired_bootstrap(first, second, metric)), "seeds": spread(differences)}


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
