"""Speech: corpora, fine-tuning, scoring and the whole merging experiment.

from lors.speech import evaluate, finetune, load_corpus
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .corpus import Utterance, load_corpus
    from .evaluation import Evaluation, compare, evaluate
    from .experiment import run_experiment
    from .synth import synthesise
    from .training import Trained, Training, finetune

# name -> module; loaded on first use: transformers takes seconds
_EXPORTS = {
    "Evaluation": "evaluation",
    "Trained": "training",
    "Training": "training",
    "Utterance": "corpus",
    "compare": "evaluation",
    "evaluate": "evaluation",
    "finetune": "training",
    "load_corpus": "corpus",
    "run_experiment": "experiment",
    "synthesise": "synth",
}

__all__ = [
    "Evaluation",
    "Trained",
    "Training",
    "Utterance",
    "compare",
    "evaluate",
    "finetune",
    "load_corpus",
    "run_experiment",
    "synthesise",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
