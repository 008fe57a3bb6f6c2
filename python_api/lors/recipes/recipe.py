"""The recipe: which models are merged, by which method, with which parameters.

A recipe is mergekit's YAML for whole models (`merge_method`, `base_model`, `models`, `parameters`, `dtype`,
`out_dtype`) and a few keys of ours; docs/recipes.md describes every key. A parameter p is resolved as mergekit 0.1.5
does it. Its value for tensor W, at depth t in [0, 1], of model i is the first of these that says anything about W:

    models[i].parameters[p],   parameters[p],   the default that the method declares

where each of the two is

    a scalar                  the value
    [v_0, ..., v_K]           linear between its points: v at t K
    [{filter: f, value: v}]   the first item whose f is a part of W's name (no filter, or "*": every name)

`layers.positions` gives t. When a recipe is bound to its method (`methods=` on loading, or `bind`), every value in it,
inside gradients and filters too, is checked against the method's declaration and converted.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, PrivateAttr, ValidationError, field_validator

from ..errors import LorsError, SettingError, near_path, nearest, shown
from ..files.documents import first_problem
from ..files.remote import is_url
from ..public import public
from . import strict_yaml
from .entries import Document, DType, ModelEntry, Target, parse_size
from .labels import check_labels, labels_of, path_parts
from .parameters import BOOST, BOOST_MERGED, REQUIRED, REST_LAMBDA, MethodSpec, Rest, Setting
from .reading import exists, prepare

__all__ = ["Recipe", "label_of", "written_beside"]

BASE = -1  # index of a base that is an input without being listed in `models`


class Recipe(Document):
    """One merge, built by `load`, `from_yaml` or `from_arguments`; `LorsError` on what these do not accept."""

    name: str | None = None
    merge_method: str = Field(min_length=1)
    base_model: str | None = Field(default=None, min_length=1)
    models: tuple[ModelEntry, ...] = Field(min_length=1, max_length=1000)
    parameters: dict[str, Setting] = {}
    target: Target | None = None
    rest: Rest | None = None  # None: the method's own
    vocabulary: Literal["base", "union"] = "base"
    seed: int = Field(default=0, ge=0, lt=2**63)
    dtype: DType | None = None
    out_dtype: DType | None = None
    out_shard_size: str | None = None
    tokenizer_source: Literal["base"] | None = None

    _directory: Path | None = PrivateAttr(default=None)
    _file: str = PrivateAttr(default="")
    _method: MethodSpec | None = PrivateAttr(default=None)

    @field_validator("dtype", "out_dtype", mode="before")
    @classmethod
    def _without_torch(cls, value: object) -> object:
        return value.removeprefix("torch.") if isinstance(value, str) else value

    @field_validator("out_shard_size", mode="before")
    @classmethod
    def _size(cls, value: object) -> object:
        if value is not None:
            parse_size(value)
        return value if value is None else str(value)

    # --- building

    @classmethod
    def load(cls, path: str | Path, methods: Mapping[str, MethodSpec] | None = None) -> Recipe:
        """Read a recipe file. Relative model paths are looked up beside the file first."""
        path = Path(path)
        try:
            if path.exists() and not path.is_file() and not path.is_dir():  # a named pipe would be waited for
                raise LorsError(f"{path}: expected a file")
            if path.stat().st_size > strict_yaml.MAX_BYTES:
                raise LorsError(f"{path}: expected a recipe of at most {strict_yaml.MAX_BYTES} bytes")
            text = path.read_bytes().decode("utf-8-sig")
        except OSError as error:
            near = near_path(str(path)) if isinstance(error, FileNotFoundError) else ""
            raise LorsError(f"{path}: cannot read the recipe: {error.strerror or error}{near}") from None
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise LorsError(f"{path}: expected UTF-8 text, got byte 0x{byte:02x} at offset {error.start}") from None
        return cls._build(strict_yaml.parse(text, str(path)), methods, str(path), path.absolute().parent)

    @classmethod
    def from_yaml(cls, source: str | Path, methods: Mapping[str, MethodSpec] | None = None) -> Recipe:
        """A recipe from YAML text (a str) or from a file (a Path)."""
        if isinstance(source, Path):
            return cls.load(source, methods)
        return cls._build(strict_yaml.parse(source, "recipe"), methods, "recipe", None)

    @classmethod
    def from_arguments(
        cls,
        base: str | os.PathLike[str] | None,
        experts: Mapping[str, str | os.PathLike[str]],
        method: str = "lors",
        *,
        methods: Mapping[str, MethodSpec] | None = None,
        name: str | None = None,
        target: Mapping[str, object] | None = None,
        rest: str | None = None,
        vocabulary: str = "base",
        seed: int = 0,
        dtype: str | None = None,
        out_dtype: str | None = None,
        out_shard_size: str | int | None = None,
        **parameters: object,
    ) -> Recipe:
        """A recipe without a file; `experts` maps labels to paths or hub ids.

        Further keywords are parameters, `lam` stands for `lambda`, None for "not given". A mapping from experts' labels
        to values sets a parameter per expert: `weight={"ca": 1.0, "de": 0.5}`.
        """
        if not isinstance(experts, Mapping):
            raise SettingError("experts", f"expected a mapping of labels to models, got {shown(experts)}")
        for what, model in (
            ("base", "" if base is None else base),
            *((f"expert {l!r}", m) for l, m in experts.items()),
        ):
            if not isinstance(model, (str, os.PathLike)):
                raise SettingError(what, f"expected a path or hub id, got {shown(model)}")
        if "lam" in parameters and "lambda" in parameters:
            raise SettingError("parameters.lambda", "given twice, as 'lam' and as 'lambda'")
        shared: dict[str, object] = {}
        own: dict[str, dict[str, object]] = {label: {} for label in experts}
        for key, value in parameters.items():
            parameter = "lambda" if key == "lam" else key
            if not isinstance(value, Mapping) or {"value", "filter"} & set(value):
                shared |= {} if value is None else {parameter: value}
                continue
            for label, one in value.items():
                if label not in own:
                    raise SettingError(f"parameters.{parameter}", f"unknown expert {shown(label)}{nearest(label, own)}")
                own[label][parameter] = one
        models = [{"model": str(experts[label]), "name": label, "parameters": own[label]} for label in experts]
        spec = (methods or {}).get(method) if isinstance(method, str) else None
        same = [label for label, model in experts.items() if base and os.path.realpath(model) == os.path.realpath(base)]
        if spec is None or spec.base != "optional":
            for label in same:
                problem = f"expected a model that was trained from the base, got the base: {experts[label]}"
                raise SettingError(f"expert {label!r}", problem)
        elif base is not None and not same:
            # A method that needs no base averages the experts alone. To a recipe base_model is one more of its inputs, so
            # it says that it weighs nothing; the types and files of the output are the base's.
            models.append({"model": str(base), "parameters": {"weight": 0.0}})
        document: dict[str, object] = {
            "name": name,
            "merge_method": method,
            "base_model": None if base is None else str(base),
            "models": models,
            "parameters": shared,
            "target": dict(target) if isinstance(target, Mapping) else target,
            "rest": rest,
            "vocabulary": vocabulary,
            "seed": seed,
            "dtype": dtype,
            "out_dtype": out_dtype,
            "out_shard_size": out_shard_size,
        }
        return cls._build(document, methods, "", None)

    @classmethod
    def _build(
        cls, document: object, methods: Mapping[str, MethodSpec] | None, file: str, directory: Path | None
    ) -> Recipe:
        try:
            recipe = cls.model_validate(prepare(document, directory))
            recipe._directory, recipe._file = directory, file if directory is not None else ""
            check_labels(recipe.models)
            return recipe if methods is None else recipe.bind(methods)
        except ValidationError as error:
            problem: LorsError = SettingError(*_placed(*first_problem(error, _MAPPINGS, _EXPECTED), methods or {}))
        except LorsError as error:
            problem = error
        raise LorsError(f"{file}: {problem}") if file else problem

    # --- checking against the method

    def bind(self, methods: Mapping[str, MethodSpec]) -> Recipe:
        """The same recipe with every value checked against its method and converted to the parameter's type."""
        method = methods.get(self.merge_method)
        if method is None:
            known = nearest(self.merge_method, methods)
            raise SettingError("merge_method", f"unknown method {shown(self.merge_method)}{known}")
        if method.base == "required" and self.base_model is None:
            raise SettingError("base_model", f"missing; method {method.name} merges differences to a base")
        count, low, high = len(self.experts), method.min_experts, method.max_experts
        if count < low or (high is not None and count > high):
            wanted = f"at least {low}" if high is None else f"{low}" if low == high else f"{low} to {high}"
            raise SettingError("models", f"expected {wanted} besides the base for method {method.name}, got {count}")
        entries = tuple(
            entry.model_copy(update={"parameters": _checked(entry.parameters, method, i)})
            for i, entry in enumerate(self.models)
        )
        bound = self.model_copy(update={"models": entries, "parameters": _checked(self.parameters, method, None)})
        if REST_LAMBDA in bound.parameters and (self.rest or method.rest) == "base":
            raise SettingError(
                f"parameters.{REST_LAMBDA}", "expected no value with rest: base, which adds nothing there"
            )
        if self.vocabulary == "union" and self.tokenizer_source == "base":
            raise SettingError(
                "vocabulary", "expected base, or no tokenizer_source: base, which keeps the base's tokens"
            )
        bound._method = method
        return bound

    def require_parameters(self) -> None:
        """LorsError unless the recipe gives each model a value of every parameter that has no default."""
        if self._method is None:
            return
        for spec in self._method.parameters:
            if spec.default is not REQUIRED or spec.name in self.parameters:
                continue
            weighed = self.inputs if spec.scope == "global" or self._method.base == "optional" else self.experts
            for index in weighed:
                if index == BASE or spec.name not in self.models[index].parameters:
                    key = "parameters" if index == BASE else f"models[{index}].parameters"
                    raise SettingError(
                        f"{key}.{spec.name}", f"missing; method {self.merge_method} has no default for it"
                    )

    # --- reading

    @property
    def base_index(self) -> int | None:
        """Index in `models` of the base, when it is listed there too (mergekit allows it)."""
        return next((i for i, entry in enumerate(self.models) if self._is_base(entry)), None)

    @property
    def experts(self) -> tuple[int, ...]:
        """Indices in `models` of everything but the base."""
        return tuple(i for i, entry in enumerate(self.models) if not self._is_base(entry))

    @property
    def inputs(self) -> tuple[int, ...]:
        """Indices in `models` of all of them, and BASE for a base that is not among them, as mergekit adds it."""
        unlisted = (BASE,) if self.base_model is not None and self.base_index is None else ()
        return (*range(len(self.models)), *unlisted)

    @property
    def labels(self) -> tuple[str, ...]:
        """A short unique label for every entry of `models`: its `name`, or else the end of its path."""
        return labels_of(self.models)

    @property
    def base_source(self) -> str | None:
        """`base_model` as something to open."""
        return None if self.base_model is None else self._located(self.base_model)

    @property
    def sources(self) -> tuple[str, ...]:
        """Every entry of `models` as something to open: absolute if it is found beside the recipe, else as written."""
        return tuple(self._located(entry.model) for entry in self.models)

    @property
    def confined(self) -> bool:
        """Whether a method that would treat all tensors treats the target alone: one is given, or what becomes of the rest."""
        return self.target is not None or self.rest is not None or REST_LAMBDA in self.parameters

    @property
    def boosted(self) -> bool:
        """Whether matrices of the target are boosted, of experts or of the merge."""
        return BOOST_MERGED in self.parameters or any(
            BOOST in parameters for parameters in (self.parameters, *(entry.parameters for entry in self.models))
        )

    @property
    def output_dtype(self) -> str | None:
        """Type of the written weights: `out_dtype`, else `dtype`, else None (that of the base)."""
        return self.out_dtype or self.dtype

    @property
    def shard_bytes(self) -> int | None:
        """`out_shard_size` in bytes."""
        return None if self.out_shard_size is None else parse_size(self.out_shard_size)

    def resolve(
        self, name: str, *, tensor: str, model: int | None = None, position: float = 0.0, default: Any = REQUIRED
    ) -> Any:
        """Value of one parameter for one tensor.

        tensor: its name. model: index in `models`, None for a global parameter. position: its depth in [0, 1], from
        `layers.positions`. default: taken if the recipe says nothing; left out, the default that the method declares.
        `LorsError` if there is no value at all.
        """
        spec = self._method.parameter(name) if self._method else None
        places = [self.parameters] if model is None else [self.models[model].parameters, self.parameters]
        for parameters in places:
            value = parameters[name].evaluate(tensor, position) if name in parameters else None
            if value is not None:
                if spec is not None and spec.kind == "path":
                    return self._located(str(value))
                return spec.settle(value) if spec else value
        if default is REQUIRED and spec is not None:
            default = spec.default
        if default is REQUIRED:
            of_model = "" if model is None else f" of {self.labels[model]}"
            raise SettingError(
                f"parameters.{name}", f"missing for tensor {tensor}{of_model}, and {name} has no default"
            )
        return default

    def params_for(self, *, tensor: str, model: int | None = None, position: float = 0.0) -> dict[str, Any]:
        """Every parameter of the method that has a value for one tensor: those per model for a `model`, the global ones for
        None.

        `BASE` as the model is a base that is not listed: parameters per model, with the recipe's global values.
        """
        if self._method is None:
            raise TypeError("params_for: expected a recipe that is bound to its method, got an unbound one")
        scope = "global" if model is None else "model"
        names = [spec.name for spec in self._method.parameters if spec.scope == scope]
        model = None if model == BASE else model
        values = {name: self.resolve(name, tensor=tensor, model=model, position=position) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def unmatched_filters(self, tensors: Iterable[str]) -> list[str]:
        """One line for every filter that is a part of no tensor's name: it has no effect, so it is likely a mistake."""
        names = list(tensors)
        places = [("parameters", self.parameters)]
        places += [(f"models[{i}].parameters", entry.parameters) for i, entry in enumerate(self.models)]
        return [
            f"{place}.{name}: filter {shown(condition.filter)} is a part of no tensor's name"
            for place, parameters in places
            for name, setting in parameters.items()
            for condition in setting.conditions
            if not any(condition.matches(tensor) for tensor in names)
        ]

    # --- writing

    def to_dict(self, *, resolved: bool = False, beside: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """The recipe as YAML data in canonical order, without what equals its default.

        resolved: local paths are absolute. beside: the directory that the recipe is written into: local paths that were
        relative are so to it. Either way the recipe means the same from anywhere, and labels stay what they are.
        """
        data = self.model_dump(exclude_defaults=True, exclude={"models", "parameters"}, mode="json")
        entries = list(self.models)
        if resolved or beside is not None:
            if self.base_model is not None:
                data["base_model"] = self._rewritten(self.base_model, beside)
            entries = [
                entry.model_copy(
                    update={
                        "model": self._rewritten(entry.model, beside),
                        "parameters": self._with_paths(entry.parameters, beside),
                    }
                )
                for entry in entries
            ]
            renamed = zip(entries, self.labels, labels_of(entries), strict=True)
            entries = [e if new == old else e.model_copy(update={"name": old}) for e, old, new in renamed]
        data["models"] = [
            {"model": entry.model}
            | ({"name": entry.name} if entry.name is not None else {})
            | ({"parameters": _data(entry.parameters)} if entry.parameters else {})
            for entry in entries
        ]
        if self.parameters:
            data["parameters"] = _data(
                self._with_paths(self.parameters, beside) if resolved or beside is not None else self.parameters
            )
        return {key: data[key] for key in type(self).model_fields if key in data}

    def to_yaml(self, *, resolved: bool = False, beside: str | os.PathLike[str] | None = None) -> str:
        """Canonical YAML of `to_dict`; loading it gives this recipe again."""
        data = self.to_dict(resolved=resolved, beside=beside)
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)

    def published(self) -> Recipe:
        """The same recipe, its URLs without passwords and signatures: what is written where others may see it."""
        models = tuple(entry.model_copy(update={"model": public(entry.model)}) for entry in self.models)
        base = None if self.base_model is None else public(self.base_model)
        return self.model_copy(update={"models": models, "base_model": base})

    def missing(self, model: int, reason: str) -> LorsError:
        """The error for a source that is nowhere: its key, and the places where it was looked for."""
        if model == BASE:
            key, text = "base_model" if self._file else "base", str(self.base_model)
        else:
            key, text = (
                f"models[{model}].model" if self._file else f"expert {self.labels[model]!r}",
                self.models[model].model,
            )
        places = [path for path in dict.fromkeys((self._directory, Path.cwd())) if path is not None]
        relative = not (is_url(text) or _is_absolute(text))
        looked = f"; looked for in {' and in '.join(map(str, places))}" if relative else ""
        error = SettingError(key, f"{text}: {reason}{looked}{near_path(text, places)}")
        return LorsError(f"{self._file}: {error}") if self._file else error

    def _located(self, model: str) -> str:
        """`model` as something to open: absolute when it is found beside the recipe, else as it is written."""
        if self._directory is not None and exists(model, self._directory):
            return _absolute(os.path.join(self._directory, os.path.expanduser(model)))
        return os.path.expanduser(model) if model.startswith("~") and exists(model, None) else model

    def _rewritten(self, model: str, beside: str | os.PathLike[str] | None) -> str:
        """A local path as an absolute one, or, unless it was absolute, as one relative to a directory."""
        if not (exists(model, self._directory) or exists(model, None)):
            return model
        if beside is not None and _is_absolute(model):
            return model
        path = self._located(model)
        path = _absolute(path) if beside is None else _seen_from(beside, path)
        try:
            path.encode()
        except UnicodeEncodeError:
            raise LorsError(f"{path}: expected a path in UTF-8: the recipe of the result could not name it") from None
        return path

    def _with_paths(
        self, parameters: Mapping[str, Setting], beside: str | os.PathLike[str] | None
    ) -> dict[str, Setting]:
        """The same, with paths as `_rewritten` gives them."""
        paths = {spec.name for spec in self._method.parameters if spec.kind == "path"} if self._method else set()
        return {
            name: setting.mapped(lambda text: self._rewritten(text, beside)) if name in paths else setting
            for name, setting in parameters.items()
        }

    def _is_base(self, entry: ModelEntry) -> bool:
        return self.base_model is not None and Path(entry.model) == Path(self.base_model)


def _data(parameters: Mapping[str, Setting]) -> dict[str, Any]:
    return {name: setting.data() for name, setting in parameters.items()}


# --- what mergekit has and we do not ---------------------------------------------------------------------------------


def _checked(parameters: Mapping[str, Setting], method: MethodSpec, model: int | None) -> dict[str, Setting]:
    checked: dict[str, Setting] = {}
    for name, setting in parameters.items():
        place = f"parameters.{name}" if model is None else f"models[{model}].parameters.{name}"
        spec = method.parameter(name)
        if spec is None:
            known = nearest(name, [spec.name for spec in method.parameters])
            known = known.replace("'lambda'?", "'lambda' (lam in Python)?")
            raise SettingError(place, f"unknown parameter {shown(name)} of method {method.name}{known}")
        if model is not None and spec.scope == "global":
            raise SettingError(place, f"{name} is one value for the whole merge, expected it in the global parameters")
        checked[name] = setting.checked(spec, place)
    return checked


def written_beside(directory: str | os.PathLike[str], model: str) -> str:
    """How a recipe in `directory` names a model that is given in the working directory; a hub id or URL stays."""
    return model if _is_absolute(model) or not exists(model, None) else _seen_from(directory, model)


def _seen_from(directory: str | os.PathLike[str], path: str) -> str:
    return os.path.relpath(_absolute(path), os.path.realpath(directory))


def _is_absolute(path: str) -> bool:
    return os.path.isabs(os.path.expanduser(path))


def _absolute(path: str) -> str:
    """An absolute path without `..`; through symbolic links as the system goes."""
    plain = os.path.abspath(path)
    return plain if os.path.exists(plain) and os.path.samefile(plain, path) else os.path.realpath(path)


def _placed(place: str, what: str, methods: Mapping[str, MethodSpec]) -> tuple[str, str]:
    """(where, what is wrong); of a parameter that stands among the keys, where it belongs."""
    where, _, key = f".{place}".rpartition(".")
    if what.startswith("unknown key") and any(spec.parameter(key) for spec in methods.values()):
        what = f"unknown key {key!r}; it is a parameter: put it under {f'{where}.parameters'.lstrip('.')}:"
    return place, what


# --- labels ----------------------------------------------------------------------------------------------------------


def label_of(model: str) -> str:
    """What to call a model that is given without a name: the last part of its path."""
    return path_parts(model)[-1].removesuffix(".lors")


# --- pydantic's errors in one line -----------------------------------------------------------------------------------

_EXPECTED = {
    "string_type": "a string",
    "string_unicode": "a string in UTF-8",
    "string_too_short": "a string that is not empty",
    "too_short": "at least one model",
    "too_long": "at most 1000 models",
    "tuple_type": "a list",
    "model_type": "a mapping",
    "int_type": "an integer",
    "greater_than_equal": "an integer >= 0",
    "less_than": "an integer below 2**63",
}
_MAPPINGS: dict[tuple[str, ...], type[BaseModel]] = {(): Recipe, ("models",): ModelEntry, ("target",): Target}
