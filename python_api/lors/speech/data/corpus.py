"""Corpora as lists of utterances: a manifest of one's own, CoVoST 2, Common Voice, FLEURS, whatever `datasets` opens.

Loaders read the formats these corpora have on disk and nothing of the audio itself; samples are read when features are
computed. Every loader takes Whisper's language codes and returns them.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ...errors import LorsError, nearest
from .audio import duration
from .common_voice import common_voice, covost2
from .fleurs import fleurs
from .languages import parse_languages
from .left_out import LeftOut
from .manifest import read_manifest
from .opened import by_datasets
from .utterance import Corpus, Utterance

__all__ = ["corpus_digest", "is_kind", "load_corpus", "name_of"]


def load_corpus(
    source: str | Path | Corpus,
    *,
    languages: str | Iterable[str],
    split: str | None = "train",
    limit: int | None = None,
    max_seconds: float | None = None,
    seed: int = 0,
    left_out: LeftOut | None = None,
) -> Corpus:
    """Utterances of `languages`, in the corpus's order; `max_seconds` drops longer recordings.

    `limit`, per language, takes a sample: as many from each speaker as can be, drawn by `seed` and the utterances' ids, so
    that a larger limit adds to a smaller one's. `left_out` counts what is too long, and goes on without rows and recordings
    that cannot be used as far as it allows; without it the first of these is an error.

    `source` is a manifest (``.tsv``, ``.jsonl``; a directory with ``manifest.tsv``), or a kind and a place:
    ``covost2:DIR`` (``DIR`` holds Common Voice's ``<code>/clips`` and CoVoST's ``covost_v2.<code>_en.<split>.tsv``, or
    ``covost_v2.<code>_en.tsv`` with ``validated.tsv``), ``common_voice:DIR`` (unpacked, or the hub's archives),
    ``fleurs:DIR`` (Parquet, or tables and archives) or ``fleurs:`` for the hub, ``datasets:NAME,KEY=VALUE`` for what the
    library `datasets` opens (docs/speech.md); or utterances loaded before, which are chosen from in the same way. An utterance without a split
    belongs to all of them; `split` None takes every one of a manifest or a loaded corpus. LorsError when a file, a column
    or a language is missing, an id comes twice, or nothing is left.
    """
    name, of = name_of(source), f" in split {split!r}" if split else ""
    if limit is not None and limit < 1:
        raise LorsError(f"{name}: expected a limit of at least 1, got {limit}")
    left_out = LeftOut() if left_out is None else left_out
    left_out.accept()
    corpus: Corpus = []
    total = 0
    for language, utterances in _by_language(source, parse_languages(languages), split, left_out):
        here = list(utterances)
        total += len(here)
        chosen = _sample(here, limit, max_seconds, seed, left_out)
        if not chosen:
            within = "" if max_seconds is None else f" of at most {max_seconds:g} s"
            left_out.require_few(name, total)
            raise LorsError(f"{name}: expected utterances of {language!r}{of}{within}, got none")
        corpus += chosen
    left_out.require_few(name, total + len(left_out.unusable) - left_out.accepted)
    left_out.accept()
    return _unique(corpus, name)


def name_of(source: str | Path | Corpus) -> str:
    """What messages call a corpus: as it was given, one loaded before "corpus"."""
    return "corpus" if isinstance(source, list) else str(source)


def is_kind(source: str) -> bool:
    """Whether it is KIND:PLACE, not a manifest."""
    return source.partition(":")[0] in _LOADERS


def corpus_digest(source: str | Path, *, languages: Iterable[str], split: str) -> str:
    """SHA-256 of all rows that `load_corpus` chooses from, and of the sizes of their recordings."""
    digest = hashlib.sha256()
    for language, utterances in _by_language(source, parse_languages(languages), split, LeftOut(share=1)):
        for u in utterances:
            digest.update(
                repr((language, u.id, u.text, u.translation, u.audio.span, u.audio.size)).encode("utf-8", "replace")
            )
    return digest.hexdigest()


def _by_language(
    source: str | Path | Corpus, wanted: tuple[str, ...], split: str | None, left_out: LeftOut
) -> Iterator[tuple[str, Iterable[Utterance]]]:
    """(language, its utterances of the split) for each of `wanted`."""
    name = name_of(source)
    if isinstance(source, list):
        everything = source
    else:
        if is_kind(name):
            kind, _, place = name.partition(":")
            if split is None:
                raise LorsError(f"{name}: expected a split of the corpus, got none")
            yield from ((language, _LOADERS[kind](place, language, split, left_out)) for language in wanted)
            return
        everything = list(read_manifest(Path(source), _LOADERS, left_out))
    here = [utterance for utterance in everything if split is None or utterance.split in (None, split)]
    spoken, of = dict.fromkeys(u.language for u in here), f" in split {split!r}" if split else ""
    if not here:
        left_out.require_few(name, len(everything))
        splits = ", ".join(dict.fromkeys(str(u.split) for u in everything)) or "nothing"
        raise LorsError(f"{name}: expected utterances{of}, got {splits}")
    for language in wanted:
        if language not in spoken:
            raise LorsError(f"{name}: no {language!r}{of}{nearest(language, spoken)}")
        yield language, (utterance for utterance in here if utterance.language == language)


def _sample(corpus: Corpus, limit: int | None, max_seconds: float | None, seed: int, left_out: LeftOut) -> Corpus:
    chosen: list[int] = []
    for index in range(len(corpus)) if limit is None or limit >= len(corpus) else _spread(corpus, seed):
        if len(chosen) == limit:
            break
        if max_seconds is None or _fits(corpus[index], max_seconds, left_out):
            chosen.append(index)
    return [corpus[index] for index in sorted(chosen)]


def _spread(corpus: Corpus, seed: int) -> list[int]:
    """All, at random; first one of every speaker, then a second of each that has one. Nobody known: each is one's own."""
    drawn = [hashlib.sha256(f"{seed}\0{u.id}".encode("utf-8", "surrogateescape")).digest() for u in corpus]
    turns: dict[str, int] = defaultdict(int)
    order: list[tuple[int, bytes, int]] = []
    for index in sorted(range(len(corpus)), key=lambda i: drawn[i]):
        speaker = corpus[index].speaker
        turn = 0 if speaker is None else turns[speaker]
        if speaker is not None:
            turns[speaker] += 1
        order.append((turn, drawn[index], index))
    return [index for *_, index in sorted(order)]


def _fits(utterance: Utterance, max_seconds: float, left_out: LeftOut) -> bool:
    with left_out.unless_unusable():
        longer = duration(utterance.audio) > max_seconds
        left_out.longer += longer
        return not longer
    return False


def _unique(corpus: Corpus, name: str) -> Corpus:
    seen: set[str] = set()
    for utterance in corpus:
        if utterance.id in seen:
            raise LorsError(f"{name}: expected ids that differ, got {utterance.id!r} twice")
        seen.add(utterance.id)
    return corpus


_LOADERS: dict[str, Callable[[str, str, str, LeftOut], Iterable[Utterance]]] = {
    "covost2": covost2,
    "common_voice": common_voice,
    "fleurs": fleurs,
    "datasets": by_datasets,
}
