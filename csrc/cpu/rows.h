// A part of a row of any dtype, as float32 and back.
#pragma once

#include <cstring>

#include "simd.h"

namespace lors {

template <DType D>
inline void read_row(const void* from, int64_t n, float* row) {
    const int64_t body = n / kLanes<float> * kLanes<float>;
    for (int64_t j = 0; j < body; j += kLanes<float>) store(row + j, load_vector<D>(from, j));
    for (int64_t j = body; j < n; ++j) row[j] = load_one<D>(from, j);
}

// row[0, n) = m[i, j : j + n]
inline void read_row(const Matrix& m, int64_t i, int64_t j, int64_t n, float* row) {
    switch (m.dtype) {
        case DType::kFloat16: return read_row<DType::kFloat16>(m.at(i, j), n, row);
        case DType::kBFloat16: return read_row<DType::kBFloat16>(m.at(i, j), n, row);
        default: return read_row<DType::kFloat32>(m.at(i, j), n, row);
    }
}

// m[i, j : j + n] = row[0, n), rounded to nearest, ties to even
inline void write_row(const Matrix& m, int64_t i, int64_t j, int64_t n, const float* row) {
    void* to = const_cast<void*>(m.at(i, j));
    if (m.dtype == DType::kFloat32) {
        std::memcpy(to, row, static_cast<size_t>(n) * 4);
        return;
    }
    uint16_t* out = static_cast<uint16_t*>(to);
    int64_t k = 0;
    if (m.dtype == DType::kBFloat16) {
        for (; k < n; ++k) out[k] = float_to_bfloat(row[k]);
        return;
    }
#if defined(__AVX512F__) || defined(__AVX2__)
    for (; k + 8 <= n; k += 8) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k),
                         _mm256_cvtps_ph(_mm256_loadu_ps(row + k), _MM_FROUND_TO_NEAREST_INT));
    }
#elif defined(__aarch64__)
    for (; k + 4 <= n; k += 4) vst1_u16(out + k, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(row + k))));
#endif
    for (; k < n; ++k) out[k] = float_to_half(row[k]);
}

}  // namespace lors
