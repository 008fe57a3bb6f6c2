"""Corpora as lists of utterances: a manifest of one's own, CoVoST 2, Common Voice, FLEURS.

Loaders read the formats these corpora have on disk and nothing of the audio itself; samples are read when features are
computed. Every loader takes Whisper's language codes and returns them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ...errors import LorsError, nearest
from .audio import duration
from .common_voice import common_voice, covost2
from .fleurs import fleurs
from .languages import parse_languages
from .manifest import read_manifest
from .utterance import Corpus, Utterance

__all__ = ["load_corpus"]


def load_corpus(
    source: str | Path | Corpus,
    *,
    languages: str | Iterable[str],
    split: str | None = "train",
    limit: int | None = None,
    max_seconds: float | None = None,
) -> Corpus:
    """Utterances of `languages`, in the corpus's order; `limit` is per language, `max_seconds` drops longer recordings.

    `source` is a manifest (``.tsv``, ``.jsonl``; a directory with ``manifest.tsv``), or a kind and a place:
    ``covost2:DIR`` (``DIR`` holds Common Voice's ``<code>/clips`` and CoVoST's ``covost_v2.<code>_en.<split>.tsv``, or
    ``covost_v2.<code>_en.tsv`` with ``validated.tsv``), ``common_voice:DIR``, ``fleurs:DIR`` (Parquet) or ``fleurs:``
    for the hub; or utterances loaded before, which are chosen from in the same way. An utterance without a split
    belongs to all of them; `split` None takes every one of a manifest or a loaded corpus. LorsError when a file, a column or a language is missing, an id comes twice, or nothing is left.
    """
    name, of = "corpus" if isinstance(source, list) else str(source), f" in split {split!r}" if split else ""
    if limit is not None and limit < 1:
        raise LorsError(f"{name}: expected a limit of at least 1, got {limit}")
    corpus: Corpus = []
    for language, utterances in _by_language(source, parse_languages(languages), split):
        chosen = list(_cut(utterances, limit, max_seconds))
        if not chosen:
            within = "" if max_seconds is None else f" of at most {max_seconds:g} s"
            raise LorsError(f"{name}: expected utterances of {language!r}{of}{within}, got none")
        corpus += chosen
    return _unique(corpus, name)


def _by_language(
    source: str | Path | Corpus, wanted: tuple[str, ...], split: str | None
) -> Iterator[tuple[str, Iterable[Utterance]]]:
    """(language, its utterances of the split) for each of `wanted`."""
    if isinstance(source, list):
        name, everything = "corpus", source
    else:
        name = str(source)
        kind, _, place = name.partition(":")
        if kind in _LOADERS:
            if split is None:
                raise LorsError(f"{name}: expected a split of the corpus, got none")
            yield from ((language, _LOADERS[kind](place, language, split)) for language in wanted)
            return
        everything = list(read_manifest(Path(source), _LOADERS))
    here = [utterance for utterance in everything if split is None or utterance.split in (None, split)]
    spoken, of = dict.fromkeys(u.language for u in here), f" in split {split!r}" if split else ""
    if not here:
        splits = ", ".join(dict.fromkeys(str(u.split) for u in everything)) or "nothing"
        raise LorsError(f"{name}: expected utterances{of}, got {splits}")
    for language in wanted:
        if language not in spoken:
            raise LorsError(f"{name}: no {language!r}{of}{nearest(language, spoken)}")
        yield language, (utterance for utterance in here if utterance.language == language)


def _cut(utterances: Iterable[Utterance], limit: int | None, max_seconds: float | None) -> Iterator[Utterance]:
    taken = 0
    for utterance in utterances:
        if taken == limit:
            return
        if max_seconds is None or duration(utterance.audio) <= max_seconds:
            taken += 1
            yield utterance


def _unique(corpus: Corpus, name: str) -> Corpus:
    seen: set[str] = set()
    for utterance in corpus:
        if utterance.id in seen:
            raise LorsError(f"{name}: expected ids that differ, got {utterance.id!r} twice")
        seen.add(utterance.id)
    return corpus


# ---------------------------------------------------------------------------------------------------- FLEURS


_LOADERS: dict[str, Callable[[str, str, str], Iterable[Utterance]]] = {
    "covost2": covost2,
    "common_voice": common_voice,
    "fleurs": fleurs,
}
