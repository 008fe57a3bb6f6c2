// The residual delta - L of one row. Selecting and applying must see the same bits, so there is exactly one function
// that computes them, and it is not inlined: inlining would let the compiler contract the sums differently per caller.
#pragma once

#include "buffer.h"
#include "delta.h"

namespace lors {

class Residual {
  public:
    Residual(const Matrix& base, const Matrix& tuned, const LowRank& low_rank);

    int64_t rows() const { return delta_.rows(); }
    int64_t cols() const { return delta_.cols(); }

    // residual[j] = delta[i, j] - low[j], low[j] = sum_r left[i, r] * right[j, r]; all three [padded(cols)], zeros past
    // cols. `delta` receives delta[i, :].
    __attribute__((noinline)) void row(int64_t i, float* delta, float* low, float* residual) const;

  private:
    Delta delta_;
    LowRank low_rank_;
    Buffer<float> right_;  // [rank, padded(cols)]: right transposed, so that lanes run along the row
};

}  // namespace lors
