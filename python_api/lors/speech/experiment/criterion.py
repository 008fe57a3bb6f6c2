"""By what dev chooses among the settings of a method.

A cell is a task and a language, "transcribe ca". Each criterion gives every cell a number and all cells one number:

    normalised   mean over the tasks of sum(score - base) / sum(own expert - base), the sums over the experts' languages;
                 the score is WER of recognition and BLEU of translation
    wer          mean of WER over all cells, percent
    bleu         mean of BLEU over the languages that are translated
    loss         mean over all cells of the cross-entropy of a reference's token, nats; nothing is decoded
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import LorsError
from ..data.utterance import Corpus
from ..scoring.evaluation import Decoder
from ..scoring.loss import mean_loss

__all__ = ["CRITERIA", "METRIC", "Cells", "Criterion"]

METRIC = {"transcribe": "wer", "translate": "bleu"}

Cells = Mapping[str, float]


@dataclass(frozen=True)
class Criterion:
    """tasks: those it needs, () any. cell: of some utterances of one language. total: of all cells, given those of the base
    and of each language's own expert where it is `relative` to them."""

    called: str
    higher: bool
    cell: Callable[[Decoder, Corpus, str], float]
    total: Callable[[Cells, Cells, Cells], float]
    tasks: tuple[str, ...] = ()
    relative: bool = False

    def best(self, values: Sequence[float]) -> int:
        """Index; the first of those that are equal."""
        return values.index(max(values) if self.higher else min(values))


def _scored(metric: str | None) -> Callable[[Decoder, Corpus, str], float]:
    def cell(decoder: Decoder, part: Corpus, task: str) -> float:
        return float(getattr(decoder.result("", part, task).score, metric or METRIC[task]))

    return cell


def _loss(decoder: Decoder, part: Corpus, task: str) -> float:
    return mean_loss(decoder, part, task)


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
    "loss": Criterion("mean dev cross-entropy", False, _loss, _mean),
}


def measured(criterion: Criterion, decoder: Decoder, parts: Any) -> dict[str, float]:
    """The cells: of (task, utterances of one language) each."""
    return {
        f"{task} {part[0].language}": criterion.cell(decoder, part, task)
        for task, part in parts
        if not criterion.tasks or task in criterion.tasks
    }
