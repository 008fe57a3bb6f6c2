// Trim, elect and sum over all experts in one pass: base and every expert are read once, out is written once. A strip
// of kStrip columns of every expert's kept entries stays in L1 or L2 between the election and the sum.
#include <algorithm>
#include <vector>

#include "../common/counter_random.h"
#include "../common/ordered_key.h"
#include "../common/parallel.h"
#include "buffer.h"
#include "delta.h"
#include "ops.h"
#include "rows.h"

namespace lors {
namespace {

constexpr int64_t kTaskRows = 16;
constexpr int64_t kStrip = 1024;

typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));

struct StripStats {
    float energy = 0, kept_energy = 0, sum = 0, kept_sum = 0;
    int64_t kept = 0, non_finite = 0;
};

float sum_of(Vec<float> v) {
    float total = 0;
    for (int lane = 0; lane < kLanes<float>; ++lane) total += v[lane];
    return total;
}

Vec<float> magnitude(Vec<float> v) {
    return reinterpret_cast<Vec<float>>(reinterpret_cast<Mask>(v) & static_cast<int32_t>(kMagnitudeMask));
}

// Entries a threshold selects, of a strip whose first entry has flat index `start`.
struct Selector {
    Mask key;
    int32_t until;  // entries equal to the key count before this position of the strip

    Selector(const Threshold& threshold, int64_t start, int64_t n)
        : key(static_cast<int32_t>(magnitude_key(threshold.value)) - Mask{}),
          until(static_cast<int32_t>(std::clamp<int64_t>(threshold.cut - start, 0, n))) {}

    Mask operator()(Mask entry, Mask index) const { return (entry > key) | ((entry == key) & (index < until)); }
};

// values[j] = weight * (factor * delta[j]) where the entry is kept, else 0; delta is [0, n) padded with zeros.
StripStats trim(const float* delta, int64_t n, const Keep& keep, float weight, int64_t start, uint32_t* random,
                float* values) {
    StripStats stats;
    const Selector low(keep.low, start, n), high(keep.high, start, n);
    const bool draws = keep.limit < kAlways;
    if (draws) {
        // `limit` is compared by borrow: bits < limit, both below 2^32
        for (int64_t j = 0; j < padded(n); ++j) {
            const uint32_t bits = random_bits(keep.key, static_cast<uint64_t>(start + j));
            random[j] = bits < static_cast<uint32_t>(keep.limit) ? 0xffffffffu : 0u;
        }
    }
    Vec<float> energy = {}, kept_energy = {}, sum = {}, kept_sum = {};
    Mask kept = {}, bad = {}, lane_index;
    for (int lane = 0; lane < kLanes<float>; ++lane) lane_index[lane] = lane;
    for (int64_t j = 0; j < padded(n); j += kLanes<float>) {
        const Vec<float> d = load(delta + j), size = magnitude(d);
        const Mask entry = reinterpret_cast<Mask>(size);
        const Mask index = lane_index + static_cast<int32_t>(j);
        Mask mask = low(entry, index) & ~high(entry, index) & (index < static_cast<int32_t>(n));
        if (draws) {
            Mask drawn;
            std::memcpy(&drawn, random + j, sizeof drawn);
            mask &= drawn;
        }
        const Vec<float> s = reinterpret_cast<Vec<float>>(reinterpret_cast<Mask>(d) & mask);
        const Vec<float> kept_size = reinterpret_cast<Vec<float>>(entry & mask);
        store(values + j, (s * keep.factor) * weight);
        energy += d * d;
        kept_energy += s * s;
        sum += size;
        kept_sum += kept_size;
        kept -= mask;
        bad -= entry >= static_cast<int32_t>(kNonFiniteKey);
    }
    for (int lane = 0; lane < kLanes<float>; ++lane) {
        stats.kept += kept[lane];
        stats.non_finite += bad[lane];
    }
    stats.energy = sum_of(energy);
    stats.kept_energy = sum_of(kept_energy);
    stats.sum = sum_of(sum);
    stats.kept_sum = sum_of(kept_sum);
    return stats;
}

// out[j] += scale * sum of the values, or of those with the sign of their sum, over the sum of their weights.
void combine(float* out, const float* values, int64_t step, const TiesExpert* experts, int64_t count, int64_t n,
             const Consensus& rule) {
    const Vec<float> zero = {}, one = splat(1.0f);
    for (int64_t j = 0; j < padded(n); j += kLanes<float>) {
        Vec<float> total = zero, divisor = splat(rule.divisor);
        for (int64_t t = 0; t < count; ++t) total += load(values + t * step + j);
        if (rule.elect) {
            const Mask positive = total >= zero;
            total = divisor = zero;
            for (int64_t t = 0; t < count; ++t) {
                const Vec<float> v = load(values + t * step + j);
                const Mask agrees = ((v > zero) & positive) | ((v < zero) & ~positive);
                total += reinterpret_cast<Vec<float>>(reinterpret_cast<Mask>(v) & agrees);
                divisor += reinterpret_cast<Vec<float>>(reinterpret_cast<Mask>(splat(experts[t].weight)) & agrees);
            }
            const Mask none = divisor == zero;
            divisor = reinterpret_cast<Vec<float>>((reinterpret_cast<Mask>(one) & none) |
                                                   (reinterpret_cast<Mask>(divisor) & ~none));
        }
        if (rule.normalize) total /= divisor;
        store(out + j, load(out + j) + rule.scale * total);
    }
}

}  // namespace

void ties_update(const Matrix& out, const Matrix& base, const TiesExpert* experts, int64_t count, const Consensus& rule,
                 int64_t start, KeepStats* stats, int threads) {
    const Matrix& shape = experts[0].tuned;
    const int64_t rows = shape.rows, cols = shape.cols, tasks = (rows + kTaskRows - 1) / kTaskRows;
    const int64_t strip = padded(std::min(kStrip, cols));
    const int workers = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tasks)));
    std::vector<Delta> deltas;
    for (int64_t t = 0; t < count; ++t) deltas.emplace_back(base, experts[t].tuned);
    const int64_t each = (count + 3) * strip;  // per worker: out, delta, random bits, every expert's values
    Buffer<float> scratch(workers * each);
    std::vector<KeepStats> parts(static_cast<size_t>(tasks * count));  // per task, summed in order at the end
    parallel_for(tasks, workers, [&](int64_t task, int worker) {
        float* row = scratch.data() + worker * each;
        float *delta = row + strip, *values = row + 3 * strip;
        uint32_t* random = reinterpret_cast<uint32_t*>(row + 2 * strip);
        std::fill(row, row + strip, 0.0f);
        const int64_t end = std::min(rows, (task + 1) * kTaskRows);
        for (int64_t i = task * kTaskRows; i < end; ++i) {
            for (int64_t j = 0; j < cols; j += kStrip) {
                const int64_t n = std::min(kStrip, cols - j);
                for (int64_t t = 0; t < count; ++t) {
                    deltas[static_cast<size_t>(t)].row(i, j, n, delta);
                    const StripStats s = trim(delta, n, experts[t].keep, experts[t].weight, start + i * cols + j,
                                              random, values + t * strip);
                    KeepStats& sum = parts[static_cast<size_t>(task * count + t)];
                    sum.delta_energy += static_cast<double>(s.energy);
                    sum.kept_energy += static_cast<double>(s.kept_energy);
                    sum.delta_sum += static_cast<double>(s.sum);
                    sum.kept_sum += static_cast<double>(s.kept_sum);
                    sum.kept += s.kept;
                    sum.non_finite += s.non_finite;
                }
                if (!out.data) continue;
                read_row(out, i, j, n, row);
                combine(row, values, strip, experts, count, n, rule);
                write_row(out, i, j, n, row);
            }
        }
    });
    for (int64_t t = 0; t < count; ++t) {
        stats[t] = {};
        for (int64_t task = 0; task < tasks; ++task) {
            const KeepStats& part = parts[static_cast<size_t>(task * count + t)];
            stats[t].delta_energy += part.delta_energy;
            stats[t].kept_energy += part.kept_energy;
            stats[t].delta_sum += part.delta_sum;
            stats[t].kept_sum += part.kept_sum;
            stats[t].kept += part.kept;
            stats[t].non_finite += part.non_finite;
        }
    }
}

}  // namespace lors
