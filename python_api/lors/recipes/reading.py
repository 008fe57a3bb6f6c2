"""From YAML data to the fields of a recipe: what is not supported is refused by name, parameters are parsed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import LorsError, SettingError, shown
from .parameters import Setting

_NOT_SUPPORTED = {
    "slices": "because whole models are merged layer by layer; list them under 'models'",
    "modules": "because encoder and decoder are merged together; filters treat them differently",
    "chat_template": "because the base's tokenizer files are kept as they are",
}
_TOKENIZER = "because the base's tokenizer is kept and all vocabularies must be equal; only 'base' is accepted"
_LORA = "because an adapter is an expert of its own; give the adapter's directory as the model"


def prepare(document: object, directory: Path | None) -> dict[str, Any]:
    """Refuse what is not supported by name, and parse the parameters (their errors need no pydantic)."""
    if not isinstance(document, dict):
        raise LorsError(f"expected a mapping with merge_method and models, got {shown(document)}")
    data = dict(document)
    for key, reason in _NOT_SUPPORTED.items():
        if data.pop(key, None) is not None:
            raise SettingError(key, f"not supported by lors, {reason}")
    tokenizer = data.pop("tokenizer", None)
    if tokenizer not in (None, {"source": "base"}):
        raise SettingError("tokenizer", f"not supported by lors, {_TOKENIZER}")
    if data.get("tokenizer_source") not in (None, "base"):
        raise SettingError(
            "tokenizer_source", f"{shown(data['tokenizer_source'])} is not supported by lors, {_TOKENIZER}"
        )
    _check_reference(data.get("base_model"), "base_model", directory)
    data["parameters"] = _parse_parameters(data.get("parameters"), "parameters")
    if isinstance(data.get("models"), list):
        data["models"] = tuple(_prepare_entry(entry, i, directory) for i, entry in enumerate(data["models"]))
    return data


def _prepare_entry(entry: object, index: int, directory: Path | None) -> dict[str, Any]:
    if not isinstance(entry, dict):
        example = entry if isinstance(entry, str) and entry.isprintable() else "PATH"
        raise SettingError(f"models[{index}]", f"expected a mapping such as {{model: {example}}}, got {shown(entry)}")
    _check_reference(entry.get("model"), f"models[{index}].model", directory)
    return entry | {"parameters": _parse_parameters(entry.get("parameters"), f"models[{index}].parameters")}


def _check_reference(value: object, place: str, directory: Path | None) -> None:
    """A model is one string; mergekit's PATH+LORA and its mappings are refused, unless such a path exists."""
    if isinstance(value, dict):
        reason = _LORA if value.get("lora") is not None else "because a model is a path, a hub id or ID@REVISION"
        raise SettingError(place, f"a mapping is not supported by lors, {reason}")
    if not isinstance(value, str) or exists(value, directory) or exists(value, None):
        return
    if "+" in value:
        raise SettingError(place, f"LoRA syntax {shown(value)} is not supported by lors, {_LORA}")
    if value.count("@") > 1:
        raise SettingError(place, f"expected at most one '@REVISION', got {shown(value)}")


def _parse_parameters(raw: object, place: str) -> dict[str, Setting]:
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise SettingError(place, f"expected a mapping from parameters to values, got {shown(raw)}")
    return {str(name): Setting.parse(value, f"{place}.{name}") for name, value in raw.items()}


def exists(model: str, directory: Path | None) -> bool:
    # os.path.exists, because a string that can be no path (too long, a null character) is False there and not an error
    return os.path.exists(os.path.join(directory or "", os.path.expanduser(model)))
