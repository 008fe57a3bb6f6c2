"""WER, CER, BLEU and chrF++ of a list of answers, with what a paired bootstrap needs.

WER is corpus level, 100 * (substitutions + deletions + insertions summed) / (reference words summed), after Whisper's
normaliser: `EnglishTextNormalizer` for English, `BasicTextNormalizer(remove_diacritics=False)` otherwise. The latter keeps
accents that are part of a letter, and makes a space of every combining mark: words of Tamil, Hindi, Thai or vowelled Arabic
fall apart. The normaliser "marks" keeps them, and differs in nothing else. Utterances whose reference normalises to nothing
are dropped and counted. Languages without word spaces are split into characters first, and `unit` says CER; their `cer` does
not count the spaces between. Raw WER splits the untouched text at white space.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import LorsError
from ..data.audio import require
from ..data.languages import CHARACTER_LANGUAGES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "NORMALISERS",
    "Interval",
    "Score",
    "Statistics",
    "holm",
    "metric",
    "normaliser",
    "numbered",
    "paired_bootstrap",
    "score",
]


@dataclass(frozen=True, slots=True)
class Score:
    """Percentages over one language and task. The text metrics of a translation are None for a transcription."""

    utterances: int
    dropped: int  # references that were empty after normalisation
    normaliser: str  # one of NORMALISERS
    unit: str  # "WER", or "CER" where words are not separated
    wer: float
    wer_raw: float
    cer: float
    bleu: float | None
    chrf: float | None
    bleu_signature: str | None
    chrf_signature: str | None


@dataclass(frozen=True, slots=True)
class Statistics:
    """Per utterance, in order: what corpus-level metrics are sums of.

    `errors`, `words`: [n] int64, zero for a dropped reference. `bleu`: [n, 10] int64 (hypothesis length, reference
    length, four n-gram matches, four n-gram totals), None for a transcription. `speakers`: [n] int64, who speaks, numbered;
    None where that is not known of every utterance.
    """

    errors: NDArray[np.int64]
    words: NDArray[np.int64]
    bleu: NDArray[np.int64] | None
    speakers: NDArray[np.int64] | None = None


def numbered(speakers: Sequence[str | None]) -> NDArray[np.int64] | None:
    """Numbers for names; None where one is not known."""
    import numpy as np

    if None in speakers:
        return None
    return np.unique(np.array(speakers, dtype=object).astype(str), return_inverse=True)[1].astype(np.int64)


NORMALISERS = ("whisper", "marks")


@functools.cache
def normaliser(language: str, kind: str = "whisper") -> Callable[[str], str]:
    """Text -> words separated by single spaces, for comparison. English spelling variants are left as they are.

    Whisper's table of British spellings is a file of its checkpoints, not of the library; both sides go through the
    same function, so only a model that answers in the other spelling pays for it.
    """
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    if kind not in NORMALISERS:
        raise LorsError(f"normaliser: expected {' or '.join(NORMALISERS)}, got {kind!r}")
    split = language in CHARACTER_LANGUAGES
    normalise: Any = BasicTextNormalizer(remove_diacritics=False, split_letters=split)
    if kind == "marks":
        normalise.clean = _symbols_to_spaces
    if language == "en":
        normalise = EnglishTextNormalizer({})  # type: ignore[no-untyped-call]
    return lambda text: normalise(text).strip()


def _symbols_to_spaces(text: str) -> str:
    """As Whisper's `remove_symbols`, which takes combining marks (category M) with them."""
    return "".join(
        " " if unicodedata.category(character)[0] in "SP" else character
        for character in unicodedata.normalize("NFKC", text)
    )


def score(
    references: Sequence[str], hypotheses: Sequence[str], *, language: str, task: str, kind: str = "whisper"
) -> tuple[Score, Statistics]:
    """`language` is that of the text: English for a translation into English; `kind`: the normaliser. LorsError when no
    reference has words."""
    import numpy as np

    if len(references) != len(hypotheses):
        raise LorsError(f"score: expected as many answers as references, got {len(hypotheses)} and {len(references)}")
    normalise = normaliser(language, kind)
    pairs = [(normalise(r), normalise(h)) for r, h in zip(references, hypotheses, strict=True)]
    kept = [pair for pair in pairs if pair[0]]
    if not kept:
        raise LorsError(f"score: expected references with words in {language!r}, got {len(references)} empty ones")
    errors, words = _word_errors(pairs)
    raw_errors, raw_words = _word_errors(list(zip(references, hypotheses, strict=True)))
    if language in CHARACTER_LANGUAGES:
        kept = [(r.replace(" ", ""), h.replace(" ", "")) for r, h in kept]
    characters = require("jiwer").process_characters(*map(list, zip(*kept, strict=True)))

    bleu, chrf, bleu_statistics = None, None, None
    if task == "translate":
        bleu, chrf, bleu_statistics = _translation(references, hypotheses, language)
    return Score(
        utterances=len(references),
        dropped=len(references) - len(kept),
        normaliser=kind,
        unit="CER" if language in CHARACTER_LANGUAGES else "WER",
        wer=_percent(errors, words),
        wer_raw=_percent(raw_errors, raw_words),
        cer=100 * characters.cer,
        bleu=bleu and bleu[0],
        chrf=chrf and chrf[0],
        bleu_signature=bleu and bleu[1],
        chrf_signature=chrf and chrf[1],
    ), Statistics(np.asarray(errors, np.int64), np.asarray(words, np.int64), bleu_statistics)


def _word_errors(pairs: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """(errors, reference words) per utterance; (0, 0) for an empty reference."""
    process = require("jiwer").process_words
    errors, words = [], []
    for reference, hypothesis in pairs:
        if not reference.split():
            errors.append(0)
            words.append(0)
            continue
        out = process(reference, hypothesis)
        errors.append(out.substitutions + out.deletions + out.insertions)
        words.append(out.hits + out.substitutions + out.deletions)
    return errors, words


def _percent(errors: Sequence[int], words: Sequence[int]) -> float:
    return 100 * sum(errors) / sum(words) if sum(words) else float("nan")


def _translation(references: Sequence[str], hypotheses: Sequence[str], language: str) -> tuple[Any, Any, Any]:
    """((BLEU, signature), (chrF++, signature), statistics) on the raw, cased text."""
    import numpy as np

    metrics = require("sacrebleu").metrics
    bleu = metrics.BLEU(tokenize=_bleu_tokenizer(language))
    chrf = metrics.CHRF(word_order=2)
    corpus = list(hypotheses), [list(references)]
    bleu_score, chrf_score = bleu.corpus_score(*corpus).score, chrf.corpus_score(*corpus).score
    sentence = metrics.BLEU(tokenize=_bleu_tokenizer(language), effective_order=True).sentence_score
    rows = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        one = sentence(hypothesis, [reference])
        rows.append([one.sys_len, one.ref_len, *one.counts, *one.totals])
    signatures = str(bleu.get_signature()), str(chrf.get_signature())
    return (bleu_score, signatures[0]), (chrf_score, signatures[1]), np.asarray(rows, np.int64)


def _bleu_tokenizer(language: str) -> str:
    return "char" if language in CHARACTER_LANGUAGES else "13a"


# ---------------------------------------------------------------------------------------------------- bootstrap

_NOTHING = 1e-9  # points of WER or BLEU: sums of floats that should be 0


@dataclass(frozen=True, slots=True)
class Interval:
    """A difference (first minus second) and the 2.5 and 97.5 percentiles of its resamples.

    `low`, `high`: utterances drawn, the trainings as they are. `seeds_low`, `seeds_high`: trainings drawn too; None
    with one training. With S trainings that part of the variance comes out too small by (S - 1) / S.
    `p`: how likely a difference of this size or more would be without any, two-sided, by a normal distribution with the
    standard deviation of the resamples, the greater of both; resamples that are counted end at two in their number.
    """

    difference: float
    low: float
    high: float
    p: float
    seeds_low: float | None = None
    seeds_high: float | None = None

    @staticmethod
    def ends(draws: NDArray[np.float64]) -> tuple[float, float]:
        """Of the 95 % in the middle."""
        import numpy as np

        low, high = np.percentile(draws, [2.5, 97.5]).tolist()
        return low, high


def metric(statistics: Statistics, name: str, weights: NDArray[Any] | None = None) -> NDArray[Any]:
    """`wer` or `bleu` of the utterances taken `weights` times each ([resamples, n], default: once) -> [resamples]."""
    import numpy as np

    if weights is None:
        weights = np.ones((1, len(statistics.words)))
    if name == "wer":
        return 100 * (weights @ statistics.errors) / np.maximum(weights @ statistics.words, 1)
    if name != "bleu" or statistics.bleu is None:
        raise LorsError(f"metric: expected wer, or bleu for a translation, got {name!r}")
    compute = require("sacrebleu").metrics.BLEU.compute_bleu
    sums = np.rint(weights @ statistics.bleu).astype(int).tolist()
    return np.array([compute(s[2:6], s[6:10], s[0], s[1], smooth_method="exp").score for s in sums])


def _drawn(generator: np.random.Generator, statistics: Statistics, resamples: int) -> NDArray[np.float64]:
    """How often each utterance is taken: [resamples, n]."""
    import numpy as np

    drawn = np.arange(len(statistics.words))
    if statistics.speakers is not None and len(names := np.unique(statistics.speakers)) > 1:
        drawn = np.searchsorted(names, statistics.speakers)
    units = int(drawn.max()) + 1
    return generator.multinomial(units, np.full(units, 1 / units), size=resamples).astype(float)[:, drawn]


def paired_bootstrap(
    first: Sequence[Mapping[str, Statistics]],
    second: Sequence[Mapping[str, Statistics]],
    name: str,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Difference of the metric, mean over languages and trainings. Within each language speakers are drawn, each with all
    that they say; utterances, where the speakers are not known (or there is one).

    One mapping language -> statistics per training (seed), the two sides in the same order. A draw is the same for both
    sides and all trainings, which must have answered the same utterances of the same languages.
    """
    import numpy as np

    if len(first) != len(second) or not first:
        raise LorsError(f"bootstrap: expected as many trainings on both sides, got {len(first)} and {len(second)}")
    languages = list(first[0])
    for other in (*first[1:], *second):
        if other.keys() != first[0].keys() or not languages:
            raise LorsError(
                f"bootstrap: expected the same languages, got {', '.join(languages)} and {', '.join(other)}"
            )
    generator = np.random.default_rng(seed)
    points, draws = np.zeros(len(first)), np.zeros((len(first), resamples))
    for language in languages:
        words = first[0][language].words
        if not all(np.array_equal(words, side[language].words) for side in (*first, *second)):
            raise LorsError(f"bootstrap: expected the same utterances of {language!r} from both models")
        weights = _drawn(generator, first[0][language], resamples)
        for i, (one, two) in enumerate(zip(first, second, strict=True)):
            points[i] += metric(one[language], name)[0] - metric(two[language], name)[0]
            draws[i] += metric(one[language], name, weights) - metric(two[language], name, weights)
    points, draws = points / len(languages), draws / len(languages)
    difference, means = float(points.mean()), draws.mean(axis=0)
    if len(first) == 1:
        return Interval(difference, *Interval.ends(means), _p(difference, means))
    drawn = generator.integers(len(first), size=(len(first), resamples))
    wide = np.take_along_axis(draws, drawn, axis=0).mean(axis=0)
    return Interval(difference, *Interval.ends(means), _p(difference, means, wide), *Interval.ends(wide))


def _p(difference: float, *draws: NDArray[np.float64]) -> float:
    deviation = max(float(side.std()) for side in draws)
    if abs(difference) <= _NOTHING:
        return 1.0
    return math.erfc(abs(difference) / deviation / math.sqrt(2)) if deviation > _NOTHING else 0.0


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction: rejecting what comes out below alpha rejects a true hypothesis with probability alpha at most.

    Of m values, the i-th smallest (from 0) times m - i, at most 1, and no less than the one before it.
    """
    corrected, least = [1.0] * len(p), 0.0
    for i, place in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        corrected[place] = least = max(least, min(1.0, (len(p) - i) * p[place]))
    return corrected


@dataclass(frozen=True, slots=True)
class Share:
    """Of what another model gained: one number per training, and resamples of their mean."""

    seeds: list[float]
    draws: NDArray[np.float64]


def share_of_gain(
    base: Sequence[Mapping[str, Statistics]],
    best: Sequence[Mapping[str, Statistics]],
    model: Sequence[Mapping[str, Statistics]],
    name: str,
    resamples: int = 1000,
    seed: int = 0,
) -> Share:
    """(sum over the languages of model - base) / (the same sum of best - base), for each training (seed).

    One mapping language -> statistics per training. A ratio of sums, not a mean of ratios: a language in which `best` gained
    next to nothing weighs next to nothing. Not a number where the sum below is 0.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    gained, most = np.zeros((2, len(model), resamples + 1))
    for language in model[0]:
        once = np.ones((1, len(model[0][language].words)))
        weights = np.concatenate([once, _drawn(generator, model[0][language], resamples)])
        for i, sides in enumerate(zip(base, best, model, strict=True)):
            low, high, value = (metric(side[language], name, weights) for side in sides)
            gained[i] += value - low
            most[i] += high - low
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = gained / most
    return Share(shares[:, 0].tolist(), shares[:, 1:].mean(axis=0))
