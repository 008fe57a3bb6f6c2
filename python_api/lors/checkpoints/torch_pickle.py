"""What the pickle of a torch archive describes, without running it.

A pickle is a program for a stack machine. This one knows the operations that ``torch.save`` writes for tensors and plain
values, and a dozen names, each of which stands for a description: calling `_rebuild_tensor_v2` gives a `Tensor`, a tuple
that says which storage holds what. Nothing is imported, no object of the file's choosing is made, hashed, compared or
shown, and keys are strings. So what a pickle costs is bounded by its size and its number of operations.

torch's own loader (``weights_only=True``) runs no code either, but it hashes keys of any kind: a tuple that holds itself
twice, 60 times over, never ends there, and one that is nested a million deep is a SIGSEGV.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import LorsError

__all__ = ["Storage", "Tensor", "read_pickle"]

MAX_OPERATIONS = 1_000_000  # torch writes about 31 for each tensor

_STORAGES = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "ComplexDoubleStorage": "C128",
}  # fmt: skip
_DTYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL",
    "complex64": "C64", "complex128": "C128", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip


class _Type(NamedTuple):
    """A type of storages or elements, as safetensors spells it; "" for an untyped storage: its tensor says."""

    code: str


class _Function(NamedTuple):
    """A name that may be called: makes a description of its arguments."""

    make: Callable[..., Any]


class Storage(NamedTuple):
    """The bytes of the archive's member ``data/KEY``."""

    code: str
    key: str


class Tensor(NamedTuple):
    """Elements of a storage. `start`, `shape` and `stride` are whatever the file says."""

    storage: Storage
    code: str
    start: Any
    shape: Any
    stride: Any


def _tensor(
    storage: Any, start: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, _metadata: Any = None
) -> Tensor:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    return Tensor(storage, storage.code, start, shape, stride)


def _tensor_of_type(
    storage: Any, start: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, kind: Any, _metadata: Any = None
) -> Tensor:
    if not isinstance(kind, _Type):
        raise ValueError("a tensor of no type")
    return _tensor(storage, start, shape, stride, _grad, _hooks)._replace(code=kind.code)


def _parameter(tensor: Any, _grad: Any, _hooks: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError("a parameter without a tensor")
    return tensor


_NAMES: dict[str, _Type | _Function] = {
    "collections.OrderedDict": _Function(lambda: {}),
    "torch._utils._rebuild_tensor_v2": _Function(_tensor),
    "torch._utils._rebuild_tensor_v3": _Function(_tensor_of_type),
    "torch._utils._rebuild_parameter": _Function(_parameter),
    "torch.storage.UntypedStorage": _Type(""),
    **{f"torch.{name}": _Type(code) for name, code in (_STORAGES | _DTYPES).items()},
}


def read_pickle(data: bytes) -> Any:
    """What the pickle describes: `Tensor`s in dictionaries, lists and tuples, beside plain values.

    Values may be nested to any depth and share parts, so that showing, comparing or copying them may never end.
    LorsError, without the file's name, for an operation or name that describing tensors does not take; ValueError when
    the pickle is damaged.
    """
    machine = _Machine()
    for number, (operation, argument, _) in enumerate(pickletools.genops(data)):
        if number == MAX_OPERATIONS:
            raise LorsError(f"its pickle has more than {MAX_OPERATIONS:,} operations")
        run = _OPERATIONS.get(operation.name)
        if run is None:
            raise LorsError(f"refused: its pickle uses {operation.name}, which describing tensors does not take")
        run(machine, argument)
    return machine.pop(1)[0]


class _Machine:
    """The stack, where marks begin groups of values, and the memo, by which values are used again."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, count: int) -> list[Any]:
        """The last values, none of them from before the last mark."""
        at = len(self.stack) - count
        if at < (self.marks[-1] if self.marks else 0):
            raise ValueError("a value is missing")
        found = self.stack[at:]
        del self.stack[at:]
        return found

    def group(self) -> list[Any]:
        """The values since the last mark."""
        if not self.marks:
            raise ValueError("a mark is missing")
        found = self.pop(len(self.stack) - self.marks[-1])
        self.marks.pop()
        return found

    def name(self, path: Any) -> None:
        found = _NAMES.get(path)
        if found is None:
            raise LorsError(
                f"refused: its pickle asks for {path}, which could run code; only plain tensors are read (save the state "
                "dict alone, or convert it to safetensors)"
            )
        self.push(found)

    def name_of_two(self) -> None:
        module, name = self.pop(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is no string")
        self.name(f"{module}.{name}")

    def call(self) -> None:
        function, arguments = self.pop(2)
        if not isinstance(function, _Function) or not isinstance(arguments, tuple):
            raise ValueError("a call of something else than a function")
        try:
            self.push(function.make(*arguments))
        except TypeError:
            raise ValueError("a call with another number of arguments than torch gives") from None

    def storage(self) -> None:
        (identity,) = self.pop(1)
        if not isinstance(identity, tuple) or len(identity) != 5:
            raise ValueError("an unreadable storage")
        kind, code, key, _location, _count = identity
        if not (isinstance(kind, str) and kind == "storage" and isinstance(code, _Type) and isinstance(key, str)):
            raise ValueError("an unreadable storage")
        self.push(Storage(code.code, key))

    def remember(self, index: int) -> None:
        (self.memo[index],) = found = self.pop(1)
        self.stack += found

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError(f"nothing at {index} in the memo")
        self.push(self.memo[index])

    def extend(self, values: list[Any]) -> None:
        self.target(list).extend(values)

    def update(self, items: list[Any]) -> None:
        keys = items[::2]
        if not all(isinstance(key, str) for key in keys):
            raise ValueError("expected strings as keys")
        self.target(dict).update(zip(keys, items[1::2], strict=True))

    def build(self) -> None:
        """The state of an OrderedDict, in which a module keeps versions: nothing of it is wanted."""
        self.pop(1)
        if not self.stack or not isinstance(self.stack[-1], dict):
            raise LorsError(
                "refused: its pickle uses BUILD on something else than a dictionary, which could change code"
            )

    def target(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise ValueError(f"a {kind.__name__} is missing")
        return self.stack[-1]


_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, _: None),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
        lambda machine, argument: machine.push(argument),
    ),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.group())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.pop(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.pop(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.pop(3))),
    "APPEND": lambda machine, _: machine.extend(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.group()),
    "SETITEM": lambda machine, _: machine.update(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.update(machine.group()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda machine, index: machine.remember(index)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, index: machine.recall(index)),
    "MEMOIZE": lambda machine, _: machine.remember(len(machine.memo)),
    "GLOBAL": lambda machine, path: machine.name(path.replace(" ", ".")),
    "STACK_GLOBAL": lambda machine, _: machine.name_of_two(),
    "BINPERSID": lambda machine, _: machine.storage(),
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
}
