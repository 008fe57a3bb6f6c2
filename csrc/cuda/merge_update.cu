// out_i += sum_t weight_it * (L_it + kept residual). A thread holds its entries of base and of the sum in registers
// while it goes through the experts, so base and every tuned are read once and out is written once.
#include <cmath>
#include <limits>

#include "strip.cuh"

namespace lors {
namespace {

constexpr int kMeasureRows = 16;  // of a thread of measure_kernel, kStripRows at a time
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kExperts = 8;  // whose sums a block holds at a time, one of each thread

// What all threads of a block ask of an expert. An entry stays where it is above `value`, or above `below`, the number
// below it, where equal ones stay as well: before `cut`.
struct Expert {
    PairView view;
    const float *left, *right_t;
    int64_t cut;
    float value, below, weight;
    unsigned row, col;  // where the block's tile begins: read anew, and so is what follows from it, in few registers

    __device__ __forceinline__ void set(const GroupArgs& g, int64_t left_size, int64_t right_size, int64_t p,
                                        const float* given, const int64_t* cuts, const float* weights) {
        view = pair_view(g.table, p, g.pairs);
        left = g.left + p * left_size, right_t = g.right_t + p * right_size;
        cut = cuts[p], weight = weights[p];
        const uint32_t key = magnitude_key(given[p]) < kNonFiniteKey ? magnitude_key(given[p]) : kNonFiniteKey;
        value = key_to_magnitude(key);
        below = key ? key_to_magnitude(key - 1) : -1.0f;
    }
};

// The same, but what follows from it is found here, and not ahead and kept: registers are what there is least of.
__device__ __forceinline__ unsigned anew(unsigned value) {
    asm volatile("" : "+r"(value));
    return value;
}

// Where a strip lies. Lanes beside the matrix, with count 0, do what the others do at its first column, unseen.
struct StripPlace {
    unsigned row, col;  // without a sign: half of the instructions of every address
    int count, rows;    // rows: of the warp

    // across: tiles beside one another
    __device__ __forceinline__ StripPlace(unsigned tile, unsigned across, unsigned thread, const GroupArgs& g) {
        row = (tile / across * kTileWarps + thread / 32) * kStripRows;
        col = tile % across * kTileCols + thread % 32 * kVector;
        const int64_t below = g.m - row, beside = g.n - col;
        rows = below < 0 ? 0 : below < kStripRows ? static_cast<int>(below) : kStripRows;
        count = beside < 0 ? 0 : beside < kVector ? static_cast<int>(beside) : kVector;
        if (count == 0) col = 0;
    }
};

// The next row in the place of each, and the first in that of the last.
__device__ __forceinline__ void move_up(float (&rows)[kStripRows][kVector]) {
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
        const float first = rows[0][e];
#pragma unroll
        for (int r = 1; r < kStripRows; ++r) rows[r - 1][e] = rows[r][e];
        rows[kStripRows - 1][e] = first;
    }
}

template <Kind K>
__global__ void __launch_bounds__(kTileThreads,
                                  K == Kind::kFloat32 || K == Kind::kAny ? 1 : 2)  // these need more than 128 registers
    merge_kernel(GroupArgs g, int64_t left_size, int64_t right_size, const int64_t* out_table, int out_dtype,
                 unsigned tiles, unsigned across, const float* value, const int64_t* cut, const float* weight,
                 float* energy, int32_t* counts) {
    LORS_SHARED(Expert, experts, [kExperts]);
    LORS_SHARED(float4, sums, [kExperts * kTileThreads]);
    LORS_SHARED(int, wrong, [kExperts]);  // entries that are not finite
    LORS_SHARED(__align__(16) float, stages, [kTileWarps * kStageSize]);
    const unsigned thread = threadIdx.x;
    const auto each_out = [&](const auto& f) {
        const unsigned block = anew(blockIdx.x), i = block / tiles;
        const StripPlace at(block % tiles, across, anew(threadIdx.x), g);
        void* out = reinterpret_cast<void*>(out_table[i]);
        const int64_t stride = out_table[g.matrices + i];
#pragma unroll
        for (int r = 0; r < kStripRows; ++r) {
            if (r < at.rows && at.count > 0) f(out, (int64_t{at.row} + r) * stride + at.col, at.count, r);
        }
    };
    float total[kStripRows][kVector] = {};
    each_out([&](void* out, int64_t at, int count, int r) { load8<K>(out, out_dtype, at, count, total[r]); });
    const StripPlace at(blockIdx.x % tiles, across, thread, g);
    const int count = at.count, rows = at.rows;
    const int all = static_cast<int>(g.experts);
    for (int begun = 0; begun < all; begun += kExperts) {
        const int slots = all - begun < kExperts ? all - begun : kExperts;
        if (begun) __syncthreads();  // the slots are written again
        if (const int own = static_cast<int>(anew(thread)); own < slots) {
            const int64_t p = anew(blockIdx.x) / tiles * g.experts + begun + own;
            experts[own].set(g, left_size, right_size, p, value, cut, weight);
            const StripPlace first(anew(blockIdx.x) % tiles, across, 0, g);
            experts[own].row = first.row, experts[own].col = first.col;
            wrong[own] = 0;
        }
        __syncthreads();
#pragma unroll 1
        for (int slot = 0; slot < slots; ++slot) {
            const Expert& expert = experts[slot];
            const unsigned own = anew(thread), row = expert.row + own / 32 * kStripRows,
                           col = count > 0 ? expert.col + own % 32 * kVector : 0;
            float low[kStripRows][kVector], v[4] = {};  // v: energies of delta, residual, what is kept; how many are
            strip_low<K>(global(expert.left), global(expert.right_t), static_cast<int>(g.rank), g.n, row, g.m, col,
                         K == Kind::kAny ? count : kVector, stages + own / 32 * kStageSize, low);
            const auto add = [&](const float* d, const float* l, float* sum, const auto& bound) {
#pragma unroll
                for (int e = 0; e < kVector; ++e) {
                    const float residual = __fsub_rn(d[e], l[e]);
                    const float keep = exceeds(residual, bound(e)), s = __fmul_rn(keep, residual);
                    sum[e] = __fmaf_rn(expert.weight, __fadd_rn(l[e], s), sum[e]);
                    v[0] += d[e] * d[e];
                    v[1] += residual * residual;
                    v[2] += s * s;
                    v[3] += keep;
                }
            };
            const PairView& view = expert.view;
            const int64_t index = row * g.n + col;
            const bool divided = index < expert.cut && expert.cut < index + (kStripRows - 1) * g.n + kVector;
            const bool odd = K == Kind::kAny || rows < kStripRows || __any_sync(~0u, divided);  // of the whole warp
            if (LORS_RARELY(odd)) {
                // not all rows are there, or the last tie that stays is among them: a row at a time, and all move up
#pragma unroll 1
                for (int r = 0; r < kStripRows; ++r) {
                    float b[kVector], d[kVector] = {};
                    if (r < rows) {
                        base8<K>(view, g.base_dtype, row + r, col, count, b);
                        delta8<K>(view, g.tuned_dtype, row + r, col, count, b, d);
                    }
                    const int64_t ties = expert.cut - (index + r * g.n);  // entries before the cut
                    add(d, low[0], total[0], [&](int e) {
                        if (r >= rows || e >= count) return kInfinity;  // zeros are not above it
                        return e < ties ? expert.below : expert.value;
                    });
                    move_up(low), move_up(total);
                }
            } else if constexpr (K != Kind::kAny) {
                const float bound = index < expert.cut ? expert.below : expert.value;
                constexpr int kItem = Raw<K>::kItem;
                uintptr_t base_at = reinterpret_cast<uintptr_t>(view.base) + (row * view.base_stride + col) * kItem,
                          tuned_at = reinterpret_cast<uintptr_t>(view.tuned) + (row * view.tuned_stride + col) * kItem;
                const int64_t base_step = view.base_stride * kItem, tuned_step = view.tuned_stride * kItem;
                const bool has_base = view.base != nullptr;  // which comes from L1, for every expert
#pragma unroll
                for (int first = 0; first < kStripRows; first += 2) {
                    const Raw<K> base[2] = {{base_at, has_base}, {base_at + base_step, has_base}},
                                 tuned[2] = {{tuned_at, true}, {tuned_at + tuned_step, true}};
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        float b[kVector], d[kVector];
                        base[r].widen(b), tuned[r].widen(d);
#pragma unroll
                        for (int e = 0; e < kVector; ++e) d[e] = __fsub_rn(d[e], b[e]);
                        add(d, low[first + r], total[first + r], [&](int) { return bound; });
                    }
                    base_at += 2 * base_step, tuned_at += 2 * tuned_step;
                    __syncwarp();  // two rows at a time: four, loaded at once, need more registers than there are
                }
            }
            if (count == 0) v[0] = v[1] = v[2] = v[3] = 0;
            sums[slot * kTileThreads + own] = make_float4(v[0], v[1], v[2], v[3]);
            if (LORS_RARELY(!(v[0] <= kLargest))) {
                const int bad = count_non_finite<K>(g, view, row, rows, col, count);
                if (bad) atomicAdd(&wrong[slot], bad);
            }
        }
        __syncthreads();
        const unsigned block = anew(blockIdx.x), lane = anew(thread) % 32;
        const int warp = static_cast<int>(anew(thread) / 32);
        if (warp < slots) {  // a warp per expert
            float v[4] = {};
#pragma unroll
            for (int j = 0; j < kTileThreads / 32; ++j) {
                const float4 found = sums[warp * kTileThreads + j * 32 + lane];
                v[0] += found.x, v[1] += found.y, v[2] += found.z, v[3] += found.w;
            }
            const float sum = warp_sums(v);
            const int64_t place = (block / tiles * g.experts + begun + warp) * tiles + block % tiles;
            if (lane < 3) energy[place * 3 + lane] = sum;
            if (lane == 3) counts[place * 2] = static_cast<int32_t>(sum);
            if (lane == 4) counts[place * 2 + 1] = wrong[warp];
        }
    }
    each_out([&](void* out, int64_t at, int count, int r) { store8<K>(out, out_dtype, at, count, total[r]); });
}

template <Kind K>
__global__ void __launch_bounds__(kTileThreads)
    measure_kernel(GroupArgs g, unsigned tiles, float* energy, int32_t* counts) {
    LORS_SHARED(float, sums, [kSumsSize]);
    LORS_SHARED(uint32_t, tops, [kTileWarps]);
    const unsigned p = blockIdx.x / tiles, tile = blockIdx.x % tiles;
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
    const int64_t place = blockIdx.x;
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
    const unsigned across = static_cast<unsigned>(ceil_div(group.n, kTileCols));
    const Kind kind = out_aligned && out_dtype == group.tuned_dtype ? kind_of(group) : Kind::kAny;
    with_kind(kind, [&](auto tag) {
        start(launch, "merge_update", group, grid, kTileThreads, 0, merge_kernel<decltype(tag)::kind>, g, g.m * g.rank,
              g.rank * g.n, out_table, out_dtype, static_cast<unsigned>(tiles), across, value, cut, weight, energy,
              counts);
    });
}

void measure(const Launch& launch, const Group& group, float* energy, int32_t* counts) {
    const Selected selected = begin(launch, "measure", group);
    const GroupArgs g = arguments(group, nullptr, nullptr, 0);
    const int64_t tiles = measure_tiles(group.m, group.n);
    const unsigned grid = blocks(group.pairs() * tiles, "measure", group);
    with_kind(kind_of(group), [&](auto tag) {
        start(launch, "measure", group, grid, kTileThreads, 0, measure_kernel<decltype(tag)::kind>, g,
              static_cast<unsigned>(tiles), energy, counts);
    });
}

}  // namespace lors
