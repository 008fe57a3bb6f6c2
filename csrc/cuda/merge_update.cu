// out_i += sum_t weight_it * (L_it + kept residual). A thread holds its entries of base and of the sum in registers
// while it goes through the experts, so base and every tuned are read once and out is written once.
#include <cmath>

#include "strip.cuh"

namespace lors {
namespace {

constexpr int kMeasureRows = 16;  // of a thread of measure_kernel, kStripRows at a time

// Which entries stay: those above the threshold's value, or above the number below it where equal ones stay as well.
struct Choice {
    float value, below;

    __device__ __forceinline__ explicit Choice(float given) {
        const uint32_t key = magnitude_key(given) < kNonFiniteKey ? magnitude_key(given) : kNonFiniteKey;
        value = key_to_magnitude(key);
        below = key ? key_to_magnitude(key - 1) : -1.0f;
    }
};

// A bit for each entry of a lane's strip that lies before `last` in row-major order; the first one has this index.
__device__ __forceinline__ unsigned strip_before(int64_t index, int64_t n, int64_t last) {
    unsigned bits = 0;
#pragma unroll 1
    for (int i = 0; i < kStripRows * kVector; ++i) {
        if (index + i / kVector * n + i % kVector < last) bits |= 1u << i;
    }
    return bits;
}

template <Kind K>
__global__ void __launch_bounds__(kTileThreads,
                                  K == Kind::kFloat32 ? 1 : 2)  // raw float32 needs more than 128 registers
    merge_kernel(GroupArgs g, const int64_t* out_table, int out_dtype, int64_t tiles, const float* value,
                 const int64_t* cut, const float* weight, float* energy, int32_t* counts) {
    LORS_SHARED(float, sums, [kSumsSize]);
    LORS_SHARED(__align__(16) float, stages, [kTileWarps * kStageSize]);
    const int64_t i = blockIdx.x / tiles, tile = blockIdx.x % tiles;
    const Place at = place_of<kStripRows>(tile, g.n);
    float* stage = stages + threadIdx.x / 32 * kStageSize;
    void* out = reinterpret_cast<void*>(out_table[i]);
    const int64_t out_stride = out_table[g.matrices + i];
    const int there =
        at.count > 0 && at.row < g.m ? static_cast<int>(g.m - at.row < kStripRows ? g.m - at.row : kStripRows) : 0;
    float total[kStripRows][kVector] = {};
#pragma unroll
    for (int r = 0; r < kStripRows; ++r) {
        if (r >= there) continue;
        load8<K>(out, out_dtype, (at.row + r) * out_stride + at.col, at.count, total[r]);
    }
    for (int64_t begun = 0; begun < g.experts; begun += kSlots) {
        const int slots = static_cast<int>(g.experts - begun < kSlots ? g.experts - begun : kSlots);
        if (begun) __syncthreads();  // the slots are written again
#pragma unroll 1
        for (int slot = 0; slot < slots; ++slot) {
            const int64_t p = i * g.experts + begun + slot;
            const PairView view = pair_view(g.table, p, g.pairs);
            const Choice choice(value[p]);
            const int64_t last = cut[p], index = at.row * g.n + at.col;
            const float w = weight[p];
            float low[kStripRows][kVector],
                v[kSums] = {};  // v: energies of delta, residual, what is kept; how many are
            int bad = 0;
            strip_low<K>(g.left + p * g.m * g.rank, g.right_t + p * g.rank * g.n, static_cast<int>(g.rank), g.n, at.row,
                         g.m, at.col, at.count, stage, low);
            const auto take = [&](const auto& bound) {
                StripDelta<K> delta(g, view, at.row, at.col, at.count);
#pragma unroll
                for (int r = 0; r < kStripRows; ++r) {
                    float d[kVector];
                    delta.next(r < there, d);  // base, for every expert, from L1
#pragma unroll
                    for (int e = 0; e < kVector; ++e) {
                        const float residual = __fsub_rn(d[e], low[r][e]);
                        float keep = exceeds(residual, bound(r, e));
                        if constexpr (K == Kind::kAny) keep = e < at.count && r < there ? keep : 0.0f;
                        const float s = keep != 0.0f ? residual : 0.0f;
                        total[r][e] = __fmaf_rn(w, __fadd_rn(low[r][e], s), total[r][e]);
                        v[0] += d[e] * d[e];
                        v[1] += residual * residual;
                        v[2] += s * s;
                        v[3] += keep;
                    }
                }
            };
            const float bound = index < last ? choice.below : choice.value;
            if (LORS_RARELY(index < last && last < index + (kStripRows - 1) * g.n + kVector)) {
                // the last tie that stays is among these rows
                const unsigned ties = strip_before(index, g.n, last);
                take([&](int r, int e) { return ties >> (r * kVector + e) & 1 ? choice.below : choice.value; });
            } else {
                take([&](int, int) { return bound; });
                // zeros in the place of rows that are not there, where even those are above the bound
                if (K != Kind::kAny && bound < 0) v[3] -= static_cast<float>((kStripRows - there) * kVector);
            }
            if (there == 0) v[1] = v[2] = v[3] = 0;
            if (LORS_RARELY(!(v[0] <= kLargest))) bad = count_non_finite<K>(g, view, at.row, there, at.col, at.count);
            leave_sums(v, static_cast<unsigned>(bad), 0, slot, sums);
        }
        const auto place = [&](int slot) { return (i * g.experts + begun + slot) * tiles + tile; };
        collect_sums(
            slots, sums,
            [&](int slot, int which, float all) {
                if (which < 3) energy[place(slot) * 3 + which] = all;
                if (which == 3) counts[place(slot) * 2] = static_cast<int32_t>(all);
            },
            [&](int slot, int32_t wrong, int32_t) { counts[place(slot) * 2 + 1] = wrong; });
    }
#pragma unroll
    for (int r = 0; r < kStripRows; ++r) {
        if (r < there) store8<K>(out, out_dtype, (at.row + r) * out_stride + at.col, at.count, total[r]);
    }
}

template <Kind K>
__global__ void __launch_bounds__(kTileThreads)
    measure_kernel(GroupArgs g, int64_t tiles, float* energy, int32_t* counts) {
    LORS_SHARED(float, sums, [kSumsSize]);
    LORS_SHARED(uint32_t, tops, [kTileWarps]);
    const int64_t p = blockIdx.x / tiles, tile = blockIdx.x % tiles;
    const Place at = place_of<kMeasureRows>(tile, g.n);
    const PairView view = pair_view(g.table, p, g.pairs);
    float v[kSums] = {}, top = 0;
    int bad = 0;
    StripDelta<K> delta(g, view, at.row, at.col, at.count);
#pragma unroll 1
    for (int64_t row = at.row; row < at.row + kMeasureRows; row += kStripRows) {
        float sum = 0;
#pragma unroll
        for (int r = 0; r < kStripRows; ++r) {
            float d[kVector];
            delta.next(row + r < g.m && at.count > 0, d);
#pragma unroll
            for (int e = 0; e < kVector; ++e) sum += d[e] * d[e], top = fmaxf(top, fabsf(d[e]));
        }
        if (LORS_RARELY(!(sum <= kLargest))) {
            const int rows = static_cast<int>(g.m - row < kStripRows ? g.m - row : kStripRows);
            bad += count_non_finite<K>(g, view, row, rows, at.col, at.count);
        }
        v[0] += sum;
    }
    uint32_t largest = magnitude_key(top);  // infinite where that is among them: `bad` is what counts then
    for (int step = 16; step > 0; step /= 2) {
        const uint32_t other = __shfl_xor_sync(~0u, largest, step);
        largest = other > largest ? other : largest;
    }
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = largest;
    leave_sums(v, static_cast<unsigned>(bad), 0, 0, sums);
    const int64_t place = p * tiles + tile;
    collect_sums(
        1, sums,
        [&](int, int which, float all) {
            if (which == 0) energy[place] = all;
        },
        [&](int, int32_t wrong, int32_t) {
            for (int warp = 0; warp < kTileWarps; ++warp) largest = tops[warp] > largest ? tops[warp] : largest;
            counts[place * 2] = wrong, counts[place * 2 + 1] = static_cast<int32_t>(largest);
        });
}

}  // namespace

int64_t merge_tiles(int64_t m, int64_t n) {
    return tiles_of<kStripRows>(m, n);
}

int64_t measure_tiles(int64_t m, int64_t n) {
    return tiles_of<kMeasureRows>(m, n);
}

void merge_update(const Launch& launch, const Group& group, const int64_t* out_table, int out_dtype, bool out_aligned,
                  const float* left, const float* right_t, int64_t rank, const float* value, const int64_t* cut,
                  const float* weight, float* energy, int32_t* counts) {
    const Selected selected = begin(launch, "merge_update", group);
    const GroupArgs g = arguments(group, left, right_t, rank);
    const int64_t tiles = merge_tiles(group.m, group.n);
    const unsigned grid = blocks(group.matrices * tiles, "merge_update", group);
    const Kind kind = out_aligned && out_dtype == group.tuned_dtype ? kind_of(group) : Kind::kAny;
    with_kind(kind, [&](auto tag) {
        start(launch, "merge_update", group, grid, kTileThreads, 0, merge_kernel<decltype(tag)::kind>, g, out_table,
              out_dtype, tiles, value, cut, weight, energy, counts);
    });
}

void measure(const Launch& launch, const Group& group, float* energy, int32_t* counts) {
    const Selected selected = begin(launch, "measure", group);
    const GroupArgs g = arguments(group, nullptr, nullptr, 0);
    const int64_t tiles = measure_tiles(group.m, group.n);
    const unsigned grid = blocks(group.pairs() * tiles, "measure", group);
    with_kind(kind_of(group), [&](auto tag) {
        start(launch, "measure", group, grid, kTileThreads, 0, measure_kernel<decltype(tag)::kind>, g, tiles, energy,
              counts);
    });
}

}  // namespace lors
