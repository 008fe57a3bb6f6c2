"""The compiled CUDA backend: csrc/cuda, on the current stream of the tensors' device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..arrays import FLOATS, dtype_name
from ..gpu_software import driver_version, installed, too_old
from ..group import (
    GroupKeepStats,
    GroupStats,
    GroupThreshold,
    MatrixGroup,
    is_aligned,
    row_stride,
    rule_tables,
    to_device,
    upload,
)
from ..types import Consensus, Keep
from . import built, cuda_module
from .single import Single

NAME, DEVICES = cuda_module.NAME, cuda_module.DEVICES
NUMPY = False
RADIX_BUCKETS = 2048
PASSES = 3
SEARCHED = 1 << 17  # entries from which a sample is much smaller than the matrix
ITEM_SIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


def probe() -> tuple[bool, str]:
    if not built("_cuda"):
        return False, "not built (no nvcc at build time, or LORS_BUILD_CUDA=0)"
    import torch

    arches = f"built for {cuda_module.library().arches}"
    driver = "" if driver_version() else "no NVIDIA driver (libcuda.so.1)"
    if torch.version.cuda is None:
        kind = f"this torch is a {'HIP' if torch.version.hip else 'CPU-only'} build"
        return False, f"{arches}; no device: {', '.join(filter(None, (driver, kind)))}"
    count, why = cuda_module.library().device_count()
    why = driver or why
    if not torch.cuda.is_available():
        return False, f"{arches}; no device{f' ({why})' if why else ''}"
    if not count:
        found = "; ".join(x for x in too_old(installed(cuda_module.library().runtime)) if x.startswith("driver"))
        if found:  # a wheel's module beside a torch for an older CUDA: not for this machine, but not broken either
            return False, f"{arches}; {found}"
        raise RuntimeError(f"{arches}; torch has a device, this module has none{f' ({why})' if why else ''}")
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return False, f"{arches}; the device has compute capability {major}.{minor}"
    return True, f"{torch.cuda.get_device_name()}, {arches}"


def is_fast(group: MatrixGroup) -> bool:
    """Whether kernels read 16 bytes at a time: one dtype, aligned rows, a multiple of 8 columns (csrc/cuda/launch.h)."""
    base, tuned = _dtypes(group)
    return group.aligned and base == tuned and group.n % 8 == 0


def _dtypes(group: MatrixGroup) -> tuple[int, int]:
    """Codes of base and tuned; a base that is not there counts as tuned's, so that it costs no mixed kernel."""
    tuned = FLOATS.index(group.dtypes[1])
    return (tuned if group.bases is None else FLOATS.index(group.dtypes[0])), tuned


def _group(group: MatrixGroup) -> tuple[Any, ...]:
    sizes = (group.matrices, group.experts, group.m, group.n)
    return (group.table.data_ptr(), *_dtypes(group), group.aligned, *sizes)


def _launch(group: MatrixGroup) -> tuple[int, int]:
    return cuda_module.stream(group.device)


def _processors(device: Any) -> int:
    import torch

    return torch.cuda.get_device_properties(device).multi_processor_count  # type: ignore[no-any-return]


def _sample(group: MatrixGroup, k: int) -> tuple[int, int]:
    """Pieces of the sample and places for candidates of a pair, in the search for a threshold; none where the radix passes
    have less to do."""
    entries = group.m * group.n
    if k == 0 or not is_fast(group) or group.n % 32 or entries < SEARCHED:
        return 0, 0
    return min(cuda_module.library().threshold_sample(), entries // 64), entries // 16


def _factors(left: Any, right: Any) -> tuple[tuple[int, int, int], Any]:
    """Addresses of left and of right transposed, so that neighbouring columns are neighbours, and what keeps it alive."""
    if left is None:
        return (0, 0, 0), None
    transposed = right.mT.contiguous()
    return (left.data_ptr(), transposed.data_ptr(), left.shape[2]), transposed


class Grouped:
    name = NAME
    width = 8  # fused multiply-adds, not tensor cores: a wider block would cost in proportion

    def gram_apply(self, group: MatrixGroup, x: Any, *, side: str, product: bool = False) -> tuple[Any, Any]:
        return self._apply(group, x, side, product)[:2]

    def first_pass(self, group: MatrixGroup, x: Any, *, side: str) -> tuple[Any, Any, Any, Any]:
        """z, and as of `measure` energy, whether anything is not finite, and the largest magnitude to float16's bits: by the
        same launch where the plan has tensor cores."""
        import torch

        z, _, account = self._apply(group, x, side, accounts=True)
        if account is None:
            return z, *self.measure(group)
        energy = account[:, :, 0].double().sum(1)
        return z, energy, ~torch.isfinite(energy), account[:, :, 1].amax(1)

    def _apply(
        self, group: MatrixGroup, x: Any, side: str, product: bool = False, accounts: bool = False
    ) -> tuple[Any, Any, Any]:
        pairs, inner, b = x.shape
        outer = group.m if side == "right" else group.n
        size, fast, library = ITEM_SIZE[group.dtypes[1]], is_fast(group), cuda_module.library()
        room = library.shared_memory(_launch(group)[0]) if fast else 0
        plan = library.plan_gram(pairs, outer, inner, size, fast, _processors(group.device), room)
        _, chunks, per_thread, _, tensor = plan
        y = x.new_empty((pairs, outer, b)) if product or per_thread == 0 else None
        partial = x.new_empty((pairs, chunks, inner, b))
        account = x.new_empty((pairs, chunks, 2)) if accounts and tensor else None
        library.gram_apply(
            _launch(group), _group(group), side == "left", plan, x.data_ptr(), b,
            0 if y is None else y.data_ptr(), partial.data_ptr(), 0 if account is None else account.data_ptr(),
        )  # fmt: skip
        return (partial[:, 0] if chunks == 1 else partial.sum(1)), (y if product else None), account

    def measure(self, group: MatrixGroup) -> tuple[Any, Any, Any]:
        import torch

        tiles = cuda_module.library().measure_tiles(group.m, group.n)
        energy = torch.empty((group.pairs, tiles), dtype=torch.float32, device=group.device)
        counts = torch.empty((group.pairs, tiles, 2), dtype=torch.int32, device=group.device)
        cuda_module.library().measure(_launch(group), _group(group), energy.data_ptr(), counts.data_ptr())
        return energy.double().sum(1), counts[:, :, 0].sum(1), counts[:, :, 1].amax(1).view(torch.float32)

    def residual_threshold(self, group: MatrixGroup, left: Any, right: Any, k: int) -> GroupThreshold:
        return self.search(group, left, right, k)[0]

    def search(self, group: MatrixGroup, left: Any, right: Any, k: int) -> tuple[GroupThreshold, Any]:
        """The thresholds, and int32 [P] whether two passes were enough."""
        import torch

        library, pairs, device = cuda_module.library(), group.pairs, group.device
        factors, keep = _factors(left, right)
        pieces, capacity = _sample(group, k)
        state = torch.zeros((8, pairs), dtype=torch.int64, device=device)
        found, wanted, equal, non_finite, cut = state[:3], *(state[i] for i in range(3, 7))
        key, settled = state[7].view(torch.int32).chunk(2)
        wanted.fill_(max(k, 1))
        bracket = torch.empty((2, pairs), dtype=torch.float32, device=device)
        candidates = torch.empty((pairs, capacity), dtype=torch.int32, device=device)
        passes = PASSES if k else 1  # of one, only the count of non-finite entries is wanted
        counts = torch.zeros((passes, pairs, RADIX_BUCKETS), dtype=torch.int64, device=device)
        ties = torch.empty((pairs, library.tie_chunks(group.m, group.n)), dtype=torch.int64, device=device)
        places = [x.data_ptr() for x in (bracket, found, candidates, settled, key, wanted, equal, non_finite)]
        library.residual_threshold(
            _launch(group), _group(group), factors, (max(k, 1), pieces, capacity, *places), passes, counts.data_ptr(),
            ties.data_ptr(), cut.data_ptr() if k else 0,
        )  # fmt: skip
        del keep  # freed behind the launches on the same stream: the allocator hands it out only after them
        if k == 0:
            none = torch.zeros_like(wanted)
            return GroupThreshold(torch.full((pairs,), float("inf"), device=device), none, none, non_finite), settled
        return GroupThreshold(key.view(torch.float32), wanted, cut, non_finite), settled

    def merge_update(
        self,
        group: MatrixGroup,
        out: Sequence[Any],
        left: Any,
        right: Any,
        threshold: GroupThreshold,
        weight: list[float],
    ) -> GroupStats:
        import torch

        device, tiles = group.device, cuda_module.library().merge_tiles(group.m, group.n)
        factors, keep = _factors(left, right)
        energy = torch.empty((group.pairs, tiles, 3), dtype=torch.float32, device=device)
        counts = torch.empty((group.pairs, tiles, 2), dtype=torch.int32, device=device)
        weights = to_device(torch.tensor(weight, dtype=torch.float32), device)
        out_table = upload([[x.data_ptr(), row_stride(x)] for x in out], device)
        value, cut = threshold.value.contiguous(), threshold.cut.contiguous()
        cuda_module.library().merge_update(
            _launch(group), _group(group), out_table.data_ptr(), FLOATS.index(dtype_name(out[0])),
            all(is_aligned(x) for x in out), factors, value.data_ptr(), cut.data_ptr(), weights.data_ptr(),
            energy.data_ptr(), counts.data_ptr(),
        )  # fmt: skip
        del keep
        sums = counts.sum(1)
        return GroupStats(energy.double().sum(1), sums[:, 0], sums[:, 1])

    def ties_update(
        self, group: MatrixGroup, out: Sequence[Any] | None, keep: list[Keep], weight: list[float], rule: Consensus
    ) -> GroupKeepStats:
        import torch

        device, tiles = group.device, cuda_module.library().ties_tiles(group.m, group.n)
        energy = torch.empty((group.pairs, tiles, 4), dtype=torch.float32, device=device)
        counts = torch.empty((group.pairs, tiles, 2), dtype=torch.int32, device=device)
        numbers, integers = rule_tables(keep, weight, device)
        table = None if out is None else upload([[x.data_ptr(), row_stride(x)] for x in out], device)
        cuda_module.library().ties_update(
            _launch(group), _group(group), 0 if table is None else table.data_ptr(),
            FLOATS.index(dtype_name(group.like if out is None else out[0])), all(is_aligned(x) for x in out or ()),
            numbers.data_ptr(), integers.data_ptr(),
            (rule.elect, rule.normalize, rule.scale, rule.divisor(weight), rule.start),
            energy.data_ptr(), counts.data_ptr(),
        )  # fmt: skip
        sums = counts.sum(1)
        return GroupKeepStats(energy.double().sum(1), sums[:, 0], sums[:, 1])


GROUPED = Grouped()
_single = Single(GROUPED)
gram_apply = _single.gram_apply
residual_threshold = _single.residual_threshold
merge_update = _single.merge_update
ties_update = _single.ties_update
truncated_svd = _single.truncated_svd
