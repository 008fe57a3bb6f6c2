"""What the layers of experts read on unlabelled recordings of their languages: statistics for the method `regmean`.

An expert transcribes the recordings of its language, greedily and one at a time, as it would at work; of every attention and MLP
projection the mean of x x^T over its inputs x is kept: of the encoder over the frames of its window, of the decoder over the tokens.

`plus` (RegMean++, arXiv 2508.03121): layer by layer, the encoder's first, each expert's layer reads what the layers below give when
they are merged already, by the method itself at its defaults; embeddings, convolutions, norms and biases are averaged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LorsError
from ..experts.statistics import write_statistics
from ..files.writing import writing
from ..methods import SPECS
from ..methods.regmean import shrink
from ..progress import bar
from .data.corpus import load_corpus
from .data.features import Features, kept_in
from .data.left_out import SHARE, LeftOut
from .data.loading import load_in_order
from .data.utterance import Corpus
from .model.tokens import language_token
from .model.whisper import load_model, load_processor, quiet, require_languages

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Reading", "calibrate"]

_LAYER = re.compile(r"model\.(encoder|decoder)\.layers\.\d+\.")


def calibrate(
    base: str,
    experts: Mapping[str, str],
    out: Path,
    *,
    data: str | Corpus,
    languages: Mapping[str, str],
    split: str = "train",
    limit: int | None = 100,
    plus: bool = False,
    device: str = "cpu",
    cache: str | Path | None = None,
    sample_seed: int = 0,
    force: bool = False,
    progress: bool = False,
) -> dict[str, Path]:
    """Writes ``NAME.stats.safetensors`` into `out` for every expert; name -> file.

    experts: name -> model. languages: name -> the code of what the expert is for. data, split, limit: utterances, as for
    `load_corpus`; their texts are not looked at. LorsError for what is not there, and then nothing is written.
    """
    quiet()
    for name, source in experts.items():
        require_languages(source, [languages[name]])
    left_out = LeftOut(SHARE)
    parts = {
        name: load_corpus(
            data, languages=[languages[name]], split=None if isinstance(data, list) else split, limit=limit,
            seed=sample_seed, left_out=left_out,
        )
        for name in experts
    }  # fmt: skip
    models = {name: load_model(source, device=device) for name, source in experts.items()}
    with kept_in(cache) as home, bar("reading", quiet=not progress) as advance:
        reading = Reading(Features(load_processor(base).feature_extractor, home), parts, languages, left_out, advance)
        found = reading.in_turn(models) if plus else reading.at_once(models)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    paths = {name: out / f"{name}.stats.safetensors" for name in experts}
    for name, means in found.items():
        inputs = {f"{module}.weight": key for module, key in keys_of(models[name]).items()}
        words = f"{len(parts[name])} utterances of {languages[name]}{', layer by layer' if plus else ''}"
        arrays = {key: mean.cpu().double().numpy() for key, mean in means.items()}
        write_statistics(paths[name], name, words, inputs, arrays, force)
    return paths


def keys_of(model: Any) -> dict[str, str]:
    """Projection -> the first projection that reads the same."""
    import torch

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and _LAYER.match(name):
            key = re.sub(r"\.self_attn\.[qkv]_proj$", ".self_attn.q_proj", name)
            key = re.sub(r"decoder\.layers\.\d+\.encoder_attn\.[kv]_proj$", "decoder.layers.0.encoder_attn.k_proj", key)
            found[name] = key
    return found


class Reading:
    """Recordings per expert, and what models read while they transcribe them."""

    def __init__(
        self,
        features: Features,
        parts: Mapping[str, Corpus],
        languages: Mapping[str, str],
        left_out: LeftOut,
        advance: Callable[[int, int], None] | None = None,
    ) -> None:
        self._features, self._parts, self._languages, self._left_out = features, parts, languages, left_out
        self._advance, self._done, self._total = advance, 0, 0

    def at_once(self, models: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
        """Expert -> key -> mean, each expert by itself."""
        self._total = sum(map(len, self._parts.values()))
        return {name: self._means(name, model, set(keys_of(model).values())) for name, model in models.items()}

    def in_turn(self, models: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
        """The same layer by layer; afterwards every model is the merged one."""
        import torch

        some = next(iter(models.values()))
        keys = keys_of(some)
        layers = list(dict.fromkeys(match[0] for name in keys if (match := _LAYER.match(name))))
        self._total = len(layers) * sum(map(len, self._parts.values()))
        found: dict[str, dict[str, Tensor]] = {name: {} for name in models}
        with torch.no_grad():
            average(models, lambda name: not _LAYER.match(name))
        for layer in layers:
            here = {module: key for module, key in keys.items() if module.startswith(layer)}
            for name, model in models.items():
                new = set(here.values()) - found[name].keys()
                found[name] |= self._means(name, model, new)
            with torch.no_grad():
                others = {n for n, _ in some.named_parameters() if n.startswith(layer)} - {f"{m}.weight" for m in here}
                average(models, others.__contains__)
                for module, key in here.items():
                    merge(models, module, [found[name][key] for name in models])
        return found

    def _means(self, name: str, model: Any, keys: set[str]) -> dict[str, Tensor]:
        """Means of one expert's recordings through a model, of the inputs of the projections in `keys`."""
        import torch

        sums: dict[str, Any] = {}
        rows: dict[str, int] = {}
        batches = load_in_order(self._parts[name], self._features, 1, 0)
        with watched(model, keys, sums, rows), torch.inference_mode():
            for batch in batches:
                self._left_out.note(batch.unusable)
                for _, features in batch.parts:
                    mel = features.to(model.device, model.dtype)
                    mask = torch.ones(mel.shape[0], mel.shape[2], dtype=torch.long, device=model.device)
                    model.generate(
                        mel, attention_mask=mask, language=language_token(self._languages[name]), task="transcribe"
                    )
                self._done += 1
                if self._advance is not None:
                    self._advance(self._done, self._total)
        self._left_out.require_few(f"recordings of {name}", len(self._parts[name]))
        if keys - rows.keys():
            raise LorsError(f"{name}: expected recordings that can be read, got none")
        return {key: (sums[key] / rows[key]).clone() for key in keys}


@contextmanager
def watched(model: Any, keys: set[str], sums: dict[str, Any], rows: dict[str, int]) -> Iterator[None]:
    """Within the block every input of the projections in `keys` is added up: x x^T in float32, and how many there were."""

    def watch(key: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def add(module: Any, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].reshape(-1, arguments[0].shape[-1]).float()
            sums[key] = sums[key].addmm_(x.T, x) if key in sums else x.T @ x
            rows[key] = rows.get(key, 0) + len(x)

        return add

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name in keys:
                stack.callback(module.register_forward_pre_hook(watch(name)).remove)
        yield


def average(models: Mapping[str, Any], chosen: Callable[[str], bool]) -> None:
    """Gives all models the mean of their parameters of some names."""
    for together in zip(*(model.named_parameters() for model in models.values()), strict=True):
        if chosen(together[0][0]):
            mean = sum(value for _, value in together) / len(together)
            for _, value in together:
                value.copy_(mean)


def merge(models: Mapping[str, Any], module: str, means: Sequence[Tensor]) -> None:
    """Gives all models the projection that `regmean` makes of theirs at its defaults."""
    from lors_kernels.dense import ridge_quotient

    alpha, ridge = (float(SPECS["regmean"].parameter(name).default) for name in ("alpha", "ridge"))  # type: ignore[union-attr, arg-type]
    weights = [model.get_submodule(module).weight for model in models.values()]
    own = [mean.double() for mean in means]
    for mean in own:
        shrink(mean, alpha)
    product: Any = sum(weight.double() @ gram for weight, gram in zip(weights, own, strict=True))
    goal: Any = sum(weight.double() for weight in weights) / len(weights)
    merged = ridge_quotient(product, sum(own), goal, ridge)  # type: ignore[arg-type]
    for weight in weights:
        weight.copy_(merged)
