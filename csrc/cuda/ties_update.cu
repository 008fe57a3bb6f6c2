// Trim, elect and sum over all experts: a thread keeps, for each of its entries, the sums of the positive and of the
// negative values beside the sum of all, so that the election needs no second look at the experts. The sum over those
// that agree is one of the two, bit for bit: leaving a value out is adding 0.
#include "../common/counter_random.h"
#include "tiles.cuh"

namespace lors {
namespace {

struct Entries {
    float total[kVector], positive[kVector], negative[kVector], positive_weight[kVector], negative_weight[kVector];
};

// |d| above the key, or equal to it and early enough
__device__ __forceinline__ bool selects(uint32_t key, float value, int64_t index, int64_t cut) {
    const uint32_t bound = magnitude_key(value);
    return key > bound || (key == bound && index < cut);
}

template <Kind K>
__global__ void __launch_bounds__(kTileThreads)
    ties_kernel(GroupArgs g, const int64_t* out_table, int out_dtype, unsigned tiles, TiesRules rules, TiesSum sum,
                float* energy, int32_t* counts) {
    LORS_SHARED(float, shared_sums, [kSumsSize]);
    const unsigned i = blockIdx.x / tiles, tile = blockIdx.x % tiles;
    const Place at = place_of<1>(tile, g.n);
    const bool there = at.row < g.m && at.count > 0;
    const int64_t first = sum.start + at.row * g.n + at.col;
    float base[kVector] = {};
    Entries e = {};
    if (there) {
        base8<K>(pair_view(g.table, i * g.experts, g.pairs), g.base_dtype, at.row, at.col, at.count, base);
    }
    for (int64_t t = 0; t < g.experts; ++t) {
        const int64_t p = i * g.experts + t;
        const float factor = rules.numbers[2 * g.pairs + p], weight = rules.numbers[3 * g.pairs + p];
        const int64_t low_cut = rules.integers[p], high_cut = rules.integers[g.pairs + p];
        const uint64_t key = static_cast<uint64_t>(rules.integers[2 * g.pairs + p]);
        const uint64_t limit = static_cast<uint64_t>(rules.integers[3 * g.pairs + p]);
        float sums[4] = {};
        int32_t kept = 0, bad = 0;
        if (there) {
            float d[kVector];
            delta8<K>(pair_view(g.table, p, g.pairs), g.tuned_dtype, at.row, at.col, at.count, base, d);
#pragma unroll
            for (int j = 0; j < kVector; ++j) {
                const uint32_t size = magnitude_key(d[j]);
                const int64_t index = first + j;
                const bool keep = j < at.count && selects(size, rules.numbers[p], index, low_cut) &&
                                  !selects(size, rules.numbers[g.pairs + p], index, high_cut) &&
                                  (limit >= kAlways || random_bits(key, static_cast<uint64_t>(index)) < limit);
                const float s = keep ? d[j] : 0.0f;
                const float v = __fmul_rn(__fmul_rn(s, factor), weight);
                e.total[j] = __fadd_rn(e.total[j], v);
                if (v > 0) {
                    e.positive[j] = __fadd_rn(e.positive[j], v);
                    e.positive_weight[j] = __fadd_rn(e.positive_weight[j], weight);
                } else if (v < 0) {
                    e.negative[j] = __fadd_rn(e.negative[j], v);
                    e.negative_weight[j] = __fadd_rn(e.negative_weight[j], weight);
                }
                sums[0] += d[j] * d[j];
                sums[1] += s * s;
                sums[2] += key_to_magnitude(size);
                sums[3] += key_to_magnitude(magnitude_key(s));
                kept += keep;
                bad += size >= kNonFiniteKey;
            }
        }
        const int slot = static_cast<int>(t % kSlots);
        leave_sums(sums, kept, bad, slot, shared_sums);
        if (slot < kSlots - 1 && t < g.experts - 1) continue;
        const auto place = [&](int other) { return (p - slot + other) * tiles + tile; };
        collect_sums(
            slot + 1, shared_sums, [&](int other, int which, float all) { energy[place(other) * kSums + which] = all; },
            [&](int other, int32_t first, int32_t second) {
                counts[place(other) * 2] = first, counts[place(other) * 2 + 1] = second;
            });
        if (t < g.experts - 1) __syncthreads();  // the slots are written again
    }
    if (!out_table || !there) return;
    void* out = reinterpret_cast<void*>(out_table[i]);
    const int64_t place = at.row * out_table[g.matrices + i] + at.col;
    float values[kVector];
    load8<K>(out, out_dtype, place, at.count, values);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
        float total = e.total[j], divisor = sum.all_weights;
        if (sum.elect) {
            const bool positive = total >= 0;  // not of NaN
            total = positive ? e.positive[j] : e.negative[j];
            divisor = positive ? e.positive_weight[j] : e.negative_weight[j];
            if (divisor == 0) divisor = 1;
        }
        if (sum.normalize) total = __fdiv_rn(total, divisor);
        values[j] = __fadd_rn(values[j], __fmul_rn(sum.scale, total));
    }
    store8<K>(out, out_dtype, place, at.count, values);
}

}  // namespace

int64_t ties_tiles(int64_t m, int64_t n) {
    return tiles_of<1>(m, n);
}

void ties_update(const Launch& launch, const Group& group, const int64_t* out_table, int out_dtype, bool out_aligned,
                 const TiesRules& rules, const TiesSum& sum, float* energy, int32_t* counts) {
    const Selected selected = begin(launch, "ties_update", group);
    const GroupArgs g = arguments(group, nullptr, nullptr, 0);
    const int64_t tiles = ties_tiles(group.m, group.n);
    const unsigned grid = blocks(group.matrices * tiles, "ties_update", group);
    const bool fits = !out_table || (out_aligned && out_dtype == group.tuned_dtype);
    with_kind(fits ? kind_of(group) : Kind::kAny, [&](auto tag) {
        start(launch, "ties_update", group, grid, kTileThreads, 0, ties_kernel<decltype(tag)::kind>, g, out_table,
              out_dtype, static_cast<unsigned>(tiles), rules, sum, energy, counts);
    });
}

}  // namespace lors
