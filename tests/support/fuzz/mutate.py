"""Mutations of files: bits, bytes, lengths, the words and numbers that formats are made of, and the types of values.

`repickled` and `resealed` mend the checksums afterwards, so that what was changed is what is read.
"""

from __future__ import annotations

import copy
import io
import json
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lors.experts.expert_file import CHECKS, CHUNK, KEY, Layout, seal

_NUMBERS = (0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(10**30))
_WORDS = (
    b"null", b"true", b"[]", b"{}", b'""', b"NaN", b"Infinity", b"-0", b"1e400", b'"F16"', b'"BF16"', b'"F64"', b'"I8"',
    b"\\u0000", b"\xff", b"../", b"\n", b"[" * 2000, b"{\"a\":" * 500, b"&a [*a]", b"!!python/object:os.system", b"<<: *x",
)  # fmt: skip


def mutate(content: bytes, seed: int, header: int | None = None) -> bytes:
    """One to three mutations; half of them within the first `header` bytes, where the meaning is."""
    rng = random.Random(seed)
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        end = min(len(data), header) if header and rng.random() < 0.5 else len(data)
        rng.choice(_MUTATIONS)(data, rng, max(1, end))
    return bytes(data)


def _flip(data: bytearray, rng: random.Random, end: int) -> None:
    if data:
        data[rng.randrange(min(end, len(data)))] ^= 1 << rng.randrange(8)


def _overwrite(data: bytearray, rng: random.Random, end: int) -> None:
    at = rng.randrange(end)
    data[at : at + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(1, 9))


def _cut(data: bytearray, rng: random.Random, end: int) -> None:
    at = rng.randrange(end)
    del data[at : at + rng.choice((1, 2, 8, 100, len(data)))]


def _repeat(data: bytearray, rng: random.Random, end: int) -> None:
    at = rng.randrange(end)
    data[at:at] = data[at : at + rng.choice((1, 8, 64, 1000))]


def _length(data: bytearray, rng: random.Random, end: int) -> None:
    data[:8] = (rng.choice(_NUMBERS) % 2**64).to_bytes(8, "little")


def _number(data: bytearray, rng: random.Random, end: int) -> None:
    found = list(re.finditer(rb"-?\d+(\.\d+)?", bytes(data[:end])))
    if found:
        spot = rng.choice(found)
        data[spot.start() : spot.end()] = str(rng.choice(_NUMBERS)).encode()


def _word(data: bytearray, rng: random.Random, end: int) -> None:
    found = list(re.finditer(rb'"[^"]*"|[A-Za-z_]+', bytes(data[:end])))
    if found:
        spot = rng.choice(found)
        other = rng.choice(found)
        data[spot.start() : spot.end()] = rng.choice((*_WORDS, other[0], other[0]))


_MUTATIONS: tuple[Callable[[bytearray, random.Random, int], None], ...] = (
    _flip, _overwrite, _cut, _repeat, _length, _number, _number, _word, _word,
)  # fmt: skip


# --- types of values -------------------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 1.5, -0.0, 1e308, 2**31, 2**53, 2**63, -(2**63), 10**400, "", "x", "NaN", "../..", "\x1b[2J",
    "\u202e", "\ud800", "<b>|`", "a" * 300, "(a+)+$", [], {}, [1], ["x"], [[]], {"a": 1}, {"": None}, [0] * 70, [2**62, 0],
)  # fmt: skip


def places(document: Any) -> list[tuple[Any, ...]]:
    """The path of every value of a document, that of the whole, (), first."""
    found: list[tuple[Any, ...]] = [()]
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        found += [(key, *path) for path in places(value)]
    return found


def replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at a place."""
    if not path:
        return value
    document = copy.deepcopy(document)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return document


def swap(document: Any, rng: random.Random) -> Any:
    """A value of another type, one value for another, or a key more, less or called otherwise."""
    document = copy.deepcopy(document)
    path = rng.choice(places(document))
    if not path or (choice := rng.randrange(6)) < 3:
        return replaced(document, path, rng.choice(VALUES))
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    key, value = path[-1], inner[path[-1]]
    if choice == 3:
        del inner[key]
    elif choice == 4 and isinstance(inner, dict):
        inner[rng.choice(("more", "", "\x1b", key + "x", key.upper()))] = (
            inner.pop(key) if rng.random() < 0.5 else value
        )
    else:
        other = rng.choice(places(document))
        found = document
        for step in other:
            found = found[step]
        inner[key] = copy.deepcopy(found)
    return document


def swapped(content: bytes, seed: int, header: int | None = None) -> bytes:
    """JSON with one to three values swapped; every fourth time mutated as bytes."""
    rng = random.Random(seed)
    if rng.random() < 0.25:
        return mutate(content, seed, header)
    document = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        document = swap(document, rng)
    return json.dumps(document).encode()


# --- checksums mended ------------------------------------------------------------------------------------------------

_OPCODES = (
    b"().012INUVXZ]abcdehjloqrstu}\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8f\x90\x93\x94\x95BCFGHJKLMPQRST"
)


def repickled(content: bytes, seed: int, header: int | None = None) -> bytes:
    """A torch archive whose pickle is mutated, in a sound zip file; or a field of the zip file's records, or any bytes."""
    rng = random.Random(seed)
    if (choice := rng.random()) < 0.4:
        return mutate(content, seed, None) if choice < 0.1 else _refield(content, rng)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, _pickle(data, rng) if name.endswith("data.pkl") else data)
    return stream.getvalue()


def _refield(content: bytes, rng: random.Random) -> bytes:
    """Another number in one to three fields of a zip file's records: local, central, end, and those of zip64."""
    data = bytearray(content)
    if rng.random() < 0.3:  # zip64's records, as they would be
        at = len(data) - 22
        size, start = (int.from_bytes(data[at + field : at + field + 4], "little") for field in (12, 16))
        record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, data[at + 8], data[at + 8], size, start)
        data[at:at] = record + struct.pack("<4sLQL", b"PK\x06\x07", 0, at, 1)
    records = [
        found.start() for found in re.finditer(rb"PK(\x01\x02|\x03\x04|\x05\x06|\x06\x06|\x06\x07)", bytes(data))
    ]
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.choice(records) + rng.randrange(4, 50, 2)
        width = rng.choice((2, 4, 4, 8))
        data[at : at + width] = (rng.choice(_NUMBERS) % 256**width).to_bytes(width, "little")
    return bytes(data)


def _pickle(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return mutate(data, rng.randrange(2**32), None)
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(changed))
        if rng.random() < 0.5:
            changed[at] = rng.choice(_OPCODES)
        else:
            changed[at:at] = bytes([rng.choice(_OPCODES)]) * rng.choice((1, 1, 2, 1000))
    return bytes(changed)


def resealed(content: bytes, seed: int, header: int | None = None) -> bytes:
    """An expert file with other metadata or other values, under checksums that are right."""
    rng = random.Random(seed)
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    text = entries["__metadata__"][KEY]
    if rng.random() < 0.5:
        return sealed(content, json.dumps(swap(json.loads(text), rng)))
    changes = {}
    for _ in range(rng.choice((1, 3))):
        name = rng.choice([name for name in entries if name not in ("__metadata__", CHECKS)])
        begin, end = entries[name]["data_offsets"]
        array = bytearray(content[8 + length + begin : 8 + length + end])
        if array:
            at, size = rng.randrange(len(array)), rng.choice((1, 2, 4, 8))
            patch = rng.choice((rng.randbytes(size), b"\xff" * size, bytes(size), b"\x00\x7c" * 4))
            array[at : at + size] = patch[: len(array[at : at + size])]
            changes[name] = bytes(array)
    return sealed(content, text, changes)


def sealed(content: bytes, text: str, changes: Mapping[str, bytes] | None = None) -> bytes:
    """An expert file with these metadata and the beginnings of these arrays, under checksums that are right."""
    length = int.from_bytes(content[:8], "little")
    entries, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    layout = Layout.from_json(entries["__metadata__"][KEY], "seed")
    for name, change in (changes or {}).items():
        begin = entries[name]["data_offsets"][0]
        data[begin : begin + len(change)] = change
    sums = []
    for stored in layout.stored.values():
        begin, end = entries[stored.name]["data_offsets"]
        step = CHUNK * stored.dtype.itemsize
        if stored.name != CHECKS:
            sums += [zlib.crc32(data[at : min(at + step, end)]) for at in range(begin, end, step)]
    table = np.array([*sums, 0], np.uint32)
    table[-1] = seal(table[:-1], text)
    begin, end = entries[CHECKS]["data_offsets"]
    data[begin:end] = table.tobytes()
    entries["__metadata__"][KEY] = text
    head = json.dumps(entries).encode()
    return len(head).to_bytes(8, "little") + head + bytes(data)
