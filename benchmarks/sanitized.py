"""Every kernel of the CUDA module once or twice, without torch: what compute-sanitizer is to look at, and nothing else.

Each array is an allocation of its own, exactly as long as the array, so that a byte read beside it is seen, and fresh memory
is not written by anybody but the kernels. Results are compared with numpy's, coarsely: the tests do that properly.
`--dry-run` uses main memory and the emulated module that LORS_TEST_CUDA_EMULATION names.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

FLOAT32, FLOAT16, BFLOAT16 = range(3)
SHAPES = ((48, 40), (33, 37), (64, 288))  # whole vectors; odd; more columns than a block has threads
RANK = 3


class Host:
    """Main memory as a device's."""

    def __init__(self) -> None:
        self.kept: dict[int, np.ndarray] = {}

    def put(self, array: np.ndarray) -> int:
        mine = np.frombuffer(bytearray(np.ascontiguousarray(array).tobytes()), array.dtype)
        self.kept[mine.ctypes.data] = mine
        return int(mine.ctypes.data)

    def room(self, shape: tuple[int, ...], dtype: Any) -> int:
        return self.put(np.full(shape, 0x5A, np.uint8).repeat(np.dtype(dtype).itemsize, axis=-1))

    def get(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return self.kept[address].view(dtype).reshape(shape)


class Gpu:
    """Memory of device 0 through the driver, in the context that the CUDA runtime uses."""

    def __init__(self) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1")
        context = ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self.cuda, name)(*arguments):
            raise RuntimeError(f"{name}: error {code}")

    def room(self, shape: tuple[int, ...], dtype: Any) -> int:
        address = ctypes.c_uint64()
        size = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return int(address.value)

    def put(self, array: np.ndarray) -> int:
        array = np.ascontiguousarray(array)
        address = self.room(array.shape, array.dtype)
        where = ctypes.c_void_p(array.ctypes.data)
        self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), where, ctypes.c_size_t(array.nbytes))
        return address

    def get(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        array = np.empty(shape, dtype)
        where = ctypes.c_void_p(array.ctypes.data)
        self.call("cuMemcpyDtoH_v2", where, ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes))
        return array


def rounded(values: np.ndarray, dtype: int) -> tuple[np.ndarray, np.ndarray]:
    """(as stored, as float32)"""
    if dtype == FLOAT32:
        return values.astype(np.float32), values.astype(np.float32)
    if dtype == FLOAT16:
        return values.astype(np.float16), values.astype(np.float16).astype(np.float32)
    stored = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return stored, (stored.astype(np.uint32) << 16).view(np.float32)


class Run:
    """Two matrices of two experts, and every operation on them."""

    def __init__(self, module: ModuleType, memory: Any, shape: tuple[int, int], dtype: int) -> None:
        self.cuda, self.memory, self.shape = module, memory, shape
        self.m, self.n = m, n = shape
        random = np.random.default_rng(m * n + dtype)
        self.bases = [rounded(random.standard_normal(shape), dtype) for _ in range(2)]
        self.tuned = [rounded(b + 0.1 * random.standard_normal(shape), dtype) for _, b in self.bases for _ in range(2)]
        places = [memory.put(stored) for stored, _ in self.bases], [memory.put(stored) for stored, _ in self.tuned]
        self.pairs = len(self.tuned)
        table = [[places[0][p // 2] for p in range(4)], [n] * 4, places[1], [n] * 4]
        self.deltas = np.stack([self.tuned[p][1] - self.bases[p // 2][1] for p in range(4)])
        aligned = n * self.bases[0][0].itemsize % 16 == 0
        self.fast = aligned and n % 8 == 0
        self.item = self.bases[0][0].itemsize
        self.launch = (0, 0)
        self.group = (memory.put(np.array(table, np.int64)), dtype, dtype, aligned, 2, 2, m, n)
        self.dtype = dtype
        self.random = random

    def gram_apply(self) -> None:
        for left in (False, True):
            outer, inner = (self.n, self.m) if left else (self.m, self.n)
            plan = self.cuda.plan_gram(self.pairs, outer, inner, self.item, self.fast, 4, self.cuda.shared_memory(0))
            x = self.random.standard_normal((self.pairs, inner, 9)).astype(np.float32)
            y = self.memory.room((self.pairs, outer, 9), np.float32)
            partial = self.memory.room((self.pairs, plan[1], inner, 9), np.float32)
            account = self.memory.room((self.pairs, plan[1], 2), np.float32)
            self.cuda.gram_apply(self.launch, self.group, left, plan, self.memory.put(x), 9, y, partial, account)
            found = self.memory.get(partial, (self.pairs, plan[1], inner, 9), np.float32).sum(1)
            if plan[4]:
                sums = self.memory.get(account, (self.pairs, plan[1], 2), np.float32)
                close(sums[:, :, 0].sum(1), np.square(self.deltas).sum((1, 2)))
            a = self.deltas.transpose(0, 2, 1) if left else self.deltas
            close(found, a.transpose(0, 2, 1) @ (a @ x))

    def measure(self) -> None:
        tiles = self.cuda.measure_tiles(self.m, self.n)
        energy = self.memory.room((self.pairs, tiles), np.float32)
        counts = self.memory.room((self.pairs, tiles, 2), np.int32)
        self.cuda.measure(self.launch, self.group, energy, counts)
        close(self.memory.get(energy, (self.pairs, tiles), np.float32).sum(1), np.square(self.deltas).sum((1, 2)))

    def select_and_update(self) -> None:
        put, room, pairs = self.memory.put, self.memory.room, self.pairs
        left = self.random.standard_normal((pairs, self.m, RANK)).astype(np.float32) * 0.1
        right = self.random.standard_normal((pairs, RANK, self.n)).astype(np.float32) * 0.1
        factors = (put(left), put(right), RANK)
        k = self.m * self.n // 5
        for pieces in (0, self.m * self.n // 64 if self.fast and self.n % 32 == 0 else 0):  # 0: radix passes only
            key, settled = (put(np.zeros(pairs, np.int32)) for _ in range(2))
            wanted, found = put(np.full(pairs, k, np.int64)), put(np.zeros((3, pairs), np.int64))
            equal, bad, cut = (room((pairs,), np.int64) for _ in range(3))
            counts = put(np.zeros((3, pairs, 2048), np.int64))
            bracket, candidates = room((2, pairs), np.float32), room((pairs, self.m * self.n), np.int32)
            places = (bracket, found, candidates, settled, key, wanted, equal, bad)
            search = (k, pieces, self.m * self.n, *places)
            scratch = room((pairs, self.cuda.tie_chunks(self.m, self.n)), np.int64)
            self.cuda.residual_threshold(self.launch, self.group, factors, search, 3, counts, scratch, cut)
            assert self.memory.get(settled, (pairs,), np.int32).tolist() == [int(pieces > 0)] * pairs
            self.update(left, right, factors, k, key, cut)

    def update(self, left: np.ndarray, right: np.ndarray, factors: tuple[int, ...], k: int, key: int, cut: int) -> None:
        put, room, pairs = self.memory.put, self.memory.room, self.pairs
        value = self.memory.get(key, (pairs,), np.float32)
        low = left @ right
        sizes = np.sort(np.abs(self.deltas - low).reshape(pairs, -1), axis=1)
        close(value, sizes[:, -k])
        outs = [put(stored) for stored, _ in self.bases]
        tiles = self.cuda.merge_tiles(self.m, self.n)
        energy, counts = room((pairs, tiles, 3), np.float32), room((pairs, tiles, 2), np.int32)
        table, weight = put(np.array([outs, [self.n] * 2], np.int64)), put(np.ones(pairs, np.float32))
        self.cuda.merge_update(
            self.launch, self.group, table, self.dtype, self.group[3], factors, key, cut, weight, energy, counts
        )
        kept = self.memory.get(counts, (pairs, tiles, 2), np.int32).sum(1)
        assert kept.tolist() == [[k, 0]] * pairs, kept

    def ties_update(self) -> None:
        put, room, pairs = self.memory.put, self.memory.room, self.pairs
        outs = put(np.array([[put(stored) for stored, _ in self.bases], [self.n] * 2], np.int64))
        numbers = np.array([[0.05] * 4, [np.inf] * 4, [1.0] * 4, [0.5] * 4], np.float32)
        integers = np.array([[0] * 4, [0] * 4, [3] * 4, [1 << 32] * 4], np.int64)
        tiles = self.cuda.ties_tiles(self.m, self.n)
        energy, counts = room((pairs, tiles, 4), np.float32), room((pairs, tiles, 2), np.int32)
        self.cuda.ties_update(
            self.launch, self.group, outs, self.dtype, self.group[3], put(numbers), put(integers),
            (True, True, 1.0, 1.0, 0), energy, counts,
        )  # fmt: skip
        close(self.memory.get(energy, (pairs, tiles, 4), np.float32).sum(1)[:, 0], np.square(self.deltas).sum((1, 2)))

    def eigh(self) -> None:
        a = self.random.standard_normal((self.pairs, self.m, self.m))
        a += a.transpose(0, 2, 1)
        theta, error = (self.memory.room(shape, np.float64) for shape in ((self.pairs, self.m), (self.pairs,)))
        vectors = self.memory.room(a.shape, np.float64)
        sizes = (self.m, self.m * self.m, self.pairs, self.m)
        self.cuda.eigh(self.launch, self.memory.put(a), *sizes, theta, vectors, error)
        close(self.memory.get(theta, a.shape[:2], np.float64), np.linalg.eigvalsh(a))
        assert self.memory.get(error, (self.pairs,), np.float64).max() < 1e-12

    def all(self) -> None:
        self.eigh()
        self.gram_apply()
        self.measure()
        self.select_and_update()
        self.ties_update()


def close(found: np.ndarray, expected: np.ndarray) -> None:
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < 1e-4, error


def main(dry: bool) -> int:
    if dry and "LORS_TEST_CUDA_EMULATION" not in os.environ:
        print("skipped: LORS_TEST_CUDA_EMULATION names no module")
        return 0
    if dry:
        spec = importlib.util.spec_from_file_location("_cuda", os.environ["LORS_TEST_CUDA_EMULATION"])
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = import_module("lors_kernels._cuda")
    runs = 0
    for dtype in (FLOAT32, FLOAT16, BFLOAT16):
        for shape in SHAPES:
            Run(module, Host() if dry else Gpu(), shape, dtype).all()
            runs += 1
    assert "torch" not in sys.modules
    print(f"{runs} rounds of every kernel")
    return 0


if __name__ == "__main__":
    sys.exit(main("--dry-run" in sys.argv))
