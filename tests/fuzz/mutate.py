"""Mutations of files: bits, bytes, lengths, and the words and numbers that formats are made of."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

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
