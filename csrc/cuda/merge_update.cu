// out_i += sum_t weight_it * (L_it + kept residual). A thread holds its entries of base and of the sum in registers
// while it goes through the experts, so base and every tuned are read once and out is written once.
#include "tiles.cuh"

namespace lors {
namespace {

constexpr int kRowsAtOnce = 2;  // of a thread

template <Kind K>
__global__ void __launch_bounds__(kTileThreads)
    merge_kernel(GroupArgs g, const int64_t* out_table, int out_dtype, int64_t tiles, const float* value,
                 const int64_t* cut, const float* weight, float* energy, int32_t* counts) {
    LORS_SHARED(float, sums, [kSumsSize]);
    const int64_t i = blockIdx.x / tiles, tile = blockIdx.x % tiles;
    const Place at = place_of<kRowsAtOnce>(tile, g.n);
    void* out = reinterpret_cast<void*>(out_table[i]);
    const int64_t out_stride = out_table[g.matrices + i];
    float base[kRowsAtOnce][kVector] = {}, total[kRowsAtOnce][kVector] = {};
    const PairView first = pair_view(g.table, i * g.experts, g.pairs);
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
        if (at.row + r < g.m && at.count > 0) {
            base8<K>(first, g.base_dtype, at.row + r, at.col, at.count, base[r]);
            load8<K>(out, out_dtype, (at.row + r) * out_stride + at.col, at.count, total[r]);
        }
    }
    for (int64_t begun = 0; begun < g.experts; begun += kSlots) {
        const int slots = static_cast<int>(g.experts - begun < kSlots ? g.experts - begun : kSlots);
        if (begun) __syncthreads();  // the slots are written again
#pragma unroll 1
        for (int slot = 0; slot < slots; ++slot) {
            const int64_t p = i * g.experts + begun + slot;
            const PairView view = pair_view(g.table, p, g.pairs);
            const uint32_t bound = magnitude_key(value[p]);
            const int64_t last = cut[p];
            const float w = weight[p];
            float low[kRowsAtOnce][kVector], delta_energy = 0, residual_energy = 0, kept_energy = 0;
            int32_t kept = 0, bad = 0;
            if (at.count > 0) {
                low8<K, kRowsAtOnce>(g.left + p * g.m * g.rank, g.right_t + p * g.rank * g.n, g.rank, g.n, at.row, g.m,
                                     at.col, at.count, low);
#pragma unroll
                for (int r = 0; r < kRowsAtOnce; ++r) {
                    if (at.row + r >= g.m) continue;
                    float d[kVector];
                    delta8<K>(view, g.tuned_dtype, at.row + r, at.col, at.count, base[r], d);
                    const int64_t index = (at.row + r) * g.n + at.col;
#pragma unroll
                    for (int e = 0; e < kVector; ++e) {
                        const float residual = __fsub_rn(d[e], low[r][e]);
                        const uint32_t key = magnitude_key(residual);
                        const bool keep = (key > bound || (key == bound && index + e < last)) && e < at.count;
                        const float s = keep ? residual : 0.0f;
                        total[r][e] = __fmaf_rn(w, __fadd_rn(low[r][e], s), total[r][e]);
                        delta_energy += d[e] * d[e];
                        residual_energy += e < at.count ? residual * residual : 0.0f;
                        kept_energy += s * s;
                        kept += keep;
                        bad += magnitude_key(d[e]) >= kNonFiniteKey;
                    }
                }
            }
            float v[kSums] = {delta_energy, residual_energy, kept_energy, static_cast<float>(kept),
                              static_cast<float>(bad)};
            leave_sums(v, slot, sums);
        }
        collect_sums(slots, sums, [&](int slot, int which, float all) {
            const int64_t place = (i * g.experts + begun + slot) * tiles + tile;
            if (which < 3) energy[place * 3 + which] = all;
            if (which == 3 || which == 4) counts[place * 2 + which - 3] = static_cast<int32_t>(all);
        });
    }
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
        if (at.row + r < g.m && at.count > 0) {
            store8<K>(out, out_dtype, (at.row + r) * out_stride + at.col, at.count, total[r]);
        }
    }
}

template <Kind K>
__global__ void __launch_bounds__(kTileThreads)
    measure_kernel(GroupArgs g, int64_t tiles, float* energy, int32_t* counts) {
    LORS_SHARED(float, sums, [kSumsSize]);
    LORS_SHARED(uint32_t, tops, [kTileWarps]);
    const int64_t p = blockIdx.x / tiles, tile = blockIdx.x % tiles;
    const Place at = place_of<kRowsAtOnce>(tile, g.n);
    const PairView view = pair_view(g.table, p, g.pairs);
    float sum = 0;
    int32_t bad = 0;
    uint32_t largest = 0;
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
        if (at.row + r >= g.m || at.count == 0) continue;
        float base[kVector], d[kVector];
        base8<K>(view, g.base_dtype, at.row + r, at.col, at.count, base);
        delta8<K>(view, g.tuned_dtype, at.row + r, at.col, at.count, base, d);
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
            const uint32_t key = magnitude_key(d[e]);
            sum += d[e] * d[e];
            bad += key >= kNonFiniteKey;
            if (key < kNonFiniteKey && key > largest) largest = key;
        }
    }
    for (int step = 16; step > 0; step /= 2) {
        const uint32_t other = __shfl_xor_sync(~0u, largest, step);
        largest = other > largest ? other : largest;
    }
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = largest;
    float v[kSums] = {sum, static_cast<float>(bad)};
    leave_sums(v, 0, sums);
    collect_sums(1, sums, [&](int, int which, float all) {
        const int64_t place = p * tiles + tile;
        if (which == 0) energy[place] = all;
        if (which == 1) counts[place * 2] = static_cast<int32_t>(all);
        if (which != 2) return;
        for (int warp = 0; warp < kTileWarps; ++warp) largest = tops[warp] > largest ? tops[warp] : largest;
        counts[place * 2 + 1] = static_cast<int32_t>(largest);
    });
}

}  // namespace

int64_t merge_tiles(int64_t m, int64_t n) {
    return tiles_of<kRowsAtOnce>(m, n);
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
    const int64_t tiles = merge_tiles(group.m, group.n);
    const unsigned grid = blocks(group.pairs() * tiles, "measure", group);
    with_kind(kind_of(group), [&](auto tag) {
        start(launch, "measure", group, grid, kTileThreads, 0, measure_kernel<decltype(tag)::kind>, g, tiles, energy,
              counts);
    });
}

}  // namespace lors
