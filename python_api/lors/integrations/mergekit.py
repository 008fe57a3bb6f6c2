"""mergekit: our methods in its registry, our selection under its own methods, its Whisper architecture repaired.

    import lors.integrations.mergekit as bridge
    bridge.register()        # merge_method: any of METHODS, in any mergekit configuration
    with bridge.accelerate():  # ties, breadcrumbs, breadcrumbs_ties: same results, without the sort
        ...

`lors mergekit-yaml CONFIG OUT [flags]` does both and then is mergekit's own command.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..checkpoints import layers
from ..errors import LorsError
from ..methods import SPECS, rest_of
from ..recipes.parameters import REQUIRED, MethodSpec, ParameterSpec
from .peers import Swap, largest_entries, peer

OLDEST = "0.1.5"
METHODS = ("lors", "svp", "magnitude_prune", "tsv", "iso_c", "iso_cts", "wudi")
PROCESSOR_FILES = ("processor_config.json", "generation_config.json")

_swap = Swap("mergekit")
_registered: list[Callable[[], None]] = []  # what undoes register()


def register() -> None:
    """Adds `METHODS` to mergekit's registry and repairs its Whisper architecture where it is broken.

    LorsError: mergekit is missing or older than 0.1.5, or register() was called before.
    """
    if _registered:
        raise LorsError("mergekit: register was called twice; expected unregister in between")
    _mergekit()
    from mergekit.merge_methods import registry

    taken = [name for name in METHODS if name in registry._METHODS]
    if taken:
        raise LorsError(f"mergekit: expected no method of the names we add, got {', '.join(taken)} in its registry")
    for name in METHODS:
        registry.register(_method(SPECS[name]))
        _registered.append(lambda name=name: registry._METHODS.pop(name))  # type: ignore[misc]
    _repair_whisper()


def unregister() -> None:
    """Undoes `register`: registry and architecture are as they were."""
    if not _registered:
        raise LorsError("mergekit: unregister was called without register")
    while _registered:
        _registered.pop()()


def accelerate() -> Swap:
    """Replaces mergekit's magnitude selections by exact selection without a sort; a context manager, or `restore`.

    Results are the same but for ties: of equal magnitudes the first in row-major order are kept, where mergekit's
    unstable sort leaves it open. Tensors with NaN, with gradients or on devices without a kernel take mergekit's way.
    """
    _mergekit()
    from mergekit import sparsify

    return _swap.accelerate(
        {sparsify.magnitude: _magnitude(sparsify), sparsify.magnitude_outliers: _magnitude_outliers(sparsify)}
    )


def restore() -> None:
    """mergekit's own selections again."""
    _swap.restore()


def mergekit_yaml(arguments: Sequence[str]) -> None:
    """mergekit's command `mergekit-yaml CONFIG OUT [flags]` with our methods and our selection.

    What mergekit raises is a LorsError that says the same; a wrong option raises what its command line reader does.
    """
    register()
    try:
        with accelerate():
            from mergekit.scripts.run_yaml import main

            main(args=list(arguments), prog_name="lors mergekit-yaml", standalone_mode=False)
    except LorsError:
        raise
    except Exception as error:
        if hasattr(error, "format_message") or type(error).__name__ == "Abort":  # a wrong option, Ctrl-C
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise LorsError(f"mergekit: {said} (LORS_TRACEBACK=1 shows where)") from error
    finally:
        unregister()


def _mergekit() -> None:
    peer("mergekit", "mergekit", OLDEST, "peers")


# --- our methods in their registry -----------------------------------------------------------------------------------


def _method(spec: MethodSpec) -> Any:
    from mergekit.merge_methods.base import BasePolicy, GroupMergeMethod, InputContract, MergeMethodSpec

    class Method(GroupMergeMethod):  # type: ignore[misc]
        def __init__(self) -> None:
            self.spec = MergeMethodSpec(
                name=spec.name,
                pretty_name=spec.name,
                parameters=tuple(_parameter(p) for p in spec.parameters),
                contract=InputContract(base=BasePolicy.REQUIRED),
            )

        def merge_group(self, group: Any, /, **parameters: Any) -> Any:
            return _merge(spec, group, parameters)

    return Method()


def _parameter(parameter: ParameterSpec) -> Any:
    from mergekit.merge_methods.base import MISSING
    from mergekit.merge_methods.base import ParameterScope as Scope
    from mergekit.merge_methods.base import ParameterSpec as TheirSpec

    # a rank is a float to mergekit, or else gradients over depth could not be interpolated
    kind: Any = {"float": float, "rank": float, "int": float, "bool": bool, "str": str}[parameter.kind]
    scope = Scope.SHARED if parameter.scope == "global" else Scope.NON_BASE
    default = MISSING if parameter.default is REQUIRED else parameter.default
    kind = kind if default is not None else kind | None
    return TheirSpec(parameter.name, kind, scope, default=default, description=parameter.help)


def _merge(spec: MethodSpec, group: Any, parameters: Mapping[str, Any]) -> Any:
    """One output tensor of mergekit: the projection matrices by the method, all others as the method's `rest` says."""
    from ..merging.in_memory import merge_state_dicts

    base, entries = group.base.tensor, group.non_base
    if not entries:
        return base
    name = group.metadata.name or "tensor"
    labels = {entry.id: f"{index}: {entry.id}" for index, entry in enumerate(entries)}
    settings = {p.name: _value(p, parameters[p.name], labels) for p in spec.parameters}
    decomposed = layers.is_projection(name, tuple(base.shape))
    if not decomposed:
        models = [{"weight": settings["weight"][label]} for label in labels.values()]
        terms = rest_of(spec.rest, models, settings)
        settings = {"weight": {label: term.weight for label, term in zip(labels.values(), terms, strict=True)}}
    merged = merge_state_dicts(
        {name: base.detach().cpu()},
        {labels[entry.id]: {name: entry.tensor.detach().cpu()} for entry in entries},
        spec.name if decomposed else "task_arithmetic",
        target={"include": ["."]} if decomposed else None,
        **settings,
    )
    return merged[name].to(base.device)


def _value(parameter: ParameterSpec, value: Any, labels: Mapping[Any, str]) -> Any:
    if isinstance(value, Mapping):
        return {labels[key]: parameter.settle(one) for key, one in value.items() if one is not None}
    return parameter.settle(value)


# --- their Whisper ---------------------------------------------------------------------------------------------------


def _repair_whisper() -> None:
    """mergekit 0.1.5 lacks a dot behind the decoder's prefix, so that no name of the decoder exists, and leaves out the
    files without which the result has no processor and no generation settings."""
    from mergekit.architecture.json_definitions import NAME_TO_ARCH

    for architecture in NAME_TO_ARCH.get("WhisperForConditionalGeneration", ()):
        for name, module in list(architecture.modules.items()):
            if module.weight_prefix and not module.weight_prefix.endswith("."):
                fixed = module.model_copy(update={"weight_prefix": module.weight_prefix + "."})
                _set(architecture.modules, name, fixed)
        files = list(architecture.tagalong_files or [])
        if missing := [file for file in PROCESSOR_FILES if file not in files]:
            _set(architecture.__dict__, "tagalong_files", files + missing)


def _set(place: dict[str, Any], key: str, value: Any) -> None:
    before = place[key]
    place[key] = value
    _registered.append(lambda: place.__setitem__(key, before))


# --- our selection under their methods -------------------------------------------------------------------------------


def _magnitude(sparsify: Any) -> Callable[..., Any]:
    theirs = sparsify.magnitude

    def magnitude(tensor: Any, density: float, rescale_norm: Any = None) -> Any:
        if not 0 < density < 1:
            return theirs(tensor, density, rescale_norm)
        kept = largest_entries(tensor, max(1, int(density * tensor.numel())))
        return (
            theirs(tensor, density, rescale_norm) if kept is None else _rescaled(sparsify, tensor, kept, rescale_norm)
        )

    return magnitude


def _magnitude_outliers(sparsify: Any) -> Callable[..., Any]:
    theirs = sparsify.magnitude_outliers

    def magnitude_outliers(tensor: Any, density: float, rescale_norm: Any = None, gamma: float = 0.01) -> Any:
        size = tensor.numel()
        count, top = int(density * size), int(gamma * size)
        if density >= 1 or count < 0 or top < 0:
            return theirs(tensor, density, rescale_norm, gamma)
        kept = largest_entries(tensor, count, min(top, size - count))
        if kept is None:
            return theirs(tensor, density, rescale_norm, gamma)
        return _rescaled(sparsify, tensor, kept, rescale_norm)

    return magnitude_outliers


def _rescaled(sparsify: Any, tensor: Any, kept: Any, norm: Any) -> Any:
    # with a norm to restore their arithmetic is kept, bit for bit
    return kept if norm is None else sparsify.rescaled_masked_tensor(tensor, (kept != 0).to(tensor.dtype), norm)
