// What kernels that read and write a tile of a matrix share: whose entries are whose, stores, and sums over the block.
#pragma once

#include "residual.cuh"
#include "warp.cuh"

namespace lors {

constexpr int kTileThreads = 256;
constexpr int kTileCols = 256, kTileRows = kTileThreads * kVector / kTileCols;

__device__ __forceinline__ void store_any(void* data, int dtype, int64_t at, float v) {
    switch (dtype) {
        case static_cast<int>(DType::kFloat16): static_cast<__half*>(data)[at] = __float2half_rn(v); break;
        case static_cast<int>(DType::kBFloat16): static_cast<__nv_bfloat16*>(data)[at] = __float2bfloat16_rn(v); break;
        default: static_cast<float*>(data)[at] = v;
    }
}

template <Kind K>
__device__ __forceinline__ void store8(void* data, int dtype, int64_t at, int count, const float* v) {
    if constexpr (K == Kind::kFloat32) {
        float4* to = reinterpret_cast<float4*>(static_cast<float*>(data) + at);
        to[0] = make_float4(v[0], v[1], v[2], v[3]);
        to[1] = make_float4(v[4], v[5], v[6], v[7]);
    } else if constexpr (K == Kind::kAny) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
            if (e < count) store_any(data, dtype, at + e, v[e]);
        }
    } else {
        unsigned words[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            unsigned low, high;
            if constexpr (K == Kind::kFloat16) {
                low = __half_as_ushort(__float2half_rn(v[2 * w]));
                high = __half_as_ushort(__float2half_rn(v[2 * w + 1]));
            } else {
                low = __bfloat16_as_ushort(__float2bfloat16_rn(v[2 * w]));
                high = __bfloat16_as_ushort(__float2bfloat16_rn(v[2 * w + 1]));
            }
            words[w] = low | high << 16;
        }
        *reinterpret_cast<uint4*>(static_cast<uint16_t*>(data) + at) =
            make_uint4(words[0], words[1], words[2], words[3]);
    }
}

// Sums over the block of four numbers and two counts per expert: warps leave theirs in shared memory and go on, and
// after kSlots experts, or the last one, there is one barrier and a few threads add them up, in the order of the warps.
// The counts share a word: a block has fewer than 2^16 entries.
constexpr int kSums = 4, kSlots = 16, kTileWarps = kTileThreads / 32, kLeft = kSums + 1;
constexpr int kSumsSize = kSlots * kTileWarps * kLeft;

// Leaves the warp's sums of v, and of first + 2^16 second, in a slot.
__device__ __forceinline__ void leave_sums(float (&v)[kSums], unsigned first, unsigned second, int slot, float* sums) {
    const unsigned counted = __reduce_add_sync(~0u, first + (second << 16));
    const float mine = warp_sums(v);
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    if (lane < kLeft) {
        sums[(slot * kTileWarps + warp) * kLeft + lane] = lane < kSums ? mine : __uint_as_float(counted);
    }
}

// Calls write(slot, which, total) and counted(slot, first, second) for what was left in the slots; all threads of the
// block come. A barrier has to pass before slots are written again.
template <class F, class C>
__device__ __forceinline__ void collect_sums(int slots, const float* sums, const F& write, const C& counted) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < slots * kLeft; i += kTileThreads) {
        const int slot = i / kLeft, which = i % kLeft;
        const float* from = sums + slot * kTileWarps * kLeft + which;
        if (which < kSums) {
            float total = 0;
#pragma unroll
            for (int warp = 0; warp < kTileWarps; ++warp) total += from[warp * kLeft];
            write(slot, which, total);
        } else {
            unsigned all = 0;
#pragma unroll
            for (int warp = 0; warp < kTileWarps; ++warp) all += __float_as_uint(from[warp * kLeft]);
            counted(slot, static_cast<int32_t>(all & 0xffff), static_cast<int32_t>(all >> 16));
        }
    }
}

struct Place {
    int64_t row, col;
    int count;  // columns of this thread that exist, at most 8
};

// 256 columns by 8 rows of threads, each with R rows. Tiles are counted by blocks, in 31 bits: a division in 64 bits is
// a call.
template <int R>
__device__ __forceinline__ Place place_of(unsigned tile, int64_t n) {
    constexpr int kAcross = kTileCols / kVector;
    const unsigned across = static_cast<unsigned>((n + kTileCols - 1) / kTileCols);
    const int64_t col = int64_t{tile % across} * kTileCols + threadIdx.x % kAcross * kVector;
    const int64_t left = n - col;
    const int64_t row = (int64_t{tile / across} * kTileRows + threadIdx.x / kAcross) * R;
    return {row, col, static_cast<int>(left < 0 ? 0 : left < kVector ? left : kVector)};
}

template <int R>
int64_t tiles_of(int64_t m, int64_t n) {
    return ceil_div(m, kTileRows * R) * ceil_div(n, kTileCols);
}

}  // namespace lors
