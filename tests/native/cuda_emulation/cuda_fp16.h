// float16 <-> float32, rounding to nearest even.
#pragma once

#include "cuda_runtime_api.h"

struct __half {
    uint16_t bits;
};

inline unsigned short __half_as_ushort(__half h) {
    return h.bits;
}
inline __half __ushort_as_half(unsigned short bits) {
    return {bits};
}

inline float __half2float(__half h) {
    const unsigned sign = (h.bits & 0x8000u) << 16, rest = h.bits & 0x7fffu;
    if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000u | (rest & 0x3ff) << 13);
    // as an exponent too small by 112, which the product makes good; exact for denormals too
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest << 13) * 0x1p112f));
}

inline __half __float2half_rn(float value) {
    const unsigned all = __float_as_uint(value), sign = all >> 16 & 0x8000u, bits = all & 0x7fffffffu;
    if (bits > 0x7f800000u) return {static_cast<uint16_t>(0x7fff)};
    if (bits >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00)};
    unsigned rounded;
    if (bits < 0x38800000u) {  // a denormal: the addition rounds to multiples of 2^-24
        rounded = __float_as_uint(__uint_as_float(bits) + 0.5f) - 0x3f000000u;
    } else {
        rounded = (bits + 0xfff + (bits >> 13 & 1)) - 0x38000000u;
        rounded >>= 13;
    }
    return {static_cast<uint16_t>(sign | rounded)};
}

// Tensor cores (csrc/cuda/tensor.cuh). Products are exact, a sum of 16 and what is added to is cut off to float32, not
// rounded: a device aligns the terms to the largest and cuts them off, which is between the two.
#define LORS_TENSOR_EMULATED

namespace lors {

inline float half_at(uint32_t pair, int which) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16 * which)));
}

inline float cut_off(double value) {
    const float nearest = static_cast<float>(value);
    const double back = nearest;
    if (!(back > value ? value > 0 : back < value && value < 0)) return nearest;
    unsigned bits = __float_as_uint(nearest);
    return __uint_as_float(bits - 1);  // one step towards zero
}

inline void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    const int g = emulation::lane() / 4, t = emulation::lane() % 4;
    const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
    double sums[4] = {c[0], c[1], c[2], c[3]};
    float a[2][16], b[2][16];
    for (int half = 0; half < 2; ++half) {  // columns 0 to 7 and 8 to 15 of a
        const uint64_t* all = emulation::exchange(~0u, mine[2 * half] | uint64_t{mine[2 * half + 1]} << 32, 1 + half);
        for (int other = 0; other < 4; ++other) {
            for (int row = 0; row < 2; ++row) {
                const uint32_t pair = static_cast<uint32_t>(all[g * 4 + other] >> 32 * row);
                for (int e = 0; e < 2; ++e) a[row][8 * half + 2 * other + e] = half_at(pair, e);
            }
        }
    }
    const uint64_t* all = emulation::exchange(~0u, mine[4] | uint64_t{mine[5]} << 32, 3);
    for (int other = 0; other < 4; ++other) {
        for (int column = 0; column < 2; ++column) {
            for (int half = 0; half < 2; ++half) {
                const uint32_t pair = static_cast<uint32_t>(all[(2 * t + column) * 4 + other] >> 32 * half);
                for (int e = 0; e < 2; ++e) b[column][8 * half + 2 * other + e] = half_at(pair, e);
            }
        }
    }
    for (int k = 0; k < 16; ++k) {
        for (int i = 0; i < 4; ++i) sums[i] += static_cast<double>(a[i / 2][k]) * static_cast<double>(b[i % 2][k]);
    }
    for (int i = 0; i < 4; ++i) c[i] = cut_off(sums[i]);
}

inline uint32_t transposed(uint32_t tile) {
    const int g = emulation::lane() / 4, t = emulation::lane() % 4;
    const uint64_t* all = emulation::exchange(~0u, tile, 4);
    uint32_t result = 0;
    for (int e = 0; e < 2; ++e) {
        const uint32_t pair = static_cast<uint32_t>(all[(2 * t + e) * 4 + g / 2]);
        result |= (pair >> 16 * (g % 2) & 0xffff) << 16 * e;
    }
    return result;
}

template <class F>
uint32_t each_half(uint32_t a, uint32_t b, const F& f) {
    uint32_t result = 0;
    for (int e = 0; e < 2; ++e) {
        result |= static_cast<uint32_t>(__half_as_ushort(__float2half_rn(f(half_at(a, e), half_at(b, e))))) << 16 * e;
    }
    return result;
}
// A sum of two float16 numbers may need more than float32's 24 bits, but rounding it twice gives the same float16.
inline uint32_t add_halves(uint32_t a, uint32_t b) {
    return each_half(a, b, [](float x, float y) { return x + y; });
}
inline uint32_t larger_halves(uint32_t a, uint32_t b) {
    return each_half(a, b, [](float x, float y) { return __builtin_fmaxf(x, __builtin_fabsf(y)); });
}
inline uint32_t subtract_halves(uint32_t a, uint32_t b) {
    return each_half(a, b, [](float x, float y) { return x - y; });
}

}  // namespace lors
