#include <algorithm>
#include <vector>

#include "../common/ordered_key.h"
#include "../common/parallel.h"
#include "ops.h"
#include "residual.h"
#include "rows.h"

namespace lors {
namespace {

constexpr int64_t kTaskRows = 16;

typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));

struct RowStats {
    Vec<float> delta = {}, residual = {}, kept_energy = {};
    Mask kept = {}, non_finite = {};

    void add_to(UpdateStats& stats) const {
        for (int lane = 0; lane < kLanes<float>; ++lane) {
            stats.kept += kept[lane];
            stats.non_finite += non_finite[lane];
        }
        stats.delta_energy += static_cast<double>(sum_of(delta));
        stats.residual_energy += static_cast<double>(sum_of(residual));
        stats.kept_energy += static_cast<double>(sum_of(kept_energy));
    }

  private:
    static float sum_of(Vec<float> v) {
        float total = 0;
        for (int lane = 0; lane < kLanes<float>; ++lane) total += v[lane];
        return total;
    }
};

// Of row i, which residuals are kept: those above a threshold, and of those equal to it the ones before its cut. Lanes
// past the last column hold zeros and are never kept.
class Keeper {
  public:
    Keeper(const Threshold& threshold, int64_t i, int64_t cols)
        : value_(static_cast<int32_t>(magnitude_key(threshold.value)) - Mask{}),
          until_(static_cast<int32_t>(std::clamp<int64_t>(threshold.cut - i * cols, 0, cols))),
          cols_(static_cast<int32_t>(cols)) {
        for (int lane = 0; lane < kLanes<float>; ++lane) lane_[lane] = lane;
    }
    Mask keep(int64_t j, Vec<float> residual) const {
        const Mask key = reinterpret_cast<Mask>(residual) & static_cast<int32_t>(kMagnitudeMask);
        const Mask index = lane_ + static_cast<int32_t>(j);
        return ((key > value_) | ((key == value_) & (index < until_))) & (index < cols_);
    }

  private:
    Mask value_, lane_ = {};
    int32_t until_, cols_;
};

// row[j] += weight * (low[j] + (kept ? residual[j] : 0)) for j in [from, padded(to)); `row` points at j = 0.
void add_row(const Residual& residual, const Threshold& threshold, int64_t i, int64_t from, int64_t to, float weight,
             float* scratch, float* row, UpdateStats& stats) {
    RowStats sums;
    const Keeper keeper(threshold, i, residual.cols());
    const Vec<float> w = splat(weight);
    residual.each(i, from, to, scratch, [&](int64_t j, Vec<float> d, Vec<float> l, Vec<float> r) {
        const Mask keep = keeper.keep(j, r);
        const Vec<float> s = reinterpret_cast<Vec<float>>(reinterpret_cast<Mask>(r) & keep);
        store(row + j, multiply_add(w, l + s, load(row + j)));
        sums.delta += d * d;
        sums.residual += r * r;
        sums.kept_energy += s * s;
        sums.kept -= keep;
        sums.non_finite -=
            (reinterpret_cast<Mask>(d) & static_cast<int32_t>(kMagnitudeMask)) >= static_cast<int32_t>(kNonFiniteKey);
    });
    sums.add_to(stats);
}

}  // namespace

void merge_update(const Matrix& out, const Matrix& base, const Expert* experts, int64_t count, UpdateStats* stats,
                  int threads) {
    const int64_t stride = padded(out.cols), tasks = (out.rows + kTaskRows - 1) / kTaskRows;
    const int workers = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tasks)));
    if (!count) return;
    std::vector<Residual> residuals;
    residuals.reserve(static_cast<size_t>(count));
    for (int64_t t = 0; t < count; ++t) residuals.emplace_back(base, experts[t].tuned, experts[t].low_rank);
    // Rows that need neither conversion nor padding are updated where they are, unless another expert has yet to read
    // the base, which may be the same memory.
    const bool direct = count == 1 && out.dtype == DType::kFloat32 && out.cols == stride;
    Buffer<float> scratch(workers * 2 * stride);
    std::vector<UpdateStats> parts(static_cast<size_t>(tasks * count));  // per task, summed in order at the end
    parallel_for(tasks, workers, [&](int64_t task, int worker) {
        float *delta = scratch.data() + worker * 2 * stride, *copy = delta + stride;
        std::fill(copy, copy + stride, 0.0f);
        const int64_t end = std::min(out.rows, (task + 1) * kTaskRows), block = residuals[0].block();
        for (int64_t from = 0; from < out.cols; from += block) {
            const int64_t to = std::min(out.cols, from + block);
            for (int64_t i = task * kTaskRows; i < end; ++i) {
                float* row = direct ? static_cast<float*>(const_cast<void*>(out.at(i, 0))) : copy;
                if (!direct) read_row(out, i, from, to - from, row + from);
                for (int64_t t = 0; t < count; ++t) {
                    add_row(residuals[static_cast<size_t>(t)], experts[t].threshold, i, from, to, experts[t].weight,
                            delta, row, parts[static_cast<size_t>(task * count + t)]);
                }
                if (!direct) write_row(out, i, from, to - from, row + from);
            }
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
