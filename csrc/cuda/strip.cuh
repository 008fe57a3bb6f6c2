// The residual in strips: a warp takes four rows by 256 columns, a lane eight of the columns, and so four rows share
// what is read of `right`, and all lanes what is read of `left`.
#pragma once

#include "tiles.cuh"

namespace lors {

constexpr int kStripRows = 4;
constexpr int kStage = 16;  // columns of left that a warp holds in shared memory
constexpr int kStageSize = kStage * kStripRows;

// low[r][e] = sum over q of left[row + r, q] * right_t[q, col + e], in the order of q and with the bits of low8; for
// all lanes of a warp, which share the rows. Rows beyond `rows` are zero, and so is what lies outside the columns.
//   stage [kStageSize]: the warp's own, on 16 bytes
template <Kind K>
__device__ __forceinline__ void strip_low(const float* left, const float* right_t, int rank, int64_t n, int64_t row,
                                          int64_t rows, int64_t col, int count, float* stage,
                                          float (&low)[kStripRows][kVector]) {
#pragma unroll
    for (int r = 0; r < kStripRows; ++r) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) low[r][e] = 0.0f;
    }
    const float* next = right_t + (rank > 0 && count > 0 ? col : 0);  // without columns: what nobody uses
    for (int first = 0; first < rank; first += kStage) {
        const int here = rank - first < kStage ? rank - first : kStage;
        for (int i = static_cast<int>(threadIdx.x) % 32; i < here * kStripRows; i += 32) {
            const int64_t r = row + i % kStripRows;
            stage[i] = r < rows ? left[r * rank + first + i / kStripRows] : 0.0f;
        }
        __syncwarp();
#pragma unroll 1
        for (int q = 0; q < here; ++q, next += n) {
            float right[kVector];
            if constexpr (K == Kind::kAny) {
#pragma unroll
                for (int e = 0; e < kVector; ++e) right[e] = e < count ? next[e] : 0.0f;
            } else {
                load8<Kind::kFloat32>(next, 0, 0, kVector, right);
            }
            const float4 l = reinterpret_cast<const float4*>(stage)[q];
            const float of_row[kStripRows] = {l.x, l.y, l.z, l.w};
#pragma unroll
            for (int r = 0; r < kStripRows; ++r) {
#pragma unroll
                for (int e = 0; e < kVector; ++e) low[r][e] = __fmaf_rn(of_row[r], right[e], low[r][e]);
            }
        }
        __syncwarp();  // the stage is written again
    }
}

// delta of one row in a lane's columns
template <Kind K>
__device__ __forceinline__ void strip_delta(const GroupArgs& g, const PairView& view, int64_t row, int64_t col,
                                            int count, float* d) {
    float base[kVector];
    base8<K>(view, g.base_dtype, row, col, count, base);
    delta8<K>(view, g.tuned_dtype, row, col, count, base, d);
}

// Non-finite entries of delta in a lane's columns of some rows: for where a sum says that there are some.
template <Kind K>
__device__ __forceinline__ int count_non_finite(const GroupArgs& g, const PairView& view, int64_t row, int rows,
                                                int64_t col, int count) {
    int bad = 0;
#pragma unroll 1
    for (int r = 0; r < rows; ++r) {
        float d[kVector];
        strip_delta<K>(g, view, row + r, col, count, d);
#pragma unroll
        for (int e = 0; e < kVector; ++e) bad += magnitude_key(d[e]) >= kNonFiniteKey;
    }
    return bad;
}

}  // namespace lors
