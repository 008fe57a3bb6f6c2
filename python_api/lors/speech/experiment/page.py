"""``report.html``: what an experiment found, in words, drawings and tables, on one page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...pages import charts, colours, html
from ..data.left_out import LeftOut
from .criterion import CRITERIA, METRIC, Criterion
from .shown import ALPHA, UNIT, edges, interval, named, plus_minus, verdict

__all__ = ["findings", "page"]

_OTHERS = ("multi_task", "sequential")  # models that are trained for all languages at once
_GROUPS = {"experts": "languages with an expert", "others": "languages without one"}


def page(results: Mapping[str, Any]) -> str:
    config = results["config"]
    lead = (
        f"Base {config['base']}; {len(config['experts'])} experts{_each(config)} ({', '.join(config['experts'])}); "
        f"{len(config['languages'])} languages tested; seeds {', '.join(map(str, config['seeds']))}."
    )
    sections = [
        html.findings(findings(results)),
        *(_task(results, task) for task in config["tasks"]),
        _normalised(results),
        *_comparisons(results),
        *_grids(results),
        *_rest(results),
        *_spectra(results),
        _setting(results),
        _reading(results),
    ]
    return html.page(f"Merging experiment {config['name']}", lead, sections)


def findings(results: Mapping[str, Any]) -> list[str]:
    """What stands out, in sentences, the conclusion first."""
    config, models = results["config"], results["models"]
    shares = {label: models[label]["normalised"] for label in results["grids"]}
    if not shares:
        return ["No merge was tried."]
    best = max(shares, key=lambda label: shares[label]["mean"])
    share = shares[best]
    found = [
        f"{named(results, best)} keeps most: {share['mean']:.2f} ({share['low']:.2f} to {share['high']:.2f}) of what each "
        "language's own expert gains over the base."
    ]
    for task in config["tasks"]:
        means = {label: models[label]["means"].get(f"{task}/experts") for label in ("base", best, "own expert")}
        told = ", ".join(f"{named(results, label)} {mean['mean']:.1f}" for label, mean in means.items() if mean)
        found.append(f"{METRIC[task].upper()} of {task}, mean of the languages with an expert: {told}.")
    if results["comparisons"]:
        found.append(f"Against {config['against']}, after Holm's correction: {_outcomes(results)}.")
    if beyond := edges(results):
        found.append(f"{len(beyond)} choices on dev lie at the edge of what was tried; a better one may lie beyond.")
    if reference := results.get("reference"):
        found.append(
            f"The merge by the fast kernels and by the reference gave different words in {reference['differing']} of "
            f"{reference['utterances']} test answers."
        )
    return found


def _outcomes(results: Mapping[str, Any]) -> str:
    groups: dict[str, list[str]] = {}
    for c in results["comparisons"]:
        where = f"{c['task']}{'' if c['group'] == 'experts' else ', ' + _GROUPS['others']}"
        groups.setdefault(verdict(c), []).append(f"{named(results, c['merge'])} ({where})")
    told = [f"{what} {', '.join(groups[what])}" for what in ("better", "worse") if what in groups]
    rest = len(results["comparisons"]) - sum(len(groups.get(what, ())) for what in ("better", "worse"))
    return "; ".join([*told, f"{rest} of {len(results['comparisons'])} comparisons without a difference beyond chance"])


def _styles(results: Mapping[str, Any]) -> dict[str, colours.Style]:
    grids = results["config"]["grids"]
    methods = {label: grids[label]["method"] if label in grids else label for label in results["grids"]}
    return colours.of_methods(
        {"base": "base", "own expert": "own expert", **methods, **dict(zip(_OTHERS, _OTHERS, strict=True))}
    )


def _ranked(results: Mapping[str, Any], task: str, group: str) -> list[str]:
    """The models without the single experts, the best first; for BLEU more is better, for WER less."""
    means = {
        label: model["means"][f"{task}/{group}"]["mean"]
        for label, model in results["models"].items()
        if not label.startswith("expert ") and model["means"].get(f"{task}/{group}")
    }
    return sorted(means, key=lambda label: means[label], reverse=METRIC[task] == "bleu")


def _task(results: Mapping[str, Any], task: str) -> html.Section:
    drawn = "".join(_bars(results, task, group) for group in _groups(results))
    body = (
        f'<div class="beside"><div>{drawn}</div><div>{_heat(results, task)}</div></div>',
        html.note(
            "“own expert” answers each language with the expert of that language. ± and whiskers are the standard deviation "
            "over seeds. The stronger the shade, the greater the number; underlined is the best merge of a language."
        ),
    )
    return html.section(task, f"Test: {task} ({UNIT[task]})", *body)


def _groups(results: Mapping[str, Any]) -> list[str]:
    config = results["config"]
    return ["experts", *(["others"] if set(config["languages"]) - set(config["experts"]) else [])]


def _bars(results: Mapping[str, Any], task: str, group: str) -> str:
    styles, rows = _styles(results), {}
    for label in _ranked(results, task, group):
        mean = results["models"][label]["means"][f"{task}/{group}"]
        sd = mean["sd"] or 0.0
        ends = (mean["mean"] - sd, mean["mean"] + sd) if sd else (None, None)
        rows[named(results, label)] = charts.Bar(mean["mean"], plus_minus(mean), styles[label], *ends)
    unit = UNIT[task].split(";")[0]
    table = html.table(
        f"{unit}, {_GROUPS[group]}", ("model", "mean"), [(name, row.shown) for name, row in rows.items()]
    )
    return html.figure(f"{unit}, mean of the {_GROUPS[group]}", charts.bars(rows, unit), table)


def _heat(results: Mapping[str, Any], task: str) -> str:
    config, models = results["config"], results["models"]
    groups = _groups(results)
    single = [label for label in models if label.startswith("expert ")]
    rows = {}
    for label in (*_ranked(results, task, "experts"), *single):
        means = [models[label]["means"].get(f"{task}/{group}") for group in groups]
        cells = [models[label]["cells"].get(f"{task}/{code}", {}).get(METRIC[task]) for code in config["languages"]]
        rows[label] = [*(mean["mean"] if mean else None for mean in means), *cells]
    known = [value for row in rows.values() for value in row if value is not None]
    choose = max if METRIC[task] == "bleu" else min
    columns = zip(*(rows[label] for label in results["grids"] if label in rows), strict=True)
    best = [choose((v for v in column if v is not None), default=None) for column in columns]
    head = [*({"experts": "experts' mean", "others": "others' mean"}[group] for group in groups), *config["languages"]]
    strong = {named(results, label) for label in results["grids"]}
    named_rows = {named(results, label): row for label, row in rows.items()}
    span = (min(known, default=0.0), max(known, default=1.0))
    return html.heat_table(f"{task}: {UNIT[task]}", head, named_rows, "{:.1f}", span, best, strong)


def _normalised(results: Mapping[str, Any]) -> html.Section:
    models = {
        label: model["normalised"] for label, model in results["models"].items() if not label.startswith("expert ")
    }
    styles = _styles(results)
    order = sorted(models, key=lambda label: models[label]["mean"], reverse=True)
    rows = {
        named(results, label): charts.Bar(
            models[label]["mean"], plus_minus(models[label]), styles[label], models[label]["low"], models[label]["high"]
        )
        for label in order
    }
    table = html.table(
        "Normalised performance",
        ("model", "share", "95 %"),
        [(name, row.shown, f"{row.low:.2f} to {row.high:.2f}") for name, row in rows.items()],
    )
    flat = sorted({cell for model in models.values() for cell in model["flat"]})
    without = (
        f" Experts that gained nothing over the base, in at least one training: {', '.join(flat)}." if flat else ""
    )
    text = (
        "What the model gained over the base, summed over the experts' languages, as a share of what each language's own "
        "expert gained; mean over the tasks. 0 is the base, 1 is as good as a model for each language. The interval: speakers, "
        f"or utterances where the speakers are not known, drawn within each language; the trainings as they are.{without}"
    )
    drawn = html.figure("Share of the own experts' gain", charts.bars(rows, "share of the gain"), table)
    return html.section("normalised", "Normalised performance", html.note(text), html.charts([drawn]))


def _comparisons(results: Mapping[str, Any]) -> Iterator[html.Section]:
    if not results["comparisons"]:
        return
    against = results["config"]["against"]
    several = len(results["config"]["seeds"]) > 1
    head = ("merge", "task", "languages", "difference", "over utterances", *["over seeds too"] * several)
    rows = []
    for c in results["comparisons"]:
        difference = f"{c['difference']:+.2f} {c['metric'].upper()}"
        intervals = [interval(c), interval(c, "seeds_")] if several else [interval(c)]
        group = "with an expert" if c["group"] == "experts" else "without an expert"
        judged = [f"{c['p']:.2g}", f"{c['p_holm']:.2g}", verdict(c)]
        rows.append([named(results, c["merge"]), c["task"], group, difference, *intervals, *judged])
    text = (
        "95 % intervals of a paired bootstrap, means over the languages: test utterances drawn, then test utterances and seeds "
        "drawn. A few seeds make the second a rough figure, rather too narrow than too wide. p: from the wider of both; "
        f"Holm's correction is for the {len(rows)} comparisons of this table, and “better” and “worse” mean that it is "
        f"below {ALPHA}."
    )
    yield html.section(
        "against", f"Against {against}",
        html.charts(_differences(results, task, group) for task in results["config"]["tasks"] for group in _groups(results)),
        html.table(f"Differences to {against}", (*head, "p", "p (Holm)", "verdict"), rows), html.note(text),
    )  # fmt: skip


def _differences(results: Mapping[str, Any], task: str, group: str) -> str:
    styles, rows = _styles(results), {}
    found = [c for c in results["comparisons"] if (c["task"], c["group"]) == (task, group)]
    for c in sorted(found, key=lambda c: c["difference"], reverse=METRIC[task] == "bleu"):
        which = "" if c["seeds_low"] is None else "seeds_"
        ends = (c[f"{which}low"], c[f"{which}high"])
        rows[named(results, c["merge"])] = charts.Bar(
            c["difference"], f"{c['difference']:+.2f}", styles[c["merge"]], *ends
        )
    metric = METRIC[task].upper()
    caption = f"{metric} minus that of {results['config']['against']}, {_GROUPS[group]}"
    return html.figure(caption, charts.bars(rows, f"difference of {metric}, 95 %", zero=False), "#against")


def _grids(results: Mapping[str, Any]) -> Iterator[html.Section]:
    if not results["grids"]:
        return
    judge = CRITERIA[results["config"]["criterion"]]
    rows = []
    for label, grid in results["grids"].items():
        for record in sorted(grid["tried"], key=lambda r: r["mean"], reverse=judge.higher):
            seeds = [str(c["seed"]) for c in grid["chosen"] if c["setting"] == record["setting"]]
            rows.append([label, _words(record["setting"]), _value(judge, record), ", ".join(seeds)])
    table = html.table("Settings on dev", ("method", "setting", judge.called, "chosen by seed"), rows)
    found = edges(results)
    said = (
        f"{len(found)} choices lie at the edge of what was tried, and a better one may lie beyond: {'; '.join(found)}."
    )
    curves = _lambda_curves(results["grids"], judge)
    drawn = charts.lines(curves, _styles(results), "lambda", judge.called, log=True, zero=False)
    yield html.section(
        "dev", "What was tried on dev", html.note(said if found else "No choice lies at an edge."),
        html.charts([html.figure(f"{judge.called} over lambda, other parameters at their best", drawn, "#dev")] if curves else []),
        f"<details><summary>{len(rows)} settings</summary>{table}</details>",
    )  # fmt: skip


def _value(judge: Criterion, spread: Mapping[str, Any]) -> str:
    """Shares have three digits."""
    if not judge.relative:
        return plus_minus(spread)
    return f"{spread['mean']:.3f}" + (f" ± {spread['sd']:.3f}" if spread["sd"] is not None else "")


def _words(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{'lambda' if name == 'lam' else name} {value}" for name, value in setting.items()) or "–"


def _lambda_curves(grids: Mapping[str, Any], judge: Criterion) -> dict[str, list[tuple[float, float]]]:
    """The criterion over lambda, for each method the best of its other parameters at every lambda."""
    best_of = max if judge.higher else min
    curves = {}
    for label, grid in grids.items():
        best: dict[float, float] = {}
        for record in grid["tried"]:
            lam = record["setting"].get("lam")
            if isinstance(lam, (int, float)) and lam > 0:  # no list over the depth
                best[lam] = best_of(best.get(lam, record["mean"]), record["mean"])
        if len(best) > 1:
            curves[label] = sorted(best.items())
    return curves


def _rest(results: Mapping[str, Any]) -> Iterator[html.Section]:
    by = results["config"]["criterion"]
    rows = []
    for label, grid in results["grids"].items():
        if grid["rest"]:
            tried = [grid["chosen"][0], *grid["rest"]]
            rows += [[label, record["setting"]["rest"], f"{record[by]:.4g}"] for record in tried]
    if rows:
        text = (
            "Embeddings, convolutions, norms and biases merged by task arithmetic, averaged, or left at the base; each method "
            "at its best setting, first seed, dev. Methods that treat all tensors alike are not here."
        )
        table = html.table("Rules for them, on dev", ("method", "rest", CRITERIA[by].called), rows)
        yield html.section("rest", "The tensors that are not decomposed", table, html.note(text))


def _spectra(results: Mapping[str, Any]) -> Iterator[html.Section]:
    if not results["spectra"]:
        return
    first: Mapping[str, Any] = next(iter(results["spectra"].values()))
    head = ["expert", *(f"energy r={r}" for r in first["energy"]), *(f"σ(r+1)/σ(r) r={r}" for r in first["ratio"])]
    rows: dict[str, Sequence[float]] = {
        language: [*s["energy"].values(), *s["ratio"].values(), s["matrices_share"]]
        for language, s in results["spectra"].items()
    }
    text = (
        "Share of a matrix's |δ|² in its first r singular triplets and the ratio of neighbouring singular values, means over "
        "matrices; a ratio near 1 means that rank r cuts through a slope, not at a gap. Last column: how much of the whole "
        "|δ|² low rank and sparsity act on at all."
    )
    table = html.heat_table("Spectra of the experts", [*head[1:], "share of |δ|² in matrices"], rows, span=(0, 1))
    yield html.section("spectra", "Spectra of the task vectors", table, html.note(text))


# --- what was done -----------------------------------------------------------------------------------------------------


def _setting(results: Mapping[str, Any]) -> html.Section:
    config = results["config"]
    data = config["data"]
    speech = (
        f"synthetic speech (espeak-ng, condition {data['synth']['condition']}), {data['train']} training utterances per language"
        if data["synth"]
        else str(data["source"])
    )
    settings = {len(grid["tried"]) for grid in results["grids"].values()}
    text = (
        f"Data: {speech}. Tasks: {', '.join(config['tasks'])}. {sum(results['utterances'].values())} test answers per model, "
        f"{results['dropped']} empty references dropped{_without(results)}. Tensors that a method does not decompose: "
        f"{config['rest']}{_with_factor(config)}. Every method was tried with {' or '.join(map(str, sorted(settings)))} "
        f"settings on dev{_in_rounds(config)}, the best by {CRITERIA[config['criterion']].called} went to test, once.{_calibrated(config)}"
    )
    return html.section("setting", "What was done", f"<p>{html.escape(text)}</p>")


def _in_rounds(config: Mapping[str, Any]) -> str:
    """How a search was parted, if it was; results from before have nothing to say of it."""
    if (halving := config.get("halving")) is None:
        return ""
    return f" ({halving['dev']} utterances per language, the best {halving['keep']} again on {config['data']['dev']})"


def _with_factor(config: Mapping[str, Any]) -> str:
    factors = config["rest_lambda"]
    return f" with a factor of its own for every method, {', '.join(map(str, factors))}" if factors else ""


def _calibrated(config: Mapping[str, Any]) -> str:
    seen = [f"{label} on {grid['calibrated']}" for label, grid in config["grids"].items() if grid["calibrated"]]
    return f" Calibrated: {'; '.join(seen)}." if seen else ""


def _each(config: Mapping[str, Any]) -> str:
    return ", one for each task" if config["experts_per"] == "language_task" else ""


def _without(results: Mapping[str, Any]) -> str:
    told = LeftOut(**results["left_out"]).told()
    return f", {told}" if told else ""


def _reading(results: Mapping[str, Any]) -> html.Section:
    limits = (
        "The speech is synthetic, the vocabulary closed (dates and numbers), the model three orders of magnitude smaller than "
        "those in use: the experiment shows that the machinery works and how methods differ here, not what they do on real "
        "speech."
        if results["config"]["data"]["synth"]
        else ""
    )
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    if results["machine"]["commit"]:
        versions += f"; summed up by commit {results['machine']['commit']}"
    lines = [
        "WER: Whisper's normaliser on both sides, errors and reference words summed over the corpus; raw WER, CER, chrF++ are "
        "in results.json, every answer is in answers.jsonl.xz, from which `lors experiment --score-again` computes all of this.",
        *(f"{name}: {text}" for name, text in results["signatures"].items()),
        versions,
    ]
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return html.section(
        "reading", "How to read this", f"<p>{html.escape(limits)}</p>" if limits else "", f"<ul>{items}</ul>"
    )
