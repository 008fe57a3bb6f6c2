"""`lors sweep --score "speech DATA ca,de [transcribe,translate]"`: WER and BLEU of a model on the dev split.

    python -m lors.speech.dev_score DATA LANGUAGES [TASKS] MODEL

prints {"wer": mean over the languages, "bleu": mean, "wer_ca": ..., ...} as its last line.
"""

from __future__ import annotations

import json
import sys

from ..errors import LorsError

__all__ = ["score"]


def score(data: str, languages: str, model: str, tasks: str = "transcribe") -> dict[str, float]:
    """Percentages: `wer` (transcribe) and `bleu` (translate), means over the languages, and each language's own."""
    from .scoring.evaluation import evaluate

    evaluation = evaluate(model, data=data, languages=languages, tasks=tasks, split="dev")
    found: dict[str, float] = {}
    for metric, task in (("wer", "transcribe"), ("bleu", "translate")):
        values = {r.language: getattr(r.score, metric) for r in evaluation.results if r.task == task}
        if values:
            found[metric] = sum(values.values()) / len(values)
            found |= {f"{metric}_{language}": value for language, value in values.items()}
    return found


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if len(arguments) not in (3, 4):
        sys.exit("expected DATA LANGUAGES [TASKS] MODEL")
    try:
        print(json.dumps(score(arguments[0], arguments[1], arguments[-1], *arguments[2:-1])))
    except LorsError as error:
        sys.exit(f"error: {error}")
