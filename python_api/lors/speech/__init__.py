"""Speech: corpora, fine-tuning, scores, and the experiment that judges merges by them. Knows no other merging tool.

    from lors.speech import evaluate, finetune, load_corpus

What is used is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calibration import calibrate
    from .data.corpus import load_corpus
    from .data.synth import synthesise
    from .data.utterance import Utterance
    from .experiment.plan import run_experiment
    from .learning import Learning, learn
    from .scoring.evaluation import Evaluation, compare, evaluate
    from .training.finetune import Trained, finetune
    from .training.settings import Training

# name -> module; loaded on first use: transformers takes seconds
_EXPORTS = {
    "Evaluation": "scoring.evaluation",
    "Learning": "learning",
    "Trained": "training.finetune",
    "Training": "training.settings",
    "Utterance": "data.utterance",
    "calibrate": "calibration",
    "compare": "scoring.evaluation",
    "evaluate": "scoring.evaluation",
    "finetune": "training.finetune",
    "learn": "learning",
    "load_corpus": "data.corpus",
    "run_experiment": "experiment.plan",
    "synthesise": "data.synth",
}

__all__ = [
    "Evaluation",
    "Learning",
    "Trained",
    "Training",
    "Utterance",
    "calibrate",
    "compare",
    "evaluate",
    "finetune",
    "learn",
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
