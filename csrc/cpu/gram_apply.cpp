#include "gram.h"
#include "ops.h"

namespace lors {

void gram_apply(const Matrix& base, const Matrix& tuned, bool transposed, const float* x, int64_t width, float* z,
                int threads) {
    const Delta delta(base, tuned);
    const int64_t n = transposed ? delta.rows() : delta.cols(), np = padded(n);
    Buffer<float> vectors(even(width) * np), products(even(width) * np);
    vectors.zero();
    for (int64_t c = 0; c < width; ++c) {
        for (int64_t j = 0; j < n; ++j) vectors[c * np + j] = x[j * width + c];
    }
    const auto apply = [&](const auto& a) {
        gram<float>(a, vectors.data(), even(width), products.data(), static_cast<float*>(nullptr), false, threads);
    };
    if (transposed) {
        apply(DeltaColumns{delta});
    } else if (delta.stored() && delta.contiguous()) {
        apply(PackedRows{delta.stored_row(0), delta.rows(), n});
    } else {
        apply(DeltaRows{delta});
    }
    for (int64_t c = 0; c < width; ++c) {
        for (int64_t j = 0; j < n; ++j) z[j * width + c] = products[c * np + j];
    }
}

}  // namespace lors
