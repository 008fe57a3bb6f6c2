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
