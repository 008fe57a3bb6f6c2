"""By what dev chooses among the settings of a method.

A cell is a task and a language, "transcribe ca". Each criterion gives every cell a number and all cells one number:

    normalised   mean over the tasks of sum(score - base) / sum(own expert - base), the sums over the experts' languages;
                 the score is WER of recognition and BLEU of translation
    wer          mean of WER over all cells, percent
    bleu         mean of BLEU over the languages that are translated
    loss         mean over all cells of the cross-entropy of a reference's token, nats; nothing is decoded
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...errors import LorsError
from ..data.utterance import Corpus, by_task
from ..scoring.evaluation import Decoder
from ..scoring.loss import mean_loss

__all__ = ["CRITERIA", "METRIC", "Cells", "Criterion"]

METRIC = {"transcribe": "wer", "translate": "bleu"}

Cells = Mapping[str, float]


@dataclass(frozen=True)
class Criterion:
    """tasks: those it needs, () any. cells: of some utterances of one language, one for each task. total: of all cells, given
    those of the base and of each language's own expert where it is `relative` to them."""

    called: str
    higher: bool
    cells: Callable[[Decoder, Corpus, Sequence[str]], list[float]]
    total: Callable[[Cells, Cells, Cells], float]
    tasks: tuple[str, ...] = ()
    relative: bool = False

    def ranked(self, values: Sequence[float]) -> list[int]:
        """Indices, best first; those that are equal in their order."""
        return sorted(range(len(values)), key=lambda i: -values[i] if self.higher else values[i])


def _scored(metric: str | None) -> Callable[[Decoder, Corpus, Sequence[str]], list[float]]:
    def cells(decoder: Decoder, part: Corpus, tasks: Sequence[str]) -> list[float]:
        return [float(getattr(r.score, metric or METRIC[r.task])) for r in decoder.results("", part, tasks)]

    return cells


def _losses(decoder: Decoder, part: Corpus, tasks: Sequence[str]) -> list[float]:
    return [mean_loss(decoder, by_task(part, task), task) for task in tasks]


def _mean(cells: Cells, *_: Cells) -> float:
    return sum(cells.values()) / len(cells)


def _share(cells: Cells, base: Cells, own: Cells) -> float:
    shares = []
    for task in dict.fromkeys(cell.split()[0] for cell in cells):
        names = [cell for cell in cells if cell.split()[0] == task]
        gained, most = (sum(side[cell] - base[cell] for cell in names) for side in (cells, own))
        if most * (-1 if METRIC[task] == "wer" else 1) <= 0:
            raise LorsError(
                f"criterion: normalised is a share of what the experts gained over the base on dev: they gained nothing in "
                f"{task} ({most:+.2f} {METRIC[task].upper()}); expected experts that do, or wer, bleu or loss"
            )
        shares.append(gained / most)
    return sum(shares) / len(shares)


CRITERIA: dict[str, Criterion] = {
    "normalised": Criterion("normalised performance on dev", True, _scored(None), _share, relative=True),
    "wer": Criterion("mean dev WER", False, _scored("wer"), _mean),
    "bleu": Criterion("mean dev BLEU", True, _scored("bleu"), _mean, ("translate",)),
    "loss": Criterion("mean dev cross-entropy", False, _losses, _mean),
}


def measured(criterion: Criterion, decoder: Decoder, parts: Iterable[Corpus], tasks: Sequence[str]) -> dict[str, float]:
    """The cells of parts, the utterances of one language each."""
    needed = [task for task in tasks if not criterion.tasks or task in criterion.tasks]
    return {
        f"{task} {part[0].language}": value
        for part in parts
        for task, value in zip(needed, criterion.cells(decoder, part, needed), strict=True)
    }
