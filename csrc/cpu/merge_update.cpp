#include <algorithm>
#include <vector>

#include "../lors/ordered_key.h"
#include "../lors/parallel.h"
#include "ops.h"
#include "residual.h"
#include "rows.h"

namespace lors {
namespace {

constexpr int64_t kTaskRows = 16;

struct RowStats {
    float delta = 0, residual = 0, kept_energy = 0;
    int64_t kept = 0, non_finite = 0;
};

float sum_of(Vec<float> v) {
    float total = 0;
    for (int lane = 0; lane < kLanes<float>; ++lane) total += v[lane];
    return total;
}

// out[j] += weight * (low[j] + (kept ? residual[j] : 0)); an entry equal to the threshold is kept while `ties_until` >
// j.
RowStats add_row(float* out, const float* delta, const float* low, const float* residual, int64_t n, uint32_t value_key,
                 int64_t ties_until, float weight) {
    typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));
    RowStats stats;
    Vec<float> delta_energy = {}, residual_energy = {}, kept_energy = {};
    Mask kept = {}, bad = {}, lane_index;
    for (int lane = 0; lane < kLanes<float>; ++lane) lane_index[lane] = lane;
    const int32_t until = static_cast<int32_t>(std::clamp<int64_t>(ties_until, 0, n));
    const Mask threshold = static_cast<int32_t>(value_key) - Mask{};
    for (int64_t j = 0; j < padded(n); j += kLanes<float>) {
        const Vec<float> d = load(delta + j), l = load(low + j), r = load(residual + j);
        const Mask key = reinterpret_cast<Mask>(r) & static_cast<int32_t>(kMagnitudeMask);
        const Mask index = lane_index + static_cast<int32_t>(j);
        const Mask inside = index < static_cast<int32_t>(n);
        const Mask keep = ((key > threshold) | ((key == threshold) & (index < until))) & inside;
        const Vec<float> s = reinterpret_cast<Vec<float>>(reinterpret_cast<Mask>(r) & keep);
        store(out + j, load(out + j) + weight * (l + s));
        delta_energy += d * d;
        residual_energy += r * r;
        kept_energy += s * s;
        kept -= keep;
        bad -=
            (reinterpret_cast<Mask>(d) & static_cast<int32_t>(kMagnitudeMask)) >= static_cast<int32_t>(kNonFiniteKey);
    }
    for (int lane = 0; lane < kLanes<float>; ++lane) {
        stats.kept += kept[lane];
        stats.non_finite += bad[lane];
    }
    stats.delta = sum_of(delta_energy);
    stats.residual = sum_of(residual_energy);
    stats.kept_energy = sum_of(kept_energy);
    return stats;
}

}  // namespace

void merge_update(const Matrix& out, const Matrix& base, const Expert* experts, int64_t count, UpdateStats* stats,
                  int threads) {
    const int64_t stride = padded(out.cols), tasks = (out.rows + kTaskRows - 1) / kTaskRows;
    const int workers = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tasks)));
    std::vector<Residual*> residuals;
    struct Cleanup {
        std::vector<Residual*>& list;
        ~Cleanup() {
            for (Residual* r : list) delete r;
        }
    } cleanup{residuals};
    for (int64_t t = 0; t < count; ++t) residuals.push_back(new Residual(base, experts[t].tuned, experts[t].low_rank));
    Buffer<float> scratch(workers * 4 * stride);
    std::vector<UpdateStats> parts(static_cast<size_t>(tasks * count));  // per task, summed in order at the end
    parallel_for(tasks, workers, [&](int64_t task, int worker) {
        float* row = scratch.data() + worker * 4 * stride;
        float *delta = row + stride, *low = delta + stride, *residual = low + stride;
        std::fill(row, row + stride, 0.0f);
        const int64_t end = std::min(out.rows, (task + 1) * kTaskRows);
        for (int64_t i = task * kTaskRows; i < end; ++i) {
            read_row(out, i, 0, out.cols, row);
            for (int64_t t = 0; t < count; ++t) {
                const Threshold& threshold = experts[t].threshold;
                residuals[static_cast<size_t>(t)]->row(i, delta, low, residual);
                const RowStats r = add_row(row, delta, low, residual, out.cols, magnitude_key(threshold.value),
                                           threshold.cut - i * out.cols, experts[t].weight);
                UpdateStats& sum = parts[static_cast<size_t>(task * count + t)];
                sum.delta_energy += static_cast<double>(r.delta);
                sum.residual_energy += static_cast<double>(r.residual);
                sum.kept_energy += static_cast<double>(r.kept_energy);
                sum.kept += r.kept;
                sum.non_finite += r.non_finite;
            }
            write_row(out, i, 0, out.cols, row);
        }
    });
    for (int64_t t = 0; t < count; ++t) {
        stats[t] = {};
        for (int64_t task = 0; task < tasks; ++task) {
            const UpdateStats& part = parts[static_cast<size_t>(task * count + t)];
            stats[t].delta_energy += part.delta_energy;
            stats[t].residual_energy += part.residual_energy;
            stats[t].kept_energy += part.kept_energy;
            stats[t].kept += part.kept;
            stats[t].non_finite += part.non_finite;
        }
    }
}

}  // namespace lors
