#include <algorithm>

#include "../common/ordered_key.h"
#include "ops.h"
#include "residual.h"

namespace lors {

int64_t sparse_part(const Matrix& base, const Matrix& tuned, const LowRank& low_rank, const Threshold& threshold,
                    uint8_t* mask, float* values, int64_t capacity) {
    const Residual residual(base, tuned, low_rank);
    const int64_t n = tuned.cols, stride = padded(n);
    Buffer<float> scratch(3 * stride);
    float *delta = scratch.data(), *low = delta + stride, *rest = low + stride;
    const uint32_t value_key = magnitude_key(threshold.value);
    std::fill(mask, mask + (tuned.rows * n + 7) / 8, uint8_t{0});
    int64_t count = 0;
    for (int64_t i = 0; i < tuned.rows; ++i) {
        residual.row(i, delta, low, rest);
        for (int64_t j = 0, bit = i * n; j < n; ++j, ++bit) {
            const uint32_t key = magnitude_key(rest[j]);
            const bool keep = key > value_key || (key == value_key && bit < threshold.cut);
            if (!keep) continue;
            if (count == capacity) return -1;
            mask[bit >> 3] |= static_cast<uint8_t>(1u << (bit & 7));
            values[count++] = rest[j];
        }
    }
    return count;
}

}  // namespace lors
