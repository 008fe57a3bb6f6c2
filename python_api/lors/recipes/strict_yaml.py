"""YAML text to plain data, with a one-line error at line and column for anything but one sane document.

On top of PyYAML's safe loader: no key twice in a mapping, keys are strings, and limits on size, depth and the number of
values after aliases are expanded (a "billion laughs" file is small on disk).

PyYAML reads YAML 1.1, where 010 is 8, 1:30 is 90 and no is false; in YAML 1.2 they are 10 and words. A value that the two
do not read alike is refused, and so is every type but text, numbers, true, false and null.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from ..errors import LorsError, shown

__all__ = ["MAX_BYTES", "MAX_DEPTH", "MAX_VALUES", "parse"]

MAX_BYTES = 1 << 20
MAX_VALUES = 50_000
MAX_DEPTH = 32

# Kinds of scalars, and how one is written that YAML 1.1 and 1.2 read alike.
_ALIKE = {
    "str": re.compile(r".*", re.DOTALL),
    "int": re.compile(r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+"),
    "float": re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "null": re.compile(r"null|Null|NULL|~|"),
}


def parse(text: str, file: str) -> object:
    """The document in `text`; `file` is what messages call it."""
    if len(text) > MAX_BYTES:
        raise LorsError(f"{file}: expected a recipe of at most {MAX_BYTES} characters, got {len(text)}")
    try:
        loader = _Loader(text, file)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _Check(file).visit(node, 0)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        said = (error.context, error.problem) if (error.problem or "").startswith("but ") else (error.problem,)
        problem = ", ".join(" ".join(part.split()) for part in said if part)
        raise LorsError(
            f"{_place(file, error.problem_mark or error.context_mark)}: not valid YAML: {problem}"
        ) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        code = ord(text[error.position])
        raise LorsError(f"{file}:{line}:{column}: not valid YAML: the character U+{code:04X} is not allowed") from None
    except RecursionError:  # the parser is recursive and comes before our own limit
        raise LorsError(f"{file}: nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # a date or an integer that PyYAML's constructors do not survive
        raise LorsError(f"{file}: not valid YAML: {error}") from None


class _Loader(yaml.SafeLoader):
    """Stops at the first value too many: PyYAML takes half a minute and 250 MB for a megabyte of commas."""

    def __init__(self, text: str, file: str) -> None:
        super().__init__(text)
        self.file, self.values = file, 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.values += 1
        if self.values > MAX_VALUES:
            raise LorsError(f"{_place(self.file, self.peek_event().start_mark)}: has more than {MAX_VALUES} values")
        return super().compose_node(parent, index)


def _place(file: str, mark: yaml.Mark | None) -> str:
    return f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file


class _Check:
    """Walks the node graph as the constructor will: an aliased node counts every time it is used."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.values = 0

    def visit(self, node: yaml.Node, depth: int) -> None:
        self.values += 1
        if depth > MAX_DEPTH:
            raise LorsError(f"{_place(self.file, node.start_mark)}: nested deeper than {MAX_DEPTH} levels")
        if self.values > MAX_VALUES:
            raise LorsError(f"{_place(self.file, node.start_mark)}: expands to more than {MAX_VALUES} values")
        self.kind(node)
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self.visit(item, depth + 1)
        elif isinstance(node, yaml.MappingNode):
            self.keys([key for key, _ in node.value])
            for _, value in node.value:
                self.visit(value, depth + 1)

    def kind(self, node: yaml.Node) -> None:
        """LorsError unless the node is of a kind that JSON has too, and is read alike by YAML 1.1 and 1.2."""
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind == node.tag or kind in ("seq", "map"):
            return  # a tag of somebody's own: the constructor refuses it
        place = _place(self.file, node.start_mark)
        if kind not in _ALIKE:
            got = f", got {shown(node.value)} (quote it if it is text)" if isinstance(node, yaml.ScalarNode) else ""
            raise LorsError(f"{place}: a value of the kind {kind!r} is not supported{got}")
        if isinstance(node, yaml.ScalarNode) and not _ALIKE[kind].fullmatch(node.value):
            write = "true or false" if kind == "bool" else "a decimal number"
            raise LorsError(
                f"{place}: {shown(node.value)} means one thing in YAML 1.1 and another in 1.2: write {write}, or quote it if "
                "it is text"
            )

    def keys(self, keys: list[yaml.Node]) -> None:
        first: dict[str, yaml.Node] = {}
        for key in keys:
            place = _place(self.file, key.start_mark)
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                got = shown(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                raise LorsError(f"{place}: expected a word as key, got {got} (quote it if it is one)")
            if key.value in first:
                line = first[key.value].start_mark.line + 1
                raise LorsError(f"{place}: the key {shown(key.value)} was already given in line {line}")
            first[key.value] = key
