"""Weights of experts' parts, one per matrix, learned from recordings without texts.

    W = W0 + sum_t sum_p f_tp D_tp      of every attention and MLP projection, D_tp: part p of the delta of expert t
    f = argmin of the cross-entropy, nats per token, of the words that each expert hears in recordings of its language

The rest of the model is the experts' average. The D are those of a merge that is linear in its weights (`FORMS`), so what is learned
is a recipe: anyone can merge by it, without recordings. Coefficients per layer are learned as in AdaMerging (arXiv 2310.02575), from
the experts' own transcriptions in the place of the entropy of a class; by Adam, from weights that a merge would take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.layers import decomposed
from ..errors import LorsError, nearest
from ..files.file import OutputFile
from ..files.replaceable import LEARNED, require_file
from ..merging.in_memory import merge_state_dicts
from ..methods import SPECS
from ..progress import bar
from ..recipes import strict_yaml
from ..recipes.recipe import Recipe
from .data.corpus import load_corpus, name_of
from .data.features import Features, kept_in, window
from .data.left_out import SHARE, LeftOut
from .data.utterance import Corpus
from .model.tokens import labels
from .model.whisper import load_model, load_processor, quiet, require_languages
from .scoring.evaluation import Decoder

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FORMS", "Learning", "learn", "learned_weights", "settings_of"]

Weights = dict[str, dict[str, dict[str, float]]]  # parameter -> expert -> tensor -> value
Item = tuple[Any, list[int]]  # a recording, and the tokens of what an expert hears in it


@dataclass(frozen=True)
class Form:
    """A method, its settings, and where its weights start with T experts."""

    method: str
    settings: Mapping[str, Any]
    starts: Mapping[str, Callable[[int], float]]


def _share(experts: int) -> float:
    return 1 / experts


FORMS = {
    "delta": Form("task_arithmetic", {}, {"weight": _share}),
    "apart": Form("lors_parts", {"orthogonal": False}, {"weight": _share, "sparse_weight": _share}),
    "orthogonal": Form("lors_parts", {}, {"weight": lambda experts: 1.0, "sparse_weight": _share}),
}


@dataclass(frozen=True)
class Learning:
    """parts: of delta, one of FORMS. batch_size: recordings of a step, of all experts together as many of each."""

    parts: str = "delta"
    steps: int = 120
    batch_size: int = 16
    learning_rate: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if self.parts not in FORMS:
            raise LorsError(f"parts: expected {', '.join(FORMS)}, got {self.parts!r}{nearest(self.parts, FORMS)}")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise LorsError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf"):
            raise LorsError(f"learning_rate: expected a positive number, got {self.learning_rate!r}")


def learn(
    base: str,
    experts: Mapping[str, str],
    out: Path,
    *,
    data: str | Corpus,
    languages: Mapping[str, str],
    tasks: Sequence[str] = ("transcribe",),
    how: Learning | None = None,
    split: str = "train",
    limit: int | None = 100,
    device: str = "cpu",
    cache: str | Path | None = None,
    sample_seed: int = 0,
    force: bool = False,
    progress: bool = False,
) -> Path:
    """Writes a recipe with a weight per matrix and expert (and part) to `out`, and returns its path.

    experts, languages, data, split, limit: as for `calibrate`; each expert answers the `tasks` itself, texts are not looked at.
    Memory, in models of float32: the experts, their parts, the merged one and what a step of training takes. LorsError for what is
    not there, and then nothing is written.
    """
    how = how or Learning()
    require_file(out, LEARNED, force)
    left_out = LeftOut(SHARE)
    with kept_in(cache) as home:
        weights = learned_weights(
            base, experts, data=data, languages=languages, tasks=dict.fromkeys(experts, tuple(tasks)), how=how, home=home,
            left_out=left_out, split=None if isinstance(data, list) else split, limit=limit, device=device,
            sample_seed=sample_seed, progress=progress,
        )  # fmt: skip
    settings = settings_of(how.parts, weights)
    recipe = Recipe.from_arguments(base, experts, FORMS[how.parts].method, methods=SPECS, rest="average", **settings)
    spoken = ", ".join(dict.fromkeys(languages[name] for name in experts))
    with OutputFile(out, LEARNED, force=force) as file:
        head = f"{LEARNED.begins.decode()}: {how.steps} steps on up to {limit} recordings of each of {spoken}\n"
        file.write_text(head + recipe.to_yaml(beside=file.target.parent))
        file.commit()
    return out


def settings_of(parts: str, weights: Weights) -> dict[str, Any]:
    """What a merge by the method of these parts takes for the weights to count."""
    return dict(FORMS[parts].settings) | {
        parameter: {name: [{"filter": t, "value": x} for t, x in tensors.items()] for name, tensors in experts.items()}
        for parameter, experts in weights.items()
    }


def learned_weights(
    base: str,
    experts: Mapping[str, str],
    *,
    data: str | Corpus,
    languages: Mapping[str, str],
    tasks: Mapping[str, Sequence[str]],
    how: Learning,
    home: Path,
    left_out: LeftOut,
    split: str | None = None,
    limit: int | None = 100,
    device: str = "cpu",
    sample_seed: int = 0,
    progress: bool = False,
) -> Weights:
    """The weights that `learn` writes. tasks: of each expert. home: of features."""
    quiet()
    for name, source in experts.items():
        require_languages(source, [languages[name]])
    processor, network = load_processor(base), load_model(base, device=device)
    require_room(len(projections(network)) * len(experts) * len(FORMS[how.parts].starts))
    features = Features(processor.feature_extractor, home)
    parts = {
        name: load_corpus(
            data, languages=[languages[name]], split=split, limit=limit, max_seconds=window(features.extractor),
            seed=sample_seed, left_out=left_out,
        )
        for name in experts
    }  # fmt: skip
    models = {name: load_model(source, device=device) for name, source in experts.items()}
    with bar("learning", quiet=not progress) as advance:
        heard = {
            name: list(pseudo_labels(Decoder.of(model, processor, home, left_out=left_out), parts[name], tasks[name]))
            for name, model in models.items()
        }
        left_out.require_few(name_of(data), sum(map(len, parts.values())))
        for name, items in heard.items():
            if not items:
                raise LorsError(f"{name}: expected recordings in which it hears words, got none")
        weighted = Weighted.of(network, models, how.parts)
        del models
        weighted.train(heard, features, how, advance)
    return weighted.values()


def projections(network: Any) -> set[str]:
    """Names of the matrices that have weights."""
    shapes = {name: tuple(value.shape) for name, value in network.named_parameters()}
    return set(decomposed(shapes, config=network.config.to_dict()))


def require_room(weights: int) -> None:
    """LorsError for more weights than a recipe may have: each is a mapping of two keys."""
    most = strict_yaml.MAX_VALUES // 6
    if weights > most:
        raise LorsError(
            f"learn: expected at most {most} weights, which a recipe can hold, got {weights}: fewer experts or parts"
        )


def pseudo_labels(decoder: Decoder, part: Corpus, tasks: Sequence[str]) -> Iterator[Item]:
    """Recordings with the tokens of what the model says for them, where it says something that its decoder can be asked for."""
    for task, transcribed in decoder.transcribe(part, tasks).items():
        for utterance, said in zip(part, transcribed.texts, strict=True):
            if said:
                tokens = labels(decoder.tokenizer, replace(utterance, text=said, translation=said), task)
                if len(tokens) <= decoder.model.config.max_target_positions:
                    yield utterance.audio, tokens


@dataclass
class Weighted:
    """A network whose projections are sums of parts. factors: by projection, [parts * experts], a parameter's experts together."""

    network: Any
    form: Form
    experts: tuple[str, ...]
    factors: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, network: Any, models: Mapping[str, Any], parts: str) -> Weighted:
        """`network`, the base, is changed to the merge that the weights start from."""
        import torch

        form, config = FORMS[parts], network.config.to_dict()
        found = cls(network, form, tuple(models))
        start = [begin(len(models)) for begin in form.starts.values() for _ in models]
        names = projections(network)
        states = {name: dict(model.named_parameters()) for name, model in models.items()}
        with torch.no_grad():
            for name, value in network.named_parameters():
                if name not in names:
                    value.copy_(sum(state[name] for state in states.values()) / len(states))
            base = {name: value for name, value in network.named_parameters() if name in names}
            deltas = {e: {name: (state[name] - base[name]).cpu() for name in base} for e, state in states.items()}
            directions = list(found._directions(deltas, config))
        network.requires_grad_(False)
        for name in base:
            together = torch.stack([direction.pop(name) for direction in directions]).to(network.device)
            found.factors[name] = _parametrize(network, name, together, start)
        return found

    def _directions(self, deltas: Mapping[str, dict[str, Any]], config: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What a weight of 1 adds: for each parameter, for each expert."""
        import torch

        zeros = {name: torch.zeros_like(value) for name, value in next(iter(deltas.values())).items()}
        for parameter in self.form.starts:
            for expert in deltas:
                weights: dict[str, Any] = {
                    p: {e: float((p, e) == (parameter, expert)) for e in deltas} for p in self.form.starts
                }
                yield merge_state_dicts(
                    zeros, deltas, self.form.method, config=config, rest="base", **self.form.settings, **weights
                )

    def train(
        self,
        heard: Mapping[str, Sequence[Item]],
        features: Features,
        how: Learning,
        advance: Callable[[int, int], None] | None = None,
    ) -> list[float]:
        """Takes the steps, and returns the loss before each."""
        import numpy as np
        import torch

        rng, each = np.random.default_rng(how.seed), max(1, how.batch_size // len(heard))
        optimiser, losses = torch.optim.Adam(self.factors.values(), lr=how.learning_rate), []
        for step in range(how.steps):
            chosen = [
                items[i]
                for items in heard.values()
                for i in rng.choice(len(items), min(each, len(items)), replace=False)
            ]
            loss = self._loss(chosen, features)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            losses.append(float(loss.detach()))
            if advance is not None:
                advance(step + 1, how.steps)
        return losses

    def _loss(self, items: Sequence[Item], features: Features) -> Tensor:
        """Mean over all tokens."""
        import numpy as np
        import torch
        from torch.nn.functional import cross_entropy
        from transformers.models.whisper.modeling_whisper import shift_tokens_right

        network, config = self.network, self.network.config
        longest = max(len(tokens) for _, tokens in items)
        target = torch.tensor([ids + [-100] * (longest - len(ids)) for _, ids in items], device=network.device)
        mel = torch.from_numpy(np.stack([features.of(audio) for audio, _ in items])).to(network.device, torch.float32)
        spoken = shift_tokens_right(target, config.pad_token_id, config.decoder_start_token_id)
        logits = network(input_features=mel, decoder_input_ids=spoken).logits
        return cross_entropy(logits.flatten(0, 1), target.flatten())

    def values(self) -> Weights:
        """The factors, of six digits."""
        found: Weights = {parameter: {name: {} for name in self.experts} for parameter in self.form.starts}
        pairs = [(parameter, name) for parameter in self.form.starts for name in self.experts]
        for tensor, factors in self.factors.items():
            for (parameter, name), value in zip(pairs, factors.tolist(), strict=True):
                found[parameter][name][tensor] = float(f"{value:.6g}")
        return found


def _parametrize(network: Any, name: str, parts: Tensor, start: Sequence[float]) -> Tensor:
    """Makes a weight the sum of itself and of factors times parts [k, m, n]; the factors [k], to be trained."""
    import torch
    from torch.nn.utils.parametrize import register_parametrization

    class Sum(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factors = torch.nn.Parameter(torch.tensor(start, device=parts.device))

        def forward(self, weight: Tensor) -> Tensor:
            return weight + torch.tensordot(self.factors, parts, 1)

    module, _, kind = name.rpartition(".")
    added = Sum()
    register_parametrization(network.get_submodule(module), kind, added)
    return added.factors
