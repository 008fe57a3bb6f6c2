"""Scores against numbers worked out by hand, and against jiwer and sacrebleu called directly."""

from __future__ import annotations

from statistics import NormalDist

import jiwer
import numpy as np
import pytest
import sacrebleu

from lors.errors import LorsError
from lors.speech.scoring.metrics import (
    Statistics,
    holm,
    metric,
    normaliser,
    numbered,
    paired_bootstrap,
    score,
    share_of_gain,
)  # fmt: skip


def test_wer_by_hand() -> None:
    # "Eins zwei drei" / "eins zwo drei vier": 1 substitution + 1 insertion; "fünf!" / "": 1 deletion; 4 words in all.
    result, statistics = score(
        ["Eins, zwei drei.", "fünf!"], ["eins zwo drei vier", ""], language="de", task="transcribe"
    )
    assert result.wer == pytest.approx(100 * 3 / 4)
    assert statistics.errors.tolist() == [2, 1] and statistics.words.tolist() == [3, 1]
    # Raw: "Eins," "drei." and "zwei" differ, "vier" is inserted, "fünf!" is deleted.
    assert result.wer_raw == pytest.approx(100 * 5 / 4)
    assert result.unit == "WER" and result.bleu is None and result.bleu_signature is None


def test_corpus_level_is_not_a_mean_of_utterances() -> None:
    result, _ = score(["a b c d e f g h i", "x"], ["a b c d e f g h i", "y"], language="es", task="transcribe")
    assert result.wer == pytest.approx(10.0)  # the mean of 0 % and 100 % would be 50


def test_cer_by_hand() -> None:
    result, _ = score(["abcd"], ["abxd"], language="ca", task="transcribe")
    assert result.cer == pytest.approx(25.0)


def test_empty_references_are_dropped_and_counted() -> None:
    result, statistics = score(["...", "sí", ""], ["noise", "sí", "no"], language="es", task="transcribe")
    assert (result.utterances, result.dropped, result.wer) == (3, 2, 0.0)
    assert statistics.words.tolist() == [0, 1, 0] and statistics.errors.tolist() == [0, 0, 0]
    with pytest.raises(LorsError, match="expected references with words in 'es', got 1 empty"):
        score(["—"], ["x"], language="es", task="transcribe")


def test_diacritics_count_and_case_does_not() -> None:
    assert score(["mañana"], ["manana"], language="es", task="transcribe")[0].wer == 100
    assert score(["Mañana"], ["mañana"], language="es", task="transcribe")[0].wer == 0


def test_languages_without_spaces_are_scored_by_character() -> None:
    result, statistics = score(["你好世界"], ["你好世間"], language="zh", task="transcribe")
    assert result.unit == "CER" and result.wer == pytest.approx(25.0) and statistics.words.tolist() == [4]
    # 1 of 4 characters; with the spaces between them it would be 1 of 7.
    assert result.cer == pytest.approx(25.0)
    spaced, _ = score(["你好 世界"], ["你好世界"], language="zh", task="transcribe")
    assert spaced.cer == spaced.wer == 0


@pytest.mark.parametrize(("language", "text"), [("hi", "हिन्दी में"), ("ta", "தமிழ் மொழி"), ("ar", "كِتَاب")])
def test_combining_marks(language: str, text: str) -> None:
    """Whisper's normaliser cuts words at every mark; the other one keeps them, and differs in nothing else."""
    assert len(normaliser(language)(text).split()) > len(text.split())
    assert normaliser(language, "marks")(text) == text
    assert score([text], [text], language=language, task="transcribe", kind="marks")[0].normaliser == "marks"
    for same in ("L'Été, c'est « bien » !", "Ça va? <laugh> (oui)"):
        assert normaliser("fr", "marks")(same) == normaliser("fr")(same)
    with pytest.raises(LorsError, match="normaliser: expected whisper or marks, got 'none'"):
        normaliser("hi", "none")


def test_english_uses_whispers_english_normaliser() -> None:
    assert normaliser("en")("It's twenty-one, isn't it?") == normaliser("en")("it is 21 is not it")


def test_against_jiwer_and_sacrebleu() -> None:
    references = ["Monday January fifth", "three hundred and twelve", "Friday May the first"]
    hypotheses = ["Monday January sixth", "three hundred twelve", "Friday May first"]
    result, statistics = score(references, hypotheses, language="en", task="translate")
    assert result.wer_raw == pytest.approx(100 * jiwer.wer(references, hypotheses))
    bleu = sacrebleu.corpus_bleu(hypotheses, [references])
    assert result.bleu == pytest.approx(bleu.score)
    assert result.chrf == pytest.approx(sacrebleu.corpus_chrf(hypotheses, [references], word_order=2).score)
    assert (
        result.bleu_signature is not None
        and "tok:13a" in result.bleu_signature
        and "case:mixed" in result.bleu_signature
    )
    # The per-utterance counts add up to the corpus score, so resampling them resamples BLEU itself.
    assert metric(statistics, "bleu")[0] == pytest.approx(bleu.score)
    twice = metric(statistics, "bleu", np.array([[2.0, 0.0, 1.0]]))[0]
    again = sacrebleu.corpus_bleu([hypotheses[0]] * 2 + hypotheses[2:], [[references[0]] * 2 + references[2:]])
    assert twice == pytest.approx(again.score)


def _counts(errors: list[int], words: int = 4) -> Statistics:
    return Statistics(np.array(errors), np.full(len(errors), words), None)


def test_bootstrap_tells_a_real_difference_from_chance() -> None:
    rng = np.random.default_rng(0)
    worse, better = rng.integers(1, 4, 200).tolist(), rng.integers(0, 2, 200).tolist()
    interval = paired_bootstrap([{"ca": _counts(worse)}], [{"ca": _counts(better)}], "wer")
    assert interval.difference == pytest.approx(100 * (sum(worse) - sum(better)) / 800)
    assert 0 < interval.low < interval.difference < interval.high
    shuffled = rng.permutation(worse).tolist()
    chance = paired_bootstrap([{"ca": _counts(worse)}], [{"ca": _counts(shuffled)}], "wer")
    assert chance.difference == pytest.approx(0) and chance.low < 0 < chance.high


def test_bootstrap_is_paired() -> None:
    # One error more on every utterance: whatever is drawn, the difference is the same.
    errors = np.random.default_rng(1).integers(0, 4, 50)
    interval = paired_bootstrap([{"ca": _counts((errors + 1).tolist())}], [{"ca": _counts(errors.tolist())}], "wer")
    assert interval.low == pytest.approx(25) and interval.high == pytest.approx(25)


def test_bootstrap_refuses_other_utterances() -> None:
    with pytest.raises(LorsError, match="same utterances of 'ca'"):
        paired_bootstrap([{"ca": _counts([1, 2])}], [{"ca": _counts([1, 2], words=5)}], "wer")
    with pytest.raises(LorsError, match="same languages"):
        paired_bootstrap([{"ca": _counts([1])}], [{"de": _counts([1])}], "wer")
    with pytest.raises(LorsError, match="as many trainings"):
        paired_bootstrap([{"ca": _counts([1])}], [], "wer")
    with pytest.raises(LorsError, match="same utterances of 'ca'"):
        one, two = {"ca": _counts([1, 2])}, {"ca": _counts([1, 2], words=5)}
        paired_bootstrap([one, two], [one, two], "wer")


def test_trainings_that_disagree_widen_the_interval_over_seeds_only() -> None:
    # One training has one error more on every utterance, the other one less: no utterance drawn changes their mean.
    errors = np.random.default_rng(2).integers(1, 4, 50)
    second = [{"ca": _counts(errors.tolist())}] * 2
    first = [{"ca": _counts((errors + change).tolist())} for change in (1, -1)]
    interval = paired_bootstrap(first, second, "wer")
    assert (interval.difference, interval.low, interval.high) == pytest.approx((0, 0, 0))
    assert (interval.seeds_low, interval.seeds_high) == pytest.approx((-25, 25))
    assert paired_bootstrap(first[:1], second[:1], "wer").seeds_low is None


def test_speakers_are_drawn_with_all_that_they_say() -> None:
    """Twenty speakers of ten utterances, whose errors go by speaker: the interval is about sqrt(10) times as wide."""
    rng = np.random.default_rng(3)
    errors = np.repeat(rng.integers(0, 5, 20), 10)
    alone = _counts(errors.tolist())
    named = Statistics(alone.errors, alone.words, None, numbered([f"s{i // 10}" for i in range(200)]))
    none = _counts([0] * 200)

    def width(side: Statistics) -> float:
        interval = paired_bootstrap([{"ca": side}], [{"ca": none}], "wer")
        return interval.high - interval.low

    assert 2.4 < width(named) / width(alone) < 4
    assert numbered(["a", None]) is None
    one = Statistics(alone.errors, alone.words, None, numbered(["a"] * 200))
    assert width(one) == width(alone), "one speaker says nothing about others"


def test_a_share_of_the_gain_is_a_ratio_of_sums() -> None:
    """In "de" the expert gained next to nothing, and the model lost a little there: that is no disaster."""
    base = {"ca": _counts([3] * 40), "de": _counts([2] * 40)}
    own = {"ca": _counts([1] * 40), "de": _counts([2] * 39 + [1])}
    merged = {"ca": _counts([2] * 40), "de": _counts([2] * 38 + [3] * 2)}
    share = share_of_gain([base], [own], [merged], "wer")
    assert share.seeds == [pytest.approx((40 - 2) / (80 + 1))]
    low, high = np.percentile(share.draws, [2.5, 97.5])
    assert 0.4 < low < share.seeds[0] < high < 0.51
    assert share_of_gain([base], [own], [own], "wer").seeds == [1] and share_of_gain(
        [base], [own], [base], "wer"
    ).seeds == [0]
    # Worse than the base where every expert is better: below 0, also where one expert is worse than the base.
    strange = {"ca": _counts([1] * 40), "de": _counts([3] * 40)}
    worse = {"ca": _counts([4] * 40), "de": _counts([3] * 40)}
    assert share_of_gain([base], [strange], [worse], "wer").seeds == [pytest.approx(-80 / 40)]
    assert not np.isfinite(share_of_gain([base], [base], [merged], "wer").seeds[0])


def test_p_is_that_of_the_normal_distribution() -> None:
    """Of a mean of differences with a known deviation: two-sided, and the wider of the two ways to draw."""
    rng = np.random.default_rng(4)
    change = rng.integers(-1, 3, 400)
    first, second = _counts((change + 2).tolist()), _counts([2] * 400)
    interval = paired_bootstrap([{"ca": first}], [{"ca": second}], "wer", resamples=20000)
    z = change.mean() / (change.std() / 20)
    assert interval.p == pytest.approx(2 * NormalDist().cdf(-abs(z)), rel=0.5) and interval.p < 1e-10
    # That the interval excludes 0 and p < 0.05 are the same, but for chance in the resamples.
    for shift in (0.0, 0.5, 1.0, 1.5, 2.5, 3.0):
        noise = rng.normal(0, 1, 300)
        errors = 10 + np.rint(100 * (noise - noise.mean() + shift * noise.std() / np.sqrt(300))).astype(int) + 1000
        one = paired_bootstrap(
            [{"ca": _counts(errors.tolist())}], [{"ca": _counts([1010] * 300)}], "wer", resamples=4000
        )
        assert one.p == pytest.approx(2 * NormalDist().cdf(-shift), rel=0.25, abs=0.01)
        assert (one.p < 0.05) == (one.low > 0)
    same = paired_bootstrap([{"ca": first}], [{"ca": first}], "wer")
    assert (same.difference, same.p) == (0, 1)
    always = paired_bootstrap([{"ca": _counts([3] * 40)}], [{"ca": _counts([2] * 40)}], "wer")
    assert always.p == 0
    # Trainings that disagree: over utterances alone the difference would be certain.
    two = [{"ca": _counts([3] * 40)}, {"ca": _counts([2] * 40)}], [{"ca": _counts([2] * 40)}] * 2
    assert paired_bootstrap(*two, "wer").p > 0.1


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1, 1] and holm([0.2]) == [0.2] and holm([]) == []
    assert holm([0.0, 0.0, 0.02]) == pytest.approx([0, 0, 0.02])


def test_holm_rejects_a_true_hypothesis_rarely() -> None:
    """Five true hypotheses and one false: some true one comes out below 0.05 in 5 % of the families at most."""
    rng = np.random.default_rng(5)
    normal = NormalDist()
    families = [[2 * normal.cdf(-abs(z)) for z in rng.normal(0, 1, 5)] + [1e-9] for _ in range(4000)]
    wrong = sum(min(holm(family)[:5]) < 0.05 for family in families) / len(families)
    uncorrected = sum(min(family[:5]) < 0.05 for family in families) / len(families)
    assert 0.035 < wrong < 0.06 < 0.2 < uncorrected
    assert all(holm(family)[5] < 0.05 for family in families)
