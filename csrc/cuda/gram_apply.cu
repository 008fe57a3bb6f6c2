// z = A.T @ (A @ x) in one pass over A = delta or its transpose, [outer, inner] with inner the short side.
//
// A block takes some rows of A. A thread owns inner indices i = thread + 256 k and holds x[i, 0..8) and its part of
// z[i, 0..8) in registers, so a row is read once: y = A x is summed over the block (a shuffle that leaves each lane one
// of 32 sums, then the warps in order), and z += A.T y follows from the deltas still in registers. While one stage of
// rows is worked on, the next is copied there asynchronously: over the one before, of which nothing is read behind the
// barriers of its last batch. The blocks' sums are added in order by the caller.
#include <cuda_pipeline.h>

#include <algorithm>
#include <cmath>

#include "residual.cuh"
#include "tensor.cuh"

namespace lors {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kWidth = 8;  // vectors at a time
constexpr int kBatch = 4;  // rows reduced at a time: 4 rows x 8 vectors = 32 sums, one per lane
constexpr int kMaxPerThread = 5;
constexpr int kRowsPerBlock = 256;  // float32 sums stay short, and the partial sums stay a few percent of the reads
constexpr int kPlainRows = 4096;    // of a block of the plain kernel
constexpr int kCopy = 16;           // bytes of one asynchronous copy

template <Kind K>
struct Item {
    using type = uint16_t;
};
template <>
struct Item<Kind::kFloat32> {
    using type = float;
};

template <Kind K>
__device__ __forceinline__ float widen(typename Item<K>::type v) {
    if constexpr (K == Kind::kFloat32) return v;
    if constexpr (K == Kind::kFloat16) return __half2float(__ushort_as_half(v));
    return __uint_as_float(static_cast<unsigned>(v) << 16);
}

struct Gram {
    GroupArgs g;
    int64_t outer, inner, rows, chunks, b;
    const float* x;  // [P, inner, b]
    float* y;        // [P, outer, b] or null
    float* partial;  // [P, chunks, inner, b]
};

// Halves the list of sums and pairs up lanes until lane l holds the warp's total of v[l]; Half is a template argument
// so that v stays in registers.
template <int Half>
__device__ __forceinline__ void halve(float* v) {
    const bool upper = (threadIdx.x & Half) != 0;
#pragma unroll
    for (int j = 0; j < Half; ++j) {
        const float send = upper ? v[j] : v[j + Half];
        const float keep = upper ? v[j + Half] : v[j];
        v[j] = keep + __shfl_xor_sync(~0u, send, Half);
    }
}

__device__ __forceinline__ float transpose_sum(float* v) {
    halve<16>(v), halve<8>(v), halve<4>(v), halve<2>(v), halve<1>(v);
    return v[0];
}

// A stage holds kCopy / sizeof(item) rows of A, raw, base and tuned: [row][inner], or [inner][row] when transposed.
template <Kind K, bool Transposed>
struct Stage {
    using T = typename Item<K>::type;
    static constexpr int kRows = kCopy / static_cast<int>(sizeof(T));

    static __host__ __device__ int64_t bytes(int64_t inner) { return 2 * inner * kCopy; }

    static __device__ __forceinline__ void copy(const Gram& a, const PairView& view, int64_t row, int64_t end,
                                                char* stage) {
        // per matrix: kRows rows of inner / kRows copies, or inner rows of one; in 32 bits, where a division is cheap
        const int segments = static_cast<int>(a.inner);
        for (int s = static_cast<int>(threadIdx.x); s < segments; s += kThreads) {
            int64_t i, j;  // of delta
            bool there;
            if constexpr (Transposed) {
                i = s, j = row, there = row < end;
            } else {
                const int each = segments / kRows;
                i = row + s / each, j = s % each * kRows, there = i < end;
            }
            char* to = stage + s * kCopy;
            const size_t skip = there ? 0 : kCopy;
            const char* tuned = static_cast<const char*>(view.tuned);
            if (there) tuned += (i * view.tuned_stride + j) * static_cast<int64_t>(sizeof(T));
            __pipeline_memcpy_async(to + segments * kCopy, tuned, kCopy, skip);
            if (view.base) {
                const char* base = static_cast<const char*>(view.base);
                if (there) base += (i * view.base_stride + j) * static_cast<int64_t>(sizeof(T));
                __pipeline_memcpy_async(to, base, kCopy, skip);
            } else {
                *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
            }
        }
    }

    // A[row of the stage, i .. ) for kBatch rows from `first`
    static __device__ __forceinline__ void fetch(const char* stage, int inner, int i, int first, float (&d)[kBatch]) {
        const T* base = reinterpret_cast<const T*>(stage);
        const T* tuned = base + inner * kRows;
#pragma unroll
        for (int r = 0; r < kBatch; ++r) {
            const int at = Transposed ? i * kRows + first + r : (first + r) * inner + i;
            d[r] = __fsub_rn(widen<K>(tuned[at]), widen<K>(base[at]));
        }
    }
};

template <Kind K, bool Transposed, int PerThread>
__global__ void __launch_bounds__(kThreads) gram_kernel(Gram a) {
    using S = Stage<K, Transposed>;
    LORS_DYNAMIC_SHARED(memory);
    LORS_SHARED(float, parts, [kWarps][32]);
    LORS_SHARED(__align__(16) float, sums, [32]);
    const int64_t p = blockIdx.x / a.chunks, chunk = blockIdx.x % a.chunks, column = blockIdx.y * int64_t{kWidth};
    const int width = static_cast<int>(a.b - column < kWidth ? a.b - column : kWidth);
    const PairView view = pair_view(a.g.table, p, a.g.pairs);
    const int64_t first = chunk * a.rows, end = a.outer < first + a.rows ? a.outer : first + a.rows;
    const int inner = static_cast<int>(a.inner), bytes = static_cast<int>(S::bytes(a.inner));

    S::copy(a, view, first, end, memory);
    __pipeline_commit();
    float x[PerThread][kWidth], z[PerThread][kWidth];
#pragma unroll
    for (int k = 0; k < PerThread; ++k) {
        const int64_t i = threadIdx.x + k * kThreads;
#pragma unroll
        for (int c = 0; c < kWidth; ++c) {
            x[k][c] = i < a.inner && c < width ? a.x[(p * a.inner + i) * a.b + column + c] : 0.0f;
            z[k][c] = 0.0f;
        }
    }
    int now = 0;
    for (int64_t row = first; row < end; row += S::kRows, now ^= 1) {
        if (row + S::kRows < end) S::copy(a, view, row + S::kRows, end, memory + (now ^ 1) * bytes);
        __pipeline_commit();
        __pipeline_wait_prior(1);
        __syncthreads();
#pragma unroll 1
        for (int batch = 0; batch < S::kRows; batch += kBatch) {
            float y[32] = {}, d[PerThread][kBatch] = {};
#pragma unroll
            for (int k = 0; k < PerThread; ++k) {
                const int i = static_cast<int>(threadIdx.x) + k * kThreads;
                if (i < inner) S::fetch(memory + now * bytes, inner, i, batch, d[k]);
#pragma unroll
                for (int r = 0; r < kBatch; ++r) {
#pragma unroll
                    for (int c = 0; c < kWidth; ++c) y[r * kWidth + c] += d[k][r] * x[k][c];
                }
            }
            parts[threadIdx.x / 32][threadIdx.x % 32] = transpose_sum(y);
            __syncthreads();
            if (threadIdx.x < 32) {
                float total = 0;
#pragma unroll
                for (int warp = 0; warp < kWarps; ++warp) total += parts[warp][threadIdx.x];
                sums[threadIdx.x] = total;
                const int64_t o = row + batch + threadIdx.x / kWidth;
                const int c = static_cast<int>(threadIdx.x) % kWidth;
                if (a.y && o < end && c < width) a.y[(p * a.outer + o) * a.b + column + c] = total;
            }
            __syncthreads();
#pragma unroll
            for (int k = 0; k < PerThread; ++k) {
#pragma unroll
                for (int r = 0; r < kBatch; ++r) {
#pragma unroll
                    for (int c = 0; c < kWidth; ++c) z[k][c] += d[k][r] * sums[r * kWidth + c];
                }
            }
        }
    }
#pragma unroll
    for (int k = 0; k < PerThread; ++k) {
        const int64_t i = threadIdx.x + k * kThreads;
#pragma unroll
        for (int c = 0; c < kWidth; ++c) {
            if (i < a.inner && c < width)
                a.partial[((p * a.chunks + chunk) * a.inner + i) * a.b + column + c] = z[k][c];
        }
    }
}

// The same for float16 on tensor cores, in tiles of 16 rows of A. A warp owns inner indices, 32 at a time. A lane
// copies what it needs of them itself, and asynchronously: the next tile's numbers come into the place of those that
// are in registers by now, while these are worked on.
//
// Where A's rows are delta's, that is 8 neighbouring inner indices of two rows, taken as 2t, 2t + 1, 2t + 8, 2t + 9 of
// two tiles of 16, in x and z as well as here. Where they are its columns, it is 4 neighbouring rows of A at four inner
// indices, taken as rows 2t, 2t + 1, 2t + 8, 2t + 9. So one of y = A x and z += A.T y takes the registers as they are,
// and the other takes them transposed.
//
// Everything is as exact as in float32: a delta is hi + lo, two float16 numbers (the error of a difference is one), and
// lo is passed over where a warp's are all 0; x and y are hi + lo too, scaled by powers of two, a vector's own.
// Where a difference overflows float16 the tile is taken by halves.
constexpr int kTileRows = 16, kTileSums = kTileRows * kWidth;

// tuned - base = hi + lo, exactly; NaN in lo where hi overflows
__device__ __forceinline__ void difference(uint32_t tuned, uint32_t base, uint32_t& hi, uint32_t& lo) {
    hi = subtract_halves(tuned, base);
    const uint32_t back = subtract_halves(tuned, hi);
    const uint32_t missing = subtract_halves(tuned, add_halves(hi, back));
    lo = add_halves(missing, subtract_halves(back, base));
}

// A power of two that takes top to at least 1 and below 4; 1 for nothing, and for what is no number.
__device__ __forceinline__ float downscale(float top) {
    const unsigned exponent = __float_as_uint(top) >> 23;
    return exponent > 0 && exponent < 255 ? __uint_as_float((exponent < 254 ? 254 - exponent : 1) << 23) : 1.0f;
}

__device__ __forceinline__ float largest_of_column(float top) {
    for (int step = 1; step < 4; step *= 2) {
        const float other = __shfl_xor_sync(~0u, top, step);
        top = other > top ? other : top;
    }
    return top;
}

__device__ __forceinline__ void split(float a, float b, uint32_t& hi, uint32_t& lo) {
    hi = pack_halves(a, b);
    lo = pack_halves(a - low_half(hi), b - high_half(hi));
}

__device__ __forceinline__ uint32_t halved(uint32_t pair) {
    return pack_halves(0.5f * low_half(pair), 0.5f * high_half(pair));
}

// What a lane copies of one chunk of 32 inner indices, of tuned and as much of base: kPieces of kPieceBytes.
template <bool Transposed>
struct Lane {
    static constexpr int kPieces = Transposed ? 4 : 2, kPieceBytes = 32 / kPieces, kChunkBytes = 64;

    // of thread 0; the other threads' follow one another
    static __device__ __forceinline__ int place(int chunk, int piece, bool base) {
        return (chunk * kChunkBytes + (2 * piece + base) * kPieceBytes) * kThreads;
    }
};

constexpr int64_t tensor_shared(int chunks) {
    return int64_t{chunks} * Lane<false>::kChunkBytes * kThreads;
}

// Where a lane's numbers of a tile lie: its first piece, and bytes over eight rows of the matrix.
template <bool Transposed>
struct Source {
    const char* at;
    int64_t step;

    __device__ __forceinline__ Source(const void* data, int64_t stride, int64_t row) : step(8 * stride * kItem) {
        const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
        const int64_t i = Transposed ? warp * 32 + lane / 4 : row + lane / 4;
        const int64_t j = Transposed ? row + lane % 4 * 4 : warp * 32 + lane % 4 * 8;
        at = static_cast<const char*>(data) + (i * stride + j) * kItem;
    }
    static constexpr int kItem = 2;
};

// Copies a lane's numbers of the rows of A from `row` on, up to `end`, into `stage`, where its own begin.
template <int Chunks, bool Transposed>
__device__ __forceinline__ void fetch(const Source<Transposed>& from, int row, int end, int inner, char* stage,
                                      bool base) {
    using L = Lane<Transposed>;
    const int first = static_cast<int>(threadIdx.x) / 32 * 32, lane = static_cast<int>(threadIdx.x) % 32;
    const char* at = from.at;
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
#pragma unroll
        for (int piece = 0; piece < L::kPieces; ++piece) {
            const int i = c * kThreads + first + (Transposed ? 8 * piece + lane / 4 : lane % 4 * 8);
            const bool there =
                (c < Chunks - 1 || i < inner) && row + (Transposed ? lane % 4 * 4 : lane / 4 + 8 * piece) < end;
            const char* source = Transposed ? at : at + piece * from.step + c * kThreads * Source<false>::kItem;
            __pipeline_memcpy_async(stage + L::place(c, piece, base), source, L::kPieceBytes,
                                    there ? 0 : L::kPieceBytes);
            if (Transposed) at += (piece < L::kPieces - 1 ? 1 : kThreads / 8 - piece) * from.step;
        }
    }
}

// A lane's deltas of 16 rows of A. Of the words [4 a + 2 k + b] of a chunk, a says which half of the rows, k which of
// two tiles of 16 inner indices and b which half of those. Returns whether any lane has a lo that is not 0.
template <int Chunks, bool Transposed, bool Halved>
__device__ __forceinline__ bool take(const char* stage, bool has_base, uint32_t (&hi)[Chunks][8],
                                     uint32_t (&lo)[Chunks][8]) {
    using L = Lane<Transposed>;
    uint32_t left = 0;
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
#pragma unroll
        for (int piece = 0; piece < L::kPieces; ++piece) {
            constexpr int kWords = L::kPieceBytes / 4;
            uint32_t tuned[kWords], base[kWords] = {};
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                if (side && !has_base) continue;
                uint32_t* words = side ? base : tuned;
                const char* from = stage + L::place(c, piece, side != 0);
                if constexpr (Transposed) {
                    const uint2 found = *reinterpret_cast<const uint2*>(from);
                    words[0] = found.x, words[1] = found.y;
                } else {
                    const uint4 found = *reinterpret_cast<const uint4*>(from);
                    words[0] = found.x, words[1] = found.y, words[2] = found.z, words[3] = found.w;
                }
            }
#pragma unroll
            for (int w = 0; w < kWords; ++w) {
                const int at = Transposed ? 4 * w + piece : 4 * piece + w;
                difference(Halved ? halved(tuned[w]) : tuned[w], Halved ? halved(base[w]) : base[w], hi[c][at],
                           lo[c][at]);
                left |= lo[c][at] & 0x7fff7fffu;
            }
        }
        asm volatile("" ::: "memory");  // a chunk after the other: all at once need more registers than there are
    }
    return __any_sync(~0u, left != 0);
}

// Whether a difference was too large for float16 in any lane, which made its lo NaN.
template <int Chunks>
__device__ __forceinline__ bool overflowed(const uint32_t (&lo)[Chunks][8]) {
    bool found = false;
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
#pragma unroll
        for (int w = 0; w < 8; ++w) {
            found = found || (lo[c][w] & 0x7c00u) == 0x7c00u || (lo[c][w] & 0x7c000000u) == 0x7c000000u;
        }
    }
    return __any_sync(~0u, found);
}

// The four words of a tile of 16 by 16, at 0, 1, 4 and 5 as in `take`, turned over or not.
struct Tile {
    uint32_t w[6];

    __device__ __forceinline__ Tile(const uint32_t* d, bool turned) {
#pragma unroll
        for (int i = 0; i < 6; ++i) {
            if (i < 2 || i > 3) w[i] = turned ? transposed(d[i]) : d[i];
        }
    }
};

template <bool Transposed, int Chunks>
__global__ void __launch_bounds__(kThreads, 1) gram_tensor_kernel(Gram a) {
    LORS_DYNAMIC_SHARED(memory);
    LORS_SHARED(float, parts, [2 * kWarps * kTileSums]);
    LORS_SHARED(float, tops, [kWarps * kWidth]);
    const int64_t p = blockIdx.x / a.chunks, chunk = blockIdx.x % a.chunks, column = blockIdx.y * int64_t{kWidth};
    const int width = static_cast<int>(a.b - column < kWidth ? a.b - column : kWidth),
              inner = static_cast<int>(a.inner);
    const PairView view = pair_view(a.g.table, p, a.g.pairs);
    const int first = static_cast<int>(chunk * a.rows);
    const int end = static_cast<int>(a.outer < first + a.rows ? a.outer : first + a.rows);
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int g = lane / 4, t = lane % 4;
    const float* x = a.x + p * a.inner * a.b + column;
    char* stage = memory + threadIdx.x * Lane<Transposed>::kPieceBytes;
    const auto fetch_both = [&](int row) {  // addresses anew, because registers are what there is least of
        fetch<Chunks>(Source<Transposed>(view.tuned, view.tuned_stride, row), row, end, inner, stage, false);
        if (view.base) {
            fetch<Chunks>(Source<Transposed>(view.base, view.base_stride, row), row, end, inner, stage, true);
        }
        __pipeline_commit();
    };
    fetch_both(first);

    float top = 0;
    for (int c = 0; c < Chunks; ++c) {
        const int j = (c * kWarps + warp) * 32 + 8 * t;
        for (int e = 0; e < 8; ++e) {
            const float size = j + e < inner && g < width ? fabsf(x[(j + e) * a.b + g]) : 0.0f;
            top = size > top ? size : top;
        }
    }
    top = largest_of_column(top);
    if (t == 0) tops[warp * kWidth + g] = top;
    __syncthreads();
    float scales[3];  // of vectors g, 2t, 2t + 1
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        const int vector = i == 0 ? g : 2 * t + i - 1;
        float all = 0;
        for (int other = 0; other < kWarps; ++other) all = fmaxf(all, tops[other * kWidth + vector]);
        scales[i] = downscale(all);
    }
    // the number 2 w, 2 w + 1 of a lane's inner indices of a chunk
    const auto inner_of = [&](int c, int w) {
        return (c * kWarps + warp) * 32 + (Transposed ? 8 * w + 2 * t : 8 * t + 2 * w);
    };
    uint32_t xh[Chunks][4], xl[Chunks][4];
    float z[Chunks][2][4] = {};
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const int64_t j = inner_of(c, w);
            const float low = j < inner && g < width ? x[j * a.b + g] * scales[0] : 0.0f;
            const float high = j + 1 < inner && g < width ? x[(j + 1) * a.b + g] * scales[0] : 0.0f;
            split(low, high, xh[c][w], xl[c][w]);
        }
    }
    const float back0 = 1 / scales[1], back1 = 1 / scales[2];

    int now = 0;
#pragma unroll 1
    for (int row = first; row < end; row += kTileRows, now ^= 1) {
        uint32_t hi[Chunks][8], lo[Chunks][8];
        __pipeline_wait_prior(0);
        const bool some = take<Chunks, Transposed, false>(stage, view.base != nullptr, hi, lo);
        float unit = 1;
        if (LORS_RARELY(some && overflowed<Chunks>(lo))) {
            unit = 2;
            take<Chunks, Transposed, true>(stage, view.base != nullptr, hi, lo);
        }
        if (row + kTileRows < end) fetch_both(row + kTileRows);
        float y[4] = {};
#pragma unroll
        for (int c = 0; c < Chunks; ++c) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const Tile d(hi[c] + 2 * k, Transposed);
                multiply(y, d.w[0], d.w[4], d.w[1], d.w[5], xh[c][2 * k], xh[c][2 * k + 1]);
                multiply(y, d.w[0], d.w[4], d.w[1], d.w[5], xl[c][2 * k], xl[c][2 * k + 1]);
                if (some) {
                    const Tile rest(lo[c] + 2 * k, Transposed);
                    multiply(y, rest.w[0], rest.w[4], rest.w[1], rest.w[5], xh[c][2 * k], xh[c][2 * k + 1]);
                }
            }
        }
        float* mine = parts + now * kWarps * kTileSums;
        float* to = mine + warp * kTileSums + g * kWidth + 2 * t;
        to[0] = unit * y[0] * back0, to[1] = unit * y[1] * back1;
        to[8 * kWidth] = unit * y[2] * back0, to[8 * kWidth + 1] = unit * y[3] * back1;
        __syncthreads();
        float sums[4];  // rows 2t, 2t + 1, 2t + 8, 2t + 9 of vector g
        top = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int r = 2 * t + i % 2 + i / 2 * 8;
            sums[i] = 0;
#pragma unroll
            for (int other = 0; other < kWarps; ++other) sums[i] += mine[other * kTileSums + r * kWidth + g];
            const int o = row + (Transposed ? 4 * t + i : r);
            if (a.y && warp == 0 && o < end && g < width) a.y[(p * a.outer + o) * a.b + column + g] = sums[i];
            top = fmaxf(top, fabsf(sums[i]));
        }
        const float scale = downscale(largest_of_column(top));
        uint32_t yh[2], yl[2];
        split(sums[0] * scale, sums[1] * scale, yh[0], yl[0]);
        split(sums[2] * scale, sums[3] * scale, yh[1], yl[1]);
        const float unscale = unit / scale;
        const float unscale0 = __shfl_sync(~0u, unscale, 8 * t), unscale1 = __shfl_sync(~0u, unscale, 8 * t + 4);
#pragma unroll
        for (int c = 0; c < Chunks; ++c) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                float sum[4] = {};
                const Tile d(hi[c] + 2 * k, !Transposed);
                multiply(sum, d.w[0], d.w[1], d.w[4], d.w[5], yh[0], yh[1]);
                multiply(sum, d.w[0], d.w[1], d.w[4], d.w[5], yl[0], yl[1]);
                if (some) {
                    const Tile rest(lo[c] + 2 * k, !Transposed);
                    multiply(sum, rest.w[0], rest.w[1], rest.w[4], rest.w[5], yh[0], yh[1]);
                }
                z[c][k][0] += sum[0] * unscale0, z[c][k][1] += sum[1] * unscale1;
                z[c][k][2] += sum[2] * unscale0, z[c][k][3] += sum[3] * unscale1;
            }
        }
    }
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int k = i / 4, q = i % 4, vector = 2 * t + q % 2;
            const int j = (c * kWarps + warp) * 32 +
                          (Transposed ? 16 * k + q / 2 * 8 + g : g / 2 * 8 + 4 * k + q / 2 * 2 + g % 2);
            if (j < inner && vector < width) {
                a.partial[((p * a.chunks + chunk) * a.inner + j) * a.b + column + vector] = z[c][k][q];
            }
        }
    }
}

// Any dtype, alignment and length, an element at a time: y = A x, a block per row and vector.
__device__ __forceinline__ float entry(const GroupArgs& g, const PairView& v, int64_t i, int64_t j) {
    const float t = load_any(v.tuned, g.tuned_dtype, i * v.tuned_stride + j);
    return v.base ? __fsub_rn(t, load_any(v.base, g.base_dtype, i * v.base_stride + j)) : t;
}

template <bool Transposed>
__global__ void __launch_bounds__(kThreads, 1) plain_y_kernel(Gram a) {
    LORS_SHARED(double, parts, [kWarps]);
    const int64_t p = blockIdx.x / a.outer, o = blockIdx.x % a.outer;
    const PairView view = pair_view(a.g.table, p, a.g.pairs);
    for (int64_t c = 0; c < a.b; ++c) {
        double sum = 0;
        for (int64_t i = threadIdx.x; i < a.inner; i += kThreads) {
            const float d = Transposed ? entry(a.g, view, i, o) : entry(a.g, view, o, i);
            sum += static_cast<double>(d) * static_cast<double>(a.x[(p * a.inner + i) * a.b + c]);
        }
        for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(~0u, sum, step);
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
        __syncthreads();
        if (threadIdx.x == 0) {
            double total = 0;
            for (int warp = 0; warp < kWarps; ++warp) total += parts[warp];
            a.y[(p * a.outer + o) * a.b + c] = static_cast<float>(total);
        }
        __syncthreads();
    }
}

// z = A.T y, a thread per inner index, a block per 256 of them and kPlainRows rows.
template <bool Transposed>
__global__ void __launch_bounds__(kThreads) plain_z_kernel(Gram a) {
    const int64_t slices = (a.inner + kThreads - 1) / kThreads;
    const int64_t part = blockIdx.x / slices, i = blockIdx.x % slices * kThreads + threadIdx.x;
    if (i >= a.inner) return;
    const int64_t p = part / a.chunks, first = part % a.chunks * a.rows;
    const int64_t end = a.outer < first + a.rows ? a.outer : first + a.rows;
    const PairView view = pair_view(a.g.table, p, a.g.pairs);
    for (int64_t c = 0; c < a.b; ++c) {
        double sum = 0;
        for (int64_t o = first; o < end; ++o) {
            const float d = Transposed ? entry(a.g, view, i, o) : entry(a.g, view, o, i);
            sum += static_cast<double>(d) * static_cast<double>(a.y[(p * a.outer + o) * a.b + c]);
        }
        a.partial[(part * a.inner + i) * a.b + c] = static_cast<float>(sum);
    }
}

template <bool Transposed>
void launch_plain(const Launch& launch, const Group& group, const Gram& a) {
    const unsigned rows = blocks(a.g.pairs * a.outer, "gram_apply", group);
    start(launch, "gram_apply (plain y)", group, rows, kThreads, 0, plain_y_kernel<Transposed>, a);
    const unsigned slices = blocks(a.g.pairs * a.chunks * ceil_div(a.inner, kThreads), "gram_apply", group);
    start(launch, "gram_apply (plain z)", group, slices, kThreads, 0, plain_z_kernel<Transposed>, a);
}

template <Kind K, bool Transposed, int PerThread>
void launch_tiles(const Launch& launch, const Group& group, const GramPlan& plan, const Gram& a) {
    const auto kernel = gram_kernel<K, Transposed, PerThread>;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared)),
          "gram_apply", group);
    const dim3 grid(blocks(a.g.pairs * plan.chunks, "gram_apply", group), static_cast<unsigned>(ceil_div(a.b, kWidth)));
    start(launch, "gram_apply", group, grid, kThreads, plan.shared, kernel, a);
}

template <bool Transposed, int Chunks>
void launch_tensor(const Launch& launch, const Group& group, const GramPlan& plan, const Gram& a) {
    const auto kernel = gram_tensor_kernel<Transposed, Chunks>;
    const int64_t shared = tensor_shared(Chunks);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
          "gram_apply", group);
    const dim3 grid(blocks(a.g.pairs * plan.chunks, "gram_apply", group), static_cast<unsigned>(ceil_div(a.b, kWidth)));
    start(launch, "gram_apply (tensor cores)", group, grid, kThreads, shared, kernel, a);
}

template <Kind K, bool Transposed, int PerThread>
void launch_fast(const Launch& launch, const Group& group, const GramPlan& plan, const Gram& a) {
    if constexpr (K == Kind::kFloat16) return launch_tensor<Transposed, PerThread>(launch, group, plan, a);
    if constexpr (K != Kind::kFloat16) return launch_tiles<K, Transposed, PerThread>(launch, group, plan, a);
}

template <Kind K, bool Transposed>
void choose_per_thread(const Launch& launch, const Group& group, const GramPlan& plan, const Gram& a) {
    switch (plan.per_thread) {
        case 1: return launch_fast<K, Transposed, 1>(launch, group, plan, a);
        case 2: return launch_fast<K, Transposed, 2>(launch, group, plan, a);
        case 3: return launch_fast<K, Transposed, 3>(launch, group, plan, a);
        case 4: return launch_fast<K, Transposed, 4>(launch, group, plan, a);
        default: return launch_fast<K, Transposed, 5>(launch, group, plan, a);
    }
}

}  // namespace

GramPlan plan_gram(int64_t pairs, int64_t outer, int64_t inner, int item_size, bool vectors, int processors) {
    if (!vectors || inner > kMaxPerThread * kThreads) return {kPlainRows, ceil_div(outer, kPlainRows), 0, 0};
    const int64_t stage = kCopy / item_size;
    // Fewer rows per block where there are too few pairs to fill the device twice.
    const int64_t wanted = ceil_div(2 * processors, pairs);
    const int64_t rows = std::clamp<int64_t>(outer / wanted, 8 * stage, kRowsPerBlock) / stage * stage;
    return {rows, ceil_div(outer, rows), static_cast<int>(ceil_div(inner, kThreads)), 2 * 2 * inner * kCopy};
}

void gram_apply(const Launch& launch, const Group& group, bool transposed, const GramPlan& plan, const float* x,
                int64_t b, float* y, float* partial) {
    const Selected selected = begin(launch, "gram_apply", group);
    const int64_t outer = transposed ? group.n : group.m, inner = transposed ? group.m : group.n;
    const Gram a{arguments(group, nullptr, nullptr, 0), outer, inner, plan.rows, plan.chunks, b, x, y, partial};
    if (plan.per_thread == 0) {
        return transposed ? launch_plain<true>(launch, group, a) : launch_plain<false>(launch, group, a);
    }
    with_kind(kind_of(group), [&](auto tag) {
        constexpr Kind kind = decltype(tag)::kind;
        if constexpr (kind == Kind::kAny) {
            throw CudaError(describe("gram_apply", group) + ": this plan needs 16-byte rows of one dtype");
        } else if (transposed) {
            choose_per_thread<kind, true>(launch, group, plan, a);
        } else {
            choose_per_thread<kind, false>(launch, group, plan, a);
        }
    });
}

}  // namespace lors
