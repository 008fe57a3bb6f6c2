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

}  // namespace lors
