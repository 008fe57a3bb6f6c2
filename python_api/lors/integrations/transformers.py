"""transformers: a merged model in memory, without a directory in between."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from typing_extensions import Unpack

from ..errors import LorsError, first_line, shown
from ..recipes.settings import Settings
from .peers import peer

OLDEST = "4.45"


def load_merged(
    base: str | os.PathLike[str],
    experts: Mapping[str, str | os.PathLike[str]],
    method: str = "lors",
    *,
    model_class: type | None = None,
    backend: str | None = None,
    threads: int | None = None,
    **settings: Unpack[Settings],
) -> Any:
    """The model that `lors.merge` would write, as `from_pretrained` would load it; nothing is written to the disk.

    Args:
        base, experts, method, backend, threads, settings: as for `lors.merge`. The weights have the type of `dtype` or
            `out_dtype`, else the base's.
        model_class: a class of transformers [default: what the base's config.json names].

    Raises LorsError: as `lors.merge`; no config.json beside the base's weights, or a class transformers has not got.
    """
    transformers = peer("transformers", "transformers", OLDEST, "speech")
    if model_class is not None and not hasattr(model_class, "from_pretrained"):
        raise LorsError(f"model_class: expected a class of transformers, got {model_class!r}")
    from ..merging.in_memory import merge_in_memory

    merged, checkpoint = merge_in_memory(base, experts, method, backend=backend, threads=threads, **settings)
    directory = checkpoint.directory
    if checkpoint.config is None or directory is None:
        raise LorsError(f"{base}: expected a config.json beside the weights, got none")
    model_class = model_class or _class_of(transformers, checkpoint.config)
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise LorsError(f"{directory}: transformers cannot read its config.json: {first_line(error)}") from error
    tensors = {name: _torch(array) for name, array in merged.items()}
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    options = {"dtype": dtypes.pop()} if len(dtypes) == 1 else {}
    model = model_class.from_pretrained(None, config=config, state_dict=tensors, **options)  # type: ignore[attr-defined]
    if (directory / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    return model.eval()


def _class_of(transformers: Any, config: Mapping[str, Any]) -> type:
    names = config.get("architectures") or []
    for name in names:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    raise LorsError(
        f"config.json: expected a class of transformers under architectures, got {shown(names)}; pass model_class"
    )


def _torch(array: Any) -> Any:
    from lors_kernels.arrays import to_torch

    return to_torch(array)
