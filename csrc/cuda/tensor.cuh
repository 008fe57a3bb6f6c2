// Products of float16 tiles on tensor cores, and what belongs to them. Lane l of a warp is (g, t) = (l / 4, l % 4).
#pragma once

#include <cuda_fp16.h>

#ifndef LORS_TENSOR_EMULATED

namespace lors {

// c [16, 8] += a [16, 16] b [16, 8]: c = rows g, g + 8 by columns 2t, 2t + 1; a = rows g, g + 8 by columns 2t.., then
// 2t + 8..; b = rows 2t.., 2t + 8.. of column g.
__device__ __forceinline__ void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The transpose of an 8 x 8 tile: row g, columns 2t, 2t + 1.
__device__ __forceinline__ uint32_t transposed(uint32_t tile) {
    uint32_t result;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(tile));
    return result;
}

// Two float16 numbers each, one rounding.
__device__ __forceinline__ uint32_t add_halves(uint32_t a, uint32_t b) {
    uint32_t result;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}
// Two magnitudes, each the larger one.
__device__ __forceinline__ uint32_t larger_halves(uint32_t a, uint32_t b) {
    uint32_t result;
    asm("{\n\t.reg .b32 size;\n\tabs.f16x2 size, %2;\n\tmax.f16x2 %0, %1, size;\n\t}" : "=r"(result) : "r"(a), "r"(b));
    return result;
}
__device__ __forceinline__ uint32_t subtract_halves(uint32_t a, uint32_t b) {
    uint32_t result;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}

}  // namespace lors

#endif

namespace lors {

__device__ __forceinline__ uint32_t pack_halves(float low, float high) {
    return static_cast<uint32_t>(__half_as_ushort(__float2half_rn(low))) |
           static_cast<uint32_t>(__half_as_ushort(__float2half_rn(high))) << 16;
}
__device__ __forceinline__ float low_half(uint32_t pair) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair)));
}
__device__ __forceinline__ float high_half(uint32_t pair) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
}

}  // namespace lors
