"""Packs a corpus into one Opus file per language: ``python -m lors.speech.pack CORPUS -o DIR``.

The manifest's columns `start` and `seconds` say where an utterance lies in its file. That is how the recordings of
the demonstration are made; recordings/README.md holds the commands.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from .data.audio import SAMPLE_RATE, read_audio, require
from .data.corpus import load_corpus
from .data.domain import SPLITS
from .data.synth import MANIFEST_COLUMNS
from .data.utterance import Corpus

__all__ = ["main", "pack"]

_GAP = 0.1  # seconds of silence between utterances: a lossy codec smears over the edge


def pack(corpus: Corpus, out: Path, compression: float) -> Path:
    """Writes ``<language>.opus`` and ``manifest.tsv``; `compression` is libsndfile's level, 1 is the smallest."""
    import numpy as np

    out.mkdir(parents=True, exist_ok=True)
    gap = np.zeros(int(_GAP * SAMPLE_RATE), np.float32)
    rows: list[list[Any]] = []
    for language in dict.fromkeys(u.language for u in corpus):
        pieces, position = [], 0
        for u in (u for u in corpus if u.language == language):
            samples = read_audio(u.audio)
            span = [f"{position / SAMPLE_RATE:.4f}", f"{len(samples) / SAMPLE_RATE:.4f}"]
            rows.append([u.id, f"{language}.opus", u.text, u.translation or "", language, u.split or "", *span])
            pieces += [samples, gap]
            position += len(samples) + len(gap)
        require("soundfile").write(
            out / f"{language}.opus",
            np.concatenate(pieces),
            SAMPLE_RATE,
            format="OGG",
            subtype="OPUS",
            compression_level=compression,
        )
    with (out / "manifest.tsv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE)
        writer.writerow([*MANIFEST_COLUMNS, "start", "seconds"])
        writer.writerows(rows)
    return out / "manifest.tsv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--experts", default="ca,de,es,ru", help="languages whose splits train and dev are kept")
    parser.add_argument("--languages", default="ca,de,es,fr,it,id,nl,pt,ru,sv")
    parser.add_argument("--sizes", default="100,15,25", help="utterances of train, dev and test per language")
    parser.add_argument("--compression", type=float, default=0.9)
    options = parser.parse_args()
    corpus: Corpus = []
    for split, size in zip(SPLITS, options.sizes.split(","), strict=True):
        languages = options.languages if split == "test" else options.experts
        corpus += load_corpus(options.corpus, languages=languages, split=split, limit=int(size))
    print(pack(corpus, options.out, options.compression))


if __name__ == "__main__":
    main()
