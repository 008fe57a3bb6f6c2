// The residual in strips: a warp takes four rows by 256 columns, a lane eight of the columns, and so four rows share
// what is read of `right`, and all lanes what is read of `left`.
#pragma once

#include "tiles.cuh"

namespace lors {

constexpr int kStripRows = 4;
constexpr int kStage = 32 / kStripRows;  // columns of left that a warp holds in shared memory, an entry a lane
constexpr int kStageSize = 32;

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
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const bool mine = row + lane % kStripRows < rows;
    int64_t entry = (row + lane % kStripRows) * rank + lane / kStripRows;
    for (int first = 0; first < rank; first += kStage, entry += kStage) {
        const int here = rank - first < kStage ? rank - first : kStage;
        stage[lane] = mine && lane / kStripRows < here ? left[entry] : 0.0f;
        __syncwarp();
#pragma unroll 1
        for (int q = 0; q < here; ++q, next += n) {
            float right[kVector];
            if constexpr (K == Kind::kAny) {
#pragma unroll
                for (int e = 0; e < kVector; ++e) right[e] = e < count ? next[e] : 0.0f;
            } else {
                const float4 a = reinterpret_cast<const float4*>(next)[0], b = reinterpret_cast<const float4*>(next)[1];
                right[0] = a.x, right[1] = a.y, right[2] = a.z, right[3] = a.w;
                right[4] = b.x, right[5] = b.y, right[6] = b.z, right[7] = b.w;
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

// delta in a lane's columns, row after row; zeros where a row is not there. No branch: loads of several rows may be
// under way at once.
template <Kind K>
class StripDelta {
  public:
    __device__ __forceinline__ StripDelta(const GroupArgs& g, const PairView& view, int64_t row, int64_t col, int count)
        : g_(g), view_(view), row_(row), col_(col), count_(count) {
        if constexpr (K != Kind::kAny) {
            constexpr int kItem = Raw<K>::kItem;
            base_ = reinterpret_cast<uintptr_t>(view.base) + (row * view.base_stride + col) * kItem;
            tuned_ = reinterpret_cast<uintptr_t>(view.tuned) + (row * view.tuned_stride + col) * kItem;
            base_step_ = view.base_stride * kItem, tuned_step_ = view.tuned_stride * kItem;
        }
    }
    __device__ __forceinline__ void next(bool there, float* d) {
        float base[kVector];
        if constexpr (K == Kind::kAny) {
            base8<K>(view_, g_.base_dtype, row_, col_, there ? count_ : 0, base);
            delta8<K>(view_, g_.tuned_dtype, row_, col_, there ? count_ : 0, base, d);
            ++row_;
        } else {
            Raw<K>(base_, there && view_.base != nullptr).widen(base);
            Raw<K>(tuned_, there).widen(d);
            base_ += base_step_, tuned_ += tuned_step_;
#pragma unroll
            for (int e = 0; e < kVector; ++e) d[e] = __fsub_rn(d[e], base[e]);
        }
    }

  private:
    const GroupArgs& g_;
    const PairView& view_;
    int64_t row_, col_;
    int count_;
    uintptr_t base_ = 0, tuned_ = 0;
    int64_t base_step_ = 0, tuned_step_ = 0;
};

// A bit for each entry of the first `rows` rows of a strip.
__device__ __forceinline__ unsigned strip_rows(int rows) {
    return rows < kStripRows ? (1u << (rows * kVector)) - 1 : ~0u;
}

// Non-finite entries of delta in a lane's columns of some rows: for where a sum says that there are some.
template <Kind K>
__device__ __forceinline__ int count_non_finite(const GroupArgs& g, const PairView& view, int64_t row, int rows,
                                                int64_t col, int count) {
    int bad = 0;
    StripDelta<K> delta(g, view, row, col, count);
#pragma unroll 1
    for (int r = 0; r < rows; ++r) {
        float d[kVector];
        delta.next(count > 0, d);
#pragma unroll
        for (int e = 0; e < kVector; ++e) bad += magnitude_key(d[e]) >= kNonFiniteKey;
    }
    return bad;
}

}  // namespace lors
