// bfloat16 <-> float32, rounding to nearest even.
#pragma once

#include "cuda_runtime_api.h"

struct __nv_bfloat16 {
    uint16_t bits;
};

inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) {
    return b.bits;
}
inline float __bfloat162float(__nv_bfloat16 b) {
    return __uint_as_float(static_cast<unsigned>(b.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    const unsigned bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(0x7fff)};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
