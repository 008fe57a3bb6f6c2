// The residual delta - L of one row. Selecting and applying must see the same bits, so there is exactly one function
// that computes them, of operations that no compiler may fuse differently per caller.
#pragma once

#include <algorithm>

#include "buffer.h"
#include "delta.h"

namespace lors {

class Residual {
  public:
    Residual(const Matrix& base, const Matrix& tuned, const LowRank& low_rank);

    int64_t rows() const { return delta_.rows(); }
    int64_t cols() const { return delta_.cols(); }

    // Columns of one visit: as much of `right` as stays in L1 while the rows of a task go by.
    int64_t block() const {
        return std::clamp<int64_t>(24576 / (4 * std::max<int64_t>(1, low_rank_.rank)) / 64 * 64, 64, 1 << 20);
    }

    // use(j, delta, low, residual) with lanes j .. j + kLanes of row i, for j over [from, padded(to)):
    // low[j] = sum_r left[i, r] * right[j, r], residual[j] = delta[i, j] - low[j]; zeros past cols. `from` is a
    // multiple of kPad, `to` is one too or the number of columns. `scratch` [padded(to - from)] is for a delta that is
    // not stored.
    template <class Use>
    void each(int64_t i, int64_t from, int64_t to, float* scratch, const Use& use) const {
        constexpr int64_t V = 4, L = kLanes<float>;
        const float* delta = scratch;
        if (delta_.stored()) {
            delta = delta_.stored_row(i) + from;
        } else {
            delta_.row(i, from, to - from, scratch);
        }
        const int64_t count = padded(to - from);
        int64_t j = 0;
        for (; j + V * L <= count; j += V * L) columns<V>(i, from + j, delta + j, use);
        for (; j < count; j += L) columns<1>(i, from + j, delta + j, use);
    }

    // The same into memory, each [padded(cols)].
    void row(int64_t i, float* delta, float* low, float* residual) const {
        each(i, 0, cols(), delta, [&](int64_t j, Vec<float> d, Vec<float> l, Vec<float> r) {
            store(delta + j, d);
            store(low + j, l);
            store(residual + j, r);
        });
    }

  private:
    // V vectors at a time, `delta` pointing at the first of them: each factor of `left` is broadcast once for all of
    // them, and V independent sums hide the latency of the multiply-adds. Every entry sees the same operations in the
    // same order whatever V is.
    template <int V, class Use>
    __attribute__((always_inline)) inline void columns(int64_t i, int64_t j, const float* delta, const Use& use) const {
        const int64_t n = padded(cols()), rank = low_rank_.rank;
        const float *left = low_rank_.left + i * rank, *right = right_.data() + j;
        Vec<float> sum[V] = {};
        for (int64_t r = 0; r < rank; ++r) {
            const Vec<float> factor = splat(left[r]);
            for (int v = 0; v < V; ++v) sum[v] = multiply_add(factor, load(right + r * n + v * kLanes<float>), sum[v]);
        }
        for (int v = 0; v < V; ++v) {
            const Vec<float> d = load(delta + v * kLanes<float>);
            use(j + v * kLanes<float>, d, sum[v], d - sum[v]);
        }
    }

    Delta delta_;
    LowRank low_rank_;
    Buffer<float> right_;  // [rank, padded(cols)]: right transposed, so that lanes run along the row
};

}  // namespace lors
