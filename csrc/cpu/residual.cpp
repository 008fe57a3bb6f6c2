#include "residual.h"

namespace lors {

Residual::Residual(const Matrix& base, const Matrix& tuned, const LowRank& low_rank)
    : delta_(base, tuned), low_rank_(low_rank), right_(low_rank.rank * padded(tuned.cols)) {
    right_.zero();
    const int64_t n = padded(tuned.cols);
    for (int64_t j = 0; j < tuned.cols; ++j) {
        for (int64_t r = 0; r < low_rank.rank; ++r) right_[r * n + j] = low_rank.right[j * low_rank.rank + r];
    }
}

namespace {

// low and residual of V vectors at a time: each factor of `left` is broadcast once for all of them, and V independent
// sums hide the latency of the multiply-adds. Every entry sees the same operations in the same order whatever V is.
template <int V>
inline void columns(const float* left, const float* right, int64_t rank, int64_t n, const float* delta, float* low,
                    float* residual) {
    Vec<float> sum[V] = {};
    for (int64_t r = 0; r < rank; ++r) {
        const Vec<float> factor = splat(left[r]);
        for (int v = 0; v < V; ++v) sum[v] += factor * load(right + r * n + v * kLanes<float>);
    }
    for (int v = 0; v < V; ++v) {
        store(low + v * kLanes<float>, sum[v]);
        store(residual + v * kLanes<float>, load(delta + v * kLanes<float>) - sum[v]);
    }
}

}  // namespace

void Residual::row(int64_t i, float* delta, float* low, float* residual) const {
    constexpr int V = 4;
    const int64_t n = padded(cols()), rank = low_rank_.rank;
    delta_.row(i, delta);
    const float* left = low_rank_.left + i * rank;
    int64_t j = 0;
    for (; j + V * kLanes<float> <= n; j += V * kLanes<float>) {
        columns<V>(left, right_.data() + j, rank, n, delta + j, low + j, residual + j);
    }
    for (; j < n; j += kLanes<float>) columns<1>(left, right_.data() + j, rank, n, delta + j, low + j, residual + j);
}

}  // namespace lors
