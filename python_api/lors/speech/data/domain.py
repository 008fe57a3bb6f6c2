"""Sentences with true translations that nobody had to write: dates and numbers, spelled out in eleven languages.

A *concept* is a date (weekday, day, month) or a cardinal 0 to 999. CLDR's date patterns (babel) and num2words write the
same concept in every language, so ``sentence(c, "ca")`` and ``sentence(c, "en")`` are translations of each other.
Concepts are split into train, dev and test once, for all languages: a test sentence's English is unseen too.
"""

from __future__ import annotations

import datetime
import functools
import random
import re
from dataclasses import dataclass

from ...errors import LorsError, nearest
from .languages import LANGUAGES

__all__ = ["SPLITS", "Concept", "concepts", "sample", "sentence"]

SPLITS = ("train", "dev", "test")
_HELD_OUT = {"test": (300, 150), "dev": (120, 60)}  # dates, numbers
_DATE_SHARE = 0.6

_ORDINAL_DAY = frozenset({"en", "de", "sv"})
# One word up to 999 here: hundreds stand apart, or the closed vocabulary would be mostly words seen once.
_COMPOUNDING = frozenset({"de", "it", "nl", "sv"})


@dataclass(frozen=True, slots=True)
class Concept:
    """A date, or (``date`` None) the number ``number``."""

    date: datetime.date | None
    number: int


@functools.cache
def concepts(split: str) -> tuple[tuple[Concept, ...], tuple[Concept, ...]]:
    """(dates, numbers) of a split. Twenty-eight years hold every day of the year on every weekday."""
    days = (datetime.date(2000, 1, 1) + datetime.timedelta(n) for n in range(28 * 365 + 7))
    dates = list({(d.weekday(), d.month, d.day): Concept(d, 0) for d in days}.values())
    numbers = [Concept(None, n) for n in range(1000)]
    chosen: list[tuple[Concept, ...]] = []
    for kind, pool in enumerate((dates, numbers)):
        random.Random(f"split {kind}").shuffle(pool)
        test, dev = _HELD_OUT["test"][kind], _HELD_OUT["dev"][kind]
        parts = {"test": pool[:test], "dev": pool[test : test + dev], "train": pool[test + dev :]}
        chosen.append(tuple(parts[split]))
    return chosen[0], chosen[1]


def sample(split: str, count: int, seed: object) -> list[Concept]:
    """`count` concepts, 60 % of them dates, no repeats before a kind is used up; the same for the same seed."""
    dates, numbers = concepts(split)
    n_dates = round(count * _DATE_SHARE)
    rng = random.Random(f"sample {split} {seed}")
    chosen = _draw(dates, n_dates, rng) + _draw(numbers, count - n_dates, rng)
    rng.shuffle(chosen)
    return chosen


def _draw(pool: tuple[Concept, ...], count: int, rng: random.Random) -> list[Concept]:
    drawn: list[Concept] = []
    while len(drawn) < count:
        drawn += rng.sample(pool, min(len(pool), count - len(drawn)))
    return drawn


def sentence(concept: Concept, language: str) -> str:
    """The concept in `language`: words only, in the language's usual case, no digits and no punctuation."""
    if language not in (*LANGUAGES, "en"):
        raise LorsError(f"synth: no sentences in {language!r}{nearest(language, (*LANGUAGES, 'en'))}")
    if concept.date is None:
        return _cardinal(concept.number, language)
    return _date(concept.date, language)


@functools.cache
def _cardinal(number: int, language: str) -> str:
    from num2words import num2words

    hundreds, rest = number // 100 * 100, number % 100
    if language in _COMPOUNDING and hundreds and rest:
        return f"{_cardinal(hundreds, language)} {_cardinal(rest, language)}"
    return _words(num2words(number, lang=language))


@functools.cache
def _day(day: int, language: str) -> str:
    from num2words import num2words

    if language not in _ORDINAL_DAY:
        return _cardinal(day, language)
    ending = "r" if language == "de" else ""  # Montag, erster Januar
    return _words(num2words(day, lang=language, to="ordinal")) + ending


@functools.cache
def _date_pattern(language: str) -> str:
    from babel import Locale

    # The locale's full date up to the month (English: then the day), without the year; "@" stands for the day. The
    # skeleton MMMMEEEEd would be the obvious way, but it gives abbreviated names in several locales.
    head, _ = Locale.parse(language).date_formats["full"].pattern.split("MMMM")
    head, days = re.subn(r"\bd+\b\.?", "'@'", head)
    return f"{head}MMMM" if days else f"{head}MMMM '@'"


def _date(date: datetime.date, language: str) -> str:
    from babel.dates import format_date

    return _words(format_date(date, _date_pattern(language), language).replace("@", _day(date.day, language)))


def _words(text: str) -> str:
    return " ".join(re.sub(r"[-,.\u202f\u00ad]", " ", text).split())
