#include <algorithm>

#include "../common/ordered_key.h"
#include "ops.h"
#include "residual.h"

namespace lors {
namespace {

// Bits [bit, bit + 64) of the mask; those past its end are zero.
uint64_t bits_at(const uint8_t* mask, int64_t bytes, int64_t bit) {
    const int64_t byte = bit >> 3;
    const int shift = static_cast<int>(bit & 7);
    uint64_t word = 0;
    std::memcpy(&word, mask + byte, static_cast<size_t>(std::min<int64_t>(8, bytes - byte)));
    word >>= shift;
    if (shift && byte + 8 < bytes) word |= static_cast<uint64_t>(mask[byte + 8]) << (64 - shift);
    return word;
}

// Bits [bit, bit + count), count <= 64.
uint64_t bits_at(const Sparse& s, int64_t bit, int64_t count) {
    const uint64_t word = bits_at(s.mask, (s.size + 7) / 8, bit);
    return count < 64 ? word & ((uint64_t{1} << count) - 1) : word;
}

int64_t set_bits(const Sparse& s) {
    int64_t total = 0;
    for (int64_t bit = 0; bit < s.size; bit += 64) {
        total += __builtin_popcountll(bits_at(s, bit, std::min<int64_t>(64, s.size - bit)));
    }
    return total;
}

// row[j] = scale * (next value) where bit i * n + j is set, else 0. Returns the number of values used so far.
template <DType D>
int64_t expand_row(const Sparse& s, int64_t i, int64_t n, int64_t used, float* row) {
    std::fill(row, row + padded(n), 0.0f);
    for (int64_t j = 0; j < n; j += 64) {
        uint64_t word = bits_at(s, i * n + j, std::min<int64_t>(64, n - j));
        for (; word; word &= word - 1) row[j + __builtin_ctzll(word)] = s.scale * load_one<D>(s.values, used++);
    }
    return used;
}

int64_t expand_row(const Sparse& s, int64_t i, int64_t n, int64_t used, float* row) {
    switch (s.dtype) {
        case DType::kFloat16: return expand_row<DType::kFloat16>(s, i, n, used, row);
        case DType::kBFloat16: return expand_row<DType::kBFloat16>(s, i, n, used, row);
        default: return expand_row<DType::kFloat32>(s, i, n, used, row);
    }
}

}  // namespace

SparseStats sparse_update(float* out, const Matrix& shape, const LowRank& low_rank, const Sparse& sparse,
                          float weight) {
    const int64_t n = shape.cols, stride = padded(n);
    SparseStats stats{0, set_bits(sparse), 0};
    if (stats.used != sparse.count) return stats;
    // L by the very function that the selection saw, so that merging from parts can give the bits of merging from
    // wholes; what it calls delta is of no interest here.
    const Residual factors({nullptr, DType::kFloat32, shape.rows, n, n}, {out, DType::kFloat32, shape.rows, n, n},
                           low_rank);
    Buffer<float> scratch(4 * stride);
    float *delta = scratch.data(), *low = delta + stride, *rest = low + stride, *row = rest + stride;
    int64_t used = 0;
    for (int64_t i = 0; i < shape.rows; ++i) {
        used = expand_row(sparse, i, n, used, row);
        factors.row(i, delta, low, rest);
        float* to = out + i * n;
        const Vec<float> w = splat(weight);
        const auto update = [&](float* values, int64_t j) {
            store(values, multiply_add(w, load(low + j) + load(row + j), load(values)));
        };
        int64_t j = 0;
        for (; j + kLanes<float> <= n; j += kLanes<float>) update(to + j, j);
        if (j < n) {  // the tail through a padded row
            std::fill(delta, delta + kLanes<float>, 0.0f);
            std::copy(to + j, to + n, delta);
            update(delta, j);
            std::copy(delta, delta + (n - j), to + j);
        }
        double energy = 0;
        for (j = 0; j < n; ++j) {
            energy += double{row[j]} * row[j];
            stats.non_finite += magnitude_key(row[j]) >= kNonFiniteKey || magnitude_key(low[j]) >= kNonFiniteKey;
        }
        stats.energy += energy;
    }
    return stats;
}

}  // namespace lors
