// delta and the residual on the device, eight neighbouring entries of a row at a time.
//
// The bits: inputs are converted to float32, subtracted with one rounding, and L is summed over the rank in order with
// fused multiply-adds. Every rounding is written out, so selecting and applying see the same bits in every kernel, and
// the Triton kernels see them too.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/ordered_key.h"
#include "launch.h"
#include "shared.cuh"

namespace lors {

constexpr int kVector = 8;

__device__ __forceinline__ float load_any(const void* data, int dtype, int64_t at) {
    switch (dtype) {
        case static_cast<int>(DType::kFloat16): return __half2float(static_cast<const __half*>(data)[at]);
        case static_cast<int>(DType::kBFloat16): return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[at]);
        default: return static_cast<const float*>(data)[at];
    }
}

// Eight neighbouring entries as they are stored, or zeros.
template <Kind K>
struct Raw {
    static constexpr int kParts = K == Kind::kFloat32 ? 2 : 1, kItem = 2 * kParts;
    uint4 part[kParts];

    __device__ __forceinline__ Raw(uintptr_t at, bool there) {
#pragma unroll
        for (int i = 0; i < kParts; ++i) part[i] = load16(at + 16 * i, there);
    }
    __device__ __forceinline__ void widen(float* v) const {
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
            const unsigned words[4] = {part[i].x, part[i].y, part[i].z, part[i].w};
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                if constexpr (K == Kind::kFloat32) {
                    v[4 * i + w] = __uint_as_float(words[w]);
                } else if constexpr (K == Kind::kFloat16) {
                    v[2 * w] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[w])));
                    v[2 * w + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[w] >> 16)));
                } else {
                    v[2 * w] = __uint_as_float(words[w] << 16);
                    v[2 * w + 1] = __uint_as_float(words[w] & 0xffff0000u);
                }
            }
        }
    }
};

// v[0, 8) = data[at, at + 8); past `count` zeros (only kAny may have count < 8), and where data is null.
template <Kind K>
__device__ __forceinline__ void load8(const void* data, int dtype, int64_t at, int count, float* v) {
    if constexpr (K == Kind::kAny) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) v[e] = data && e < count ? load_any(data, dtype, at + e) : 0.0f;
    } else {
        Raw<K>(reinterpret_cast<uintptr_t>(data) + at * Raw<K>::kItem, data != nullptr).widen(v);
    }
}

struct PairView {
    const void* base;
    int64_t base_stride;
    const void* tuned;
    int64_t tuned_stride;
};

__device__ __forceinline__ PairView pair_view(const int64_t* table, int64_t p, int64_t pairs) {
    return {reinterpret_cast<const void*>(table[p]), table[pairs + p],
            reinterpret_cast<const void*>(table[2 * pairs + p]), table[3 * pairs + p]};
}

// base[row, col .. col + 8), zeros where there is no base
template <Kind K>
__device__ __forceinline__ void base8(const PairView& view, int dtype, int64_t row, int64_t col, int count, float* v) {
    load8<K>(view.base, dtype, row * view.base_stride + col, count, v);
}

// tuned[row, col .. col + 8) - base; x - 0 is x, bit for bit
template <Kind K>
__device__ __forceinline__ void delta8(const PairView& view, int dtype, int64_t row, int64_t col, int count,
                                       const float* base, float* d) {
    load8<K>(view.tuned, dtype, row * view.tuned_stride + col, count, d);
#pragma unroll
    for (int e = 0; e < kVector; ++e) d[e] = __fsub_rn(d[e], base[e]);
}

// low[r][e] = sum over q of left[row + r, q] * right_t[q, col + e], in the order of q
template <Kind K, int R>
__device__ __forceinline__ void low8(const float* left, const float* right_t, int64_t rank, int64_t n, int64_t row,
                                     int64_t rows, int64_t col, int count, float (*low)[kVector]) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) low[r][e] = 0.0f;
    }
    for (int64_t q = 0; q < rank; ++q) {
        float right[kVector];
        if constexpr (K == Kind::kAny) {
#pragma unroll
            for (int e = 0; e < kVector; ++e) right[e] = e < count ? right_t[q * n + col + e] : 0.0f;
        } else {
            load8<Kind::kFloat32>(right_t, 0, q * n + col, count, right);
        }
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const float l = row + r < rows ? left[(row + r) * rank + q] : 0.0f;
#pragma unroll
            for (int e = 0; e < kVector; ++e) low[r][e] = __fmaf_rn(l, right[e], low[r][e]);
        }
    }
}

// A group as a kernel sees it.
struct GroupArgs {
    const int64_t* table;
    int base_dtype, tuned_dtype;
    int64_t pairs, matrices, experts, m, n;
    const float* left;     // [P, m, rank]
    const float* right_t;  // [P, rank, n]
    int64_t rank;
};

inline GroupArgs arguments(const Group& group, const float* left, const float* right_t, int64_t rank) {
    return {group.table,   group.base_dtype, group.tuned_dtype, group.pairs(), group.matrices,
            group.experts, group.m,          group.n,           left,          right_t,
            rank};
}

// keys[r][e] of |delta - L| for R rows below `end`; the others, and columns outside the matrix, are for the caller to
// skip
template <Kind K, int R>
__device__ __forceinline__ void keys8(const GroupArgs& g, const PairView& view, int64_t p, int64_t row, int64_t end,
                                      int64_t col, uint32_t (*keys)[kVector]) {
    const int count = static_cast<int>(g.n - col < kVector ? g.n - col : kVector);
    float low[R][kVector];
    low8<K, R>(g.left + p * g.m * g.rank, g.right_t + p * g.rank * g.n, g.rank, g.n, row, end, col, count, low);
#pragma unroll
    for (int r = 0; r < R; ++r) {
        float base[kVector], d[kVector] = {};
        if (row + r < end) {
            base8<K>(view, g.base_dtype, row + r, col, count, base);
            delta8<K>(view, g.tuned_dtype, row + r, col, count, base, d);
        }
#pragma unroll
        for (int e = 0; e < kVector; ++e) keys[r][e] = magnitude_key(__fsub_rn(d[e], low[r][e]));
    }
}

}  // namespace lors
