// Plain views of memory owned by somebody else. No PyTorch, no Python.
#pragma once

#include <cstdint>

namespace lors {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr int64_t item_size(DType dtype) {
    return dtype == DType::kFloat32 ? 4 : 2;
}

// A matrix whose columns are contiguous and whose rows may be strided.
struct Matrix {
    const void* data;  // [rows, cols]; nullptr stands for a matrix of zeros
    DType dtype;
    int64_t rows;
    int64_t cols;
    int64_t stride;  // elements from one row to the next

    const void* at(int64_t row, int64_t col) const {
        return static_cast<const char*>(data) + (row * stride + col) * item_size(dtype);
    }
};

// L = left @ right.T in float32. rank 0 means L = 0 and both pointers are ignored.
struct LowRank {
    const float* left;   // [rows, rank], contiguous
    const float* right;  // [cols, rank], contiguous
    int64_t rank;
};

// Which residuals survive: |R| > value, and of those with |R| == value the ones whose row-major index is below `cut`.
struct Threshold {
    float value;
    int64_t ties;  // how many entries equal to `value` are kept
    int64_t cut;
};

}  // namespace lors
