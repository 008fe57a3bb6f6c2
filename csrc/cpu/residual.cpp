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

void Residual::row(int64_t i, float* delta, float* low, float* residual) const {
    const int64_t n = padded(cols()), rank = low_rank_.rank;
    delta_.row(i, delta);
    const float* left = low_rank_.left + i * rank;
    for (int64_t j = 0; j < n; j += kLanes<float>) {
        Vec<float> sum = {};
        for (int64_t r = 0; r < rank; ++r) sum += splat(left[r]) * load(right_.data() + r * n + j);
        store(low + j, sum);
        store(residual + j, load(delta + j) - sum);
    }
}

}  // namespace lors
