// delta = tuned - base, formed a row at a time in float32.
#pragma once

#include "simd.h"

namespace lors {

// out[0, padded(n)) = tuned[0, n) - base[0, n), then zeros. Both inputs are converted to float32 first; there is one
// rounding, that of the subtraction. base == nullptr means zeros.
using DeltaRow = void (*)(const void* base, const void* tuned, int64_t n, float* out);

template <DType B, DType T>
void delta_row(const void* base, const void* tuned, int64_t n, float* out) {
    const int64_t body = n / kLanes<float> * kLanes<float>;
    if (base) {
        for (int64_t j = 0; j < body; j += kLanes<float>) {
            store(out + j, load_vector<T>(tuned, j) - load_vector<B>(base, j));
        }
        for (int64_t j = body; j < n; ++j) out[j] = load_one<T>(tuned, j) - load_one<B>(base, j);
    } else {
        for (int64_t j = 0; j < body; j += kLanes<float>) store(out + j, load_vector<T>(tuned, j));
        for (int64_t j = body; j < n; ++j) out[j] = load_one<T>(tuned, j);
    }
    for (int64_t j = n; j < padded(n); ++j) out[j] = 0.0f;
}

template <DType B>
inline DeltaRow delta_row_for(DType tuned) {
    switch (tuned) {
        case DType::kFloat16: return delta_row<B, DType::kFloat16>;
        case DType::kBFloat16: return delta_row<B, DType::kBFloat16>;
        default: return delta_row<B, DType::kFloat32>;
    }
}

inline DeltaRow delta_row_for(DType base, DType tuned) {
    switch (base) {
        case DType::kFloat16: return delta_row_for<DType::kFloat16>(tuned);
        case DType::kBFloat16: return delta_row_for<DType::kBFloat16>(tuned);
        default: return delta_row_for<DType::kFloat32>(tuned);
    }
}

// The pair (base, tuned) of one matrix, with the conversion chosen once.
class Delta {
  public:
    Delta(const Matrix& base, const Matrix& tuned)
        : base_(base), tuned_(tuned), row_(delta_row_for(base.dtype, tuned.dtype)) {}

    int64_t rows() const { return tuned_.rows; }
    int64_t cols() const { return tuned_.cols; }

    // out[0, padded(count)) = delta[i, j : j + count], then zeros.
    void row(int64_t i, int64_t j, int64_t count, float* out) const {
        row_(base_.data ? base_.at(i, j) : nullptr, tuned_.at(i, j), count, out);
    }
    void row(int64_t i, float* out) const { row(i, 0, cols(), out); }

    // Whether the rows of delta lie in memory as they are wanted here: float32, no base, nothing to pad.
    bool stored() const { return !base_.data && tuned_.dtype == DType::kFloat32 && tuned_.cols == padded(tuned_.cols); }
    const float* stored_row(int64_t i) const { return static_cast<const float*>(tuned_.at(i, 0)); }
    int64_t step() const { return tuned_.stride; }
    bool contiguous() const { return tuned_.stride == tuned_.cols || tuned_.rows <= 1; }

  private:
    Matrix base_, tuned_;
    DeltaRow row_;
};

}  // namespace lors
