#include "gram.h"
#include "ops.h"

namespace lors {

void gram_apply(const Matrix& base, const Matrix& tuned, bool transposed, const float* x, int64_t width, float* z,
                int threads) {
    const Delta delta(base, tuned);
    const int64_t n = transposed ? delta.rows() : delta.cols(), np = padded(n);
    const int64_t groups = (width + kWidth - 1) / kWidth;
    Buffer<float> vectors(groups * kWidth * np), products(groups * kWidth * np);
    vectors.zero();
    for (int64_t c = 0; c < width; ++c) {
        for (int64_t j = 0; j < n; ++j) vectors[c * np + j] = x[j * width + c];
    }
    if (transposed) {
        gram<float>(DeltaColumns{delta}, vectors.data(), groups, products.data(), static_cast<float*>(nullptr),
                    threads);
    } else {
        gram<float>(DeltaRows{delta}, vectors.data(), groups, products.data(), static_cast<float*>(nullptr), threads);
    }
    for (int64_t c = 0; c < width; ++c) {
        for (int64_t j = 0; j < n; ++j) z[j * width + c] = products[c * np + j];
    }
}

}  // namespace lors
