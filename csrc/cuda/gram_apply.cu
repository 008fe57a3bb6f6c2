// z = A.T @ (A @ x) in one pass over A = delta or its transpose, [outer, inner] with inner the short side.
//
// On tensor cores, in tiles of 16 rows of A. A warp owns inner indices, 32 at a time, and a lane copies what it needs
// of them itself, asynchronously: the next tile's numbers come into the place of those that are in registers by now,
// while these are worked on. The warps' parts of y = A x are summed through shared memory, and z += A.T y follows from
// the deltas still in registers, so a row is read once. The blocks' sums are added in order by the caller.
//
// Where A's rows are delta's, a lane has 8 neighbouring inner indices of two rows, taken as 2t, 2t + 1, 2t + 8, 2t + 9
// of two tiles of 16, in x and z as well as here. Where they are its columns, it has 4 neighbouring rows of A at four
// inner indices, taken as rows 2t, 2t + 1, 2t + 8, 2t + 9. So one of y = A x and z += A.T y takes the registers as they
// are, and the other takes them transposed.
//
// Everything is as exact as in float32: a delta is hi + lo, two float16 numbers, and x and y are hi + lo too, scaled by
// powers of two, a vector's own. The difference of two float16 numbers is hi + lo exactly. Where one overflows float16,
// and of other numbers, the warp's deltas of a tile are scaled by a power of two, and hi + lo to 23 bits.
//
// float32 needs twice the room for its copies. Where a block has not got that, gram_kernel has multiply-adds.
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
constexpr int kMaxPerThread = 5;
constexpr int kRowsPerBlock = 256;  // float32 sums stay short, and the partial sums stay a few percent of the reads
constexpr int kPlainRows = 4096;    // of a block of the plain kernel
constexpr int kCopy = 16;           // bytes of one asynchronous copy, of the largest
constexpr int kTileRows = 16;
constexpr int kVectorSums = 20;  // of a tile and a vector: 16, and room so that few banks are met twice
constexpr int kTileSums = kWidth * kVectorSums;
constexpr int64_t kTensorFixed = (2 * kWarps * kTileSums + kWarps * kWidth) * int64_t{sizeof(float)};

struct Gram {
    GroupArgs g;
    int64_t outer, inner, rows, chunks, b;
    const float* x;  // [P, inner, b]
    float* y;        // [P, outer, b] or null
    float* partial;  // [P, chunks, inner, b]
    float* account;  // [P, chunks, 2] or null
};

// tuned - base = hi + lo, exactly; NaN in lo where hi overflows
__device__ __forceinline__ void difference(uint32_t tuned, uint32_t base, uint32_t& hi, uint32_t& lo) {
    hi = subtract_halves(tuned, base);
    const uint32_t back = subtract_halves(tuned, hi);
    const uint32_t missing = subtract_halves(tuned, add_halves(hi, back));
    lo = add_halves(missing, subtract_halves(back, base));
}

// A power of two that takes top to at least 2^Exponent and below twice that, as far as there is one (2^126 is the
// largest); 1 for what is no number.
template <int Exponent>
__device__ __forceinline__ float scale_to(float top) {
    const int exponent = static_cast<int>(__float_as_uint(top) >> 23), wanted = 254 + Exponent - exponent;
    const int stored = wanted < 1 ? 1 : wanted < 253 ? wanted : 253;
    return exponent == 255 ? 1.0f : __uint_as_float(static_cast<unsigned>(stored) << 23);
}
__device__ __forceinline__ float inverse(float power_of_two) {
    return __uint_as_float((254u << 23) - __float_as_uint(power_of_two));
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

// What a lane copies of one chunk of 32 inner indices, of tuned and as much of base: kPieces of kPieceBytes.
template <Kind K, bool Transposed>
struct Lane {
    static constexpr int kItem = K == Kind::kFloat32 ? 4 : 2, kPieceBytes = Transposed ? 4 * kItem : kCopy,
                         kPieces = 16 * kItem / kPieceBytes, kChunkBytes = 32 * kItem;
    static constexpr int kParts = kPieces / 2;  // of a row that is delta's, in one piece each

    // of thread 0; the other threads' follow one another
    static __device__ __forceinline__ int place(int chunk, int piece, bool base) {
        return (chunk * kChunkBytes + (2 * piece + base) * kPieceBytes) * kThreads;
    }
};

template <Kind K>
constexpr int64_t tensor_shared(int chunks) {
    return int64_t{chunks} * Lane<K, false>::kChunkBytes * kThreads;
}

// Where a lane's numbers of a tile lie: its first piece, and bytes over eight rows of the matrix.
template <Kind K, bool Transposed>
struct Source {
    const char* at;
    int64_t step;

    __device__ __forceinline__ Source(const void* data, int64_t stride, int64_t row)
        : step(8 * stride * Lane<K, Transposed>::kItem) {
        const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
        const int64_t i = Transposed ? warp * 32 + lane / 4 : row + lane / 4;
        const int64_t j = Transposed ? row + lane % 4 * 4 : warp * 32 + lane % 4 * 8;
        at = static_cast<const char*>(data) + (i * stride + j) * Lane<K, Transposed>::kItem;
    }
    __device__ __forceinline__ void next_tile() {
        at += Transposed ? kTileRows * Lane<K, Transposed>::kItem : kTileRows / 8 * step;
    }
};

// Copies a lane's numbers of the rows of A from `row` on, up to `end`, into `stage`, where its own begin.
template <Kind K, bool Transposed, int Chunks>
__device__ __forceinline__ void fetch(const Source<K, Transposed>& from, int row, int end, int inner, char* stage,
                                      bool base) {
    using L = Lane<K, Transposed>;
    const int first = static_cast<int>(threadIdx.x) / 32 * 32, lane = static_cast<int>(threadIdx.x) % 32;
    const char* at = from.at;
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
#pragma unroll
        for (int piece = 0; piece < L::kPieces; ++piece) {
            const int below = Transposed ? 0 : piece / L::kParts;  // times eight rows
            const int i = c * kThreads + first + (Transposed ? 8 * piece + lane / 4 : lane % 4 * 8);
            const bool there =
                (c < Chunks - 1 || i < inner) && row + (Transposed ? lane % 4 * 4 : lane / 4 + 8 * below) < end;
            const char* source = Transposed ? at
                                            : (below ? at + from.step : at) + c * kThreads * L::kItem +
                                                  piece % L::kParts * L::kPieceBytes;
            __pipeline_memcpy_async(stage + L::place(c, piece, base), source, L::kPieceBytes,
                                    there ? 0 : L::kPieceBytes);
            if (Transposed) at += (piece < L::kPieces - 1 ? 1 : kThreads / 8 - piece) * from.step;
        }
    }
}

// 8 or 16 bytes of shared memory, as words.
template <int Words>
__device__ __forceinline__ void load_words(const char* from, uint32_t* words) {
    if constexpr (Words == 2) {
        const uint2 found = *reinterpret_cast<const uint2*>(from);
        words[0] = found.x, words[1] = found.y;
    } else {
        const uint4 found = *reinterpret_cast<const uint4*>(from);
        words[0] = found.x, words[1] = found.y, words[2] = found.z, words[3] = found.w;
    }
}

// A lane's deltas of 16 rows of A, float16. Of the words [4 a + 2 k + b] of a chunk, a says which half of the rows, k
// which of two tiles of 16 inner indices and b which half of those. Returns whether any lane may have met an overflow.
template <bool Transposed, int Chunks>
__device__ __forceinline__ bool take_halves(const char* stage, uint32_t (&hi)[Chunks][8], uint32_t (&lo)[Chunks][8]) {
    using L = Lane<Kind::kFloat16, Transposed>;
    constexpr int kWords = L::kPieceBytes / 4;
    uint32_t any = 0;
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
#pragma unroll
        for (int piece = 0; piece < L::kPieces; ++piece) {
            uint32_t tuned[kWords], base[kWords];
            load_words<kWords>(stage + L::place(c, piece, false), tuned);
            load_words<kWords>(stage + L::place(c, piece, true), base);
#pragma unroll
            for (int w = 0; w < kWords; ++w) {
                const int at = Transposed ? 4 * w + piece : 4 * piece + w;
                difference(tuned[w], base[w], hi[c][at], lo[c][at]);
                any |= lo[c][at];
            }
        }
        asm volatile("" ::: "memory");  // a chunk after the other: all at once need more registers than there are
    }
    return __any_sync(~0u, (any & 0x7c00u) == 0x7c00u || (any & 0x7c000000u) == 0x7c000000u);
}

// Number e of those that these words hold.
template <Kind K>
__device__ __forceinline__ float number(const uint32_t* words, int e) {
    if constexpr (K == Kind::kFloat32) return __uint_as_float(words[e]);
    if constexpr (K == Kind::kFloat16) return e % 2 ? high_half(words[e / 2]) : low_half(words[e / 2]);
    return __uint_as_float(e % 2 ? words[e / 2] & 0xffff0000u : words[e / 2] << 16);
}

// The same of any numbers, times a power of two; returns what undoes it.
template <Kind K, bool Transposed, int Chunks>
__device__ __forceinline__ float take_scaled(const char* stage, uint32_t (&hi)[Chunks][8], uint32_t (&lo)[Chunks][8]) {
    using L = Lane<K, Transposed>;
    constexpr int kWords = L::kPieceBytes / 4, kEach = 16 / L::kPieces;  // numbers of a piece
    float top = 0, d[Chunks][16];                                        // pairs, in the order of the words
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
#pragma unroll
        for (int piece = 0; piece < L::kPieces; ++piece) {
            uint32_t tuned[kWords], base[kWords];
            load_words<kWords>(stage + L::place(c, piece, false), tuned);
            load_words<kWords>(stage + L::place(c, piece, true), base);
#pragma unroll
            for (int e = 0; e < kEach; ++e) {
                const int pair = Transposed ? 4 * (e / 2) + piece : (piece * kEach + e) / 2;
                float& to = d[c][2 * pair + e % 2];
                to = __fsub_rn(number<K>(tuned, e), number<K>(base, e));
                top = fmaxf(top, fabsf(to));
            }
        }
        asm volatile("" ::: "memory");  // as above
    }
    const float scale = scale_to<14>(__uint_as_float(__reduce_max_sync(~0u, __float_as_uint(top))));
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
#pragma unroll
        for (int w = 0; w < 8; ++w) split(d[c][2 * w] * scale, d[c][2 * w + 1] * scale, hi[c][w], lo[c][w]);
    }
    return inverse(scale);
}

// A lane's part of the sum of (hi + lo)^2, without lo^2: rows by themselves, on tensor cores as well, which leaves the
// squares on the diagonal.
template <int Chunks>
__device__ __forceinline__ float squares(const uint32_t (&hi)[Chunks][8], const uint32_t (&lo)[Chunks][8]) {
    float own[2][4] = {}, cross[2][4] = {};
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
            const uint32_t *h = hi[c] + k, *l = lo[c] + k;
            multiply(own[0], h[0], h[4], h[1], h[5], h[0], h[1]);
            multiply(own[1], h[0], h[4], h[1], h[5], h[4], h[5]);
            multiply(cross[0], h[0], h[4], h[1], h[5], l[0], l[1]);
            multiply(cross[1], h[0], h[4], h[1], h[5], l[4], l[5]);
        }
    }
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4;
    float sum = 0;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        if (g == lane % 4 * 2 + e) sum = own[0][e] + own[1][2 + e] + 2 * (cross[0][e] + cross[1][2 + e]);
    }
    return sum;
}

template <int Chunks>
__device__ __forceinline__ float largest_of(const uint32_t (&hi)[Chunks][8]) {
    uint32_t top = 0;
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
#pragma unroll
        for (int w = 0; w < 8; ++w) top = larger_halves(top, hi[c][w]);
    }
    return fmaxf(low_half(top), high_half(top));
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

template <Kind K, bool Transposed, int Chunks>
__global__ void __launch_bounds__(kThreads, 1) gram_tensor_kernel(Gram a) {
    using L = Lane<K, Transposed>;
    LORS_DYNAMIC_SHARED(memory);
    LORS_SHARED(__align__(16) float, parts, [2 * kWarps * kTileSums]);
    LORS_SHARED(float, tops, [kWarps * kWidth]);
    const int64_t p = blockIdx.x / a.chunks, chunk = blockIdx.x % a.chunks, column = blockIdx.y * int64_t{kWidth};
    const int width = static_cast<int>(a.b - column < kWidth ? a.b - column : kWidth),
              inner = static_cast<int>(a.inner);
    const int first = static_cast<int>(chunk * a.rows);
    const int end = static_cast<int>(a.outer < first + a.rows ? a.outer : first + a.rows);
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int g = lane / 4, t = lane % 4;
    const float* x = a.x + p * a.inner * a.b + column;
    char* stage = memory + threadIdx.x * L::kPieceBytes;
    const PairView view = pair_view(a.g.table, p, a.g.pairs);
    const bool has_base = view.base != nullptr;
    Source<K, Transposed> tuned(view.tuned, view.tuned_stride, first), base(view.base, view.base_stride, first);
    const auto fetch_both = [&](int row) {
        fetch<K, Transposed, Chunks>(tuned, row, end, inner, stage, false);
        tuned.next_tile();
        if (has_base) {
            fetch<K, Transposed, Chunks>(base, row, end, inner, stage, true);
            base.next_tile();
        }
        __pipeline_commit();
    };
    if (!has_base) {  // zeros, and nothing ever comes in their place
        for (int c = 0; c < Chunks; ++c) {
            for (int piece = 0; piece < L::kPieces; ++piece) {
                for (int w = 0; w < L::kPieceBytes / 4; ++w) {
                    *reinterpret_cast<uint32_t*>(stage + L::place(c, piece, true) + 4 * w) = 0;
                }
            }
        }
    }
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
        scales[i] = scale_to<0>(all);
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
    const float back0 = inverse(scales[1]), back1 = inverse(scales[2]);

    float energy = 0, most = 0;  // of the deltas
    int now = 0;
#pragma unroll 1
    for (int row = first; row < end; row += kTileRows, now ^= 1) {
        uint32_t hi[Chunks][8], lo[Chunks][8];
        float unit = 1;
        __pipeline_wait_prior(0);
        if constexpr (K == Kind::kFloat16) {
            const bool large = take_halves<Transposed, Chunks>(stage, hi, lo);
            if (LORS_RARELY(large)) unit = take_scaled<K, Transposed, Chunks>(stage, hi, lo);
        } else {
            unit = take_scaled<K, Transposed, Chunks>(stage, hi, lo);
        }
        if (row + kTileRows < end) fetch_both(row + kTileRows);
        if (LORS_RARELY(a.account != nullptr)) {
            energy += unit * unit * squares<Chunks>(hi, lo);
            most = fmaxf(most, unit * largest_of<Chunks>(hi));
        }
        float y[4] = {};
#pragma unroll
        for (int c = 0; c < Chunks; ++c) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const Tile d(hi[c] + 2 * k, Transposed), rest(lo[c] + 2 * k, Transposed);
                multiply(y, d.w[0], d.w[4], d.w[1], d.w[5], xh[c][2 * k], xh[c][2 * k + 1]);
                multiply(y, d.w[0], d.w[4], d.w[1], d.w[5], xl[c][2 * k], xl[c][2 * k + 1]);
                multiply(y, rest.w[0], rest.w[4], rest.w[1], rest.w[5], xh[c][2 * k], xh[c][2 * k + 1]);
            }
        }
        // a vector's 16 sums as those who read them want them: four each
        float* mine = parts + now * kWarps * kTileSums;
        float* to = mine + warp * kTileSums + 2 * t * kVectorSums + g / 2 * 4 + g % 2;
        to[0] = unit * y[0] * back0, to[kVectorSums] = unit * y[1] * back1;
        to[2] = unit * y[2] * back0, to[kVectorSums + 2] = unit * y[3] * back1;
        __syncthreads();
        float sums[4] = {};  // rows 2t, 2t + 1, 2t + 8, 2t + 9 of vector g
#pragma unroll
        for (int other = 0; other < kWarps; ++other) {
            const float4 four = *reinterpret_cast<const float4*>(mine + other * kTileSums + g * kVectorSums + 4 * t);
            sums[0] += four.x, sums[1] += four.y, sums[2] += four.z, sums[3] += four.w;
        }
        top = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int o = row + (Transposed ? 4 * t + i : 2 * t + i % 2 + i / 2 * 8);
            if (a.y && warp == 0 && o < end && g < width) a.y[(p * a.outer + o) * a.b + column + g] = sums[i];
            top = fmaxf(top, fabsf(sums[i]));
        }
        const float scale = scale_to<0>(largest_of_column(top));
        uint32_t yh[2], yl[2];
        split(sums[0] * scale, sums[1] * scale, yh[0], yl[0]);
        split(sums[2] * scale, sums[3] * scale, yh[1], yl[1]);
        const float unscale = unit * inverse(scale);
        const float unscale0 = __shfl_sync(~0u, unscale, 8 * t), unscale1 = __shfl_sync(~0u, unscale, 8 * t + 4);
#pragma unroll
        for (int c = 0; c < Chunks; ++c) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                float sum[4] = {};
                const Tile d(hi[c] + 2 * k, !Transposed), rest(lo[c] + 2 * k, !Transposed);
                multiply(sum, d.w[0], d.w[1], d.w[4], d.w[5], yh[0], yh[1]);
                multiply(sum, d.w[0], d.w[1], d.w[4], d.w[5], yl[0], yl[1]);
                multiply(sum, rest.w[0], rest.w[1], rest.w[4], rest.w[5], yh[0], yh[1]);
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
    if (a.account && blockIdx.y == 0) {
        for (int step = 16; step > 0; step /= 2) {
            energy += __shfl_xor_sync(~0u, energy, step);
            most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
        }
        __syncthreads();  // the last sums have been read
        if (lane == 0) tops[warp] = most, parts[warp] = energy;
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int other = 1; other < kWarps; ++other) energy += parts[other], most = fmaxf(most, tops[other]);
            a.account[2 * blockIdx.x] = energy, a.account[2 * blockIdx.x + 1] = most;
        }
    }
}

// --- multiply-adds, float32
//
// A thread owns inner indices i = thread + 256 k and holds x[i, 0..8) and its part of z[i, 0..8) in registers: y = A x
// is summed over the block (a shuffle that leaves each lane one of 32 sums, then the warps in order), and z += A.T y
// follows from the deltas still in registers. While four rows are worked on, the next are copied there asynchronously:
// over the ones before, of which nothing is read behind the barriers.

constexpr int kStageRows = 4;  // 4 rows x 8 vectors = 32 sums, one per lane

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

// Rows of A, base and tuned: [row][inner], or [inner][row] when transposed.
template <bool Transposed>
struct Stage {
    static __host__ __device__ int64_t bytes(int64_t inner) { return 2 * inner * kCopy; }

    static __device__ __forceinline__ void copy(const Gram& a, const PairView& view, int64_t row, int64_t end,
                                                char* stage) {
        // per matrix: kStageRows rows of inner / 4 copies, or inner rows of one; in 32 bits, where a division is cheap
        const int segments = static_cast<int>(a.inner);
        for (int s = static_cast<int>(threadIdx.x); s < segments; s += kThreads) {
            int64_t i, j;  // of delta
            bool there;
            if constexpr (Transposed) {
                i = s, j = row, there = row < end;
            } else {
                const int each = segments / kStageRows;
                i = row + s / each, j = s % each * kStageRows, there = i < end;
            }
            char* to = stage + s * kCopy;
            const size_t skip = there ? 0 : kCopy;
            const float* tuned = static_cast<const float*>(view.tuned);
            __pipeline_memcpy_async(to + segments * kCopy, there ? tuned + i * view.tuned_stride + j : tuned, kCopy,
                                    skip);
            if (view.base) {
                const float* base = static_cast<const float*>(view.base);
                __pipeline_memcpy_async(to, there ? base + i * view.base_stride + j : base, kCopy, skip);
            } else {
                *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
            }
        }
    }

    // A[row of the stage, i] of every row
    static __device__ __forceinline__ void fetch(const char* stage, int inner, int i, float (&d)[kStageRows]) {
        const float* base = reinterpret_cast<const float*>(stage);
        const float* tuned = base + inner * kStageRows;
#pragma unroll
        for (int r = 0; r < kStageRows; ++r) {
            const int at = Transposed ? i * kStageRows + r : r * inner + i;
            d[r] = __fsub_rn(tuned[at], base[at]);
        }
    }
};

template <bool Transposed, int PerThread>
__global__ void __launch_bounds__(kThreads) gram_kernel(Gram a) {
    using S = Stage<Transposed>;
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
    for (int64_t row = first; row < end; row += kStageRows, now ^= 1) {
        if (row + kStageRows < end) S::copy(a, view, row + kStageRows, end, memory + (now ^ 1) * bytes);
        __pipeline_commit();
        __pipeline_wait_prior(1);
        __syncthreads();
        float y[32] = {}, d[PerThread][kStageRows] = {};
#pragma unroll
        for (int k = 0; k < PerThread; ++k) {
            const int i = static_cast<int>(threadIdx.x) + k * kThreads;
            if (i < inner) S::fetch(memory + now * bytes, inner, i, d[k]);
#pragma unroll
            for (int r = 0; r < kStageRows; ++r) {
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
            const int64_t o = row + threadIdx.x / kWidth;
            const int c = static_cast<int>(threadIdx.x) % kWidth;
            if (a.y && o < end && c < width) a.y[(p * a.outer + o) * a.b + column + c] = total;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < PerThread; ++k) {
#pragma unroll
            for (int r = 0; r < kStageRows; ++r) {
#pragma unroll
                for (int c = 0; c < kWidth; ++c) z[k][c] += d[k][r] * sums[r * kWidth + c];
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

template <Kind K, bool Transposed, int Chunks>
void launch_fast(const Launch& launch, const Group& group, const GramPlan& plan, const Gram& a) {
    const auto go = [&](const char* name, auto kernel) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared)),
              name, group);
        const dim3 grid(blocks(a.g.pairs * plan.chunks, name, group), static_cast<unsigned>(ceil_div(a.b, kWidth)));
        start(launch, name, group, grid, kThreads, plan.shared, kernel, a);
    };
    if constexpr (K == Kind::kFloat32) {
        if (!plan.tensor) return go("gram_apply", gram_kernel<Transposed, Chunks>);
    }
    if (!plan.tensor) throw CudaError(describe("gram_apply", group) + ": a block has too little shared memory");
    go("gram_apply (tensor cores)", gram_tensor_kernel<K, Transposed, Chunks>);
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

int64_t shared_memory(int device) {
    return shared_memory_of(device);
}

GramPlan plan_gram(int64_t pairs, int64_t outer, int64_t inner, int item_size, bool vectors, int processors,
                   int64_t room) {
    if (!vectors || inner > kMaxPerThread * kThreads) return {kPlainRows, ceil_div(outer, kPlainRows), 0, 0, false};
    // Fewer rows per block where there are too few pairs to fill the device twice.
    const int64_t wanted = ceil_div(2 * processors, pairs);
    const int64_t rows = std::clamp<int64_t>(outer / wanted, 4 * kTileRows, kRowsPerBlock) / kTileRows * kTileRows;
    const int each = static_cast<int>(ceil_div(inner, kThreads));
    const int64_t shared = item_size == 4 ? tensor_shared<Kind::kFloat32>(each) : tensor_shared<Kind::kFloat16>(each);
    const bool tensor = shared + kTensorFixed <= room;
    return {rows, ceil_div(outer, rows), each, tensor ? shared : 2 * Stage<false>::bytes(inner), tensor};
}

void gram_apply(const Launch& launch, const Group& group, bool transposed, const GramPlan& plan, const float* x,
                int64_t b, float* y, float* partial, float* account) {
    const Selected selected = begin(launch, "gram_apply", group);
    const int64_t outer = transposed ? group.n : group.m, inner = transposed ? group.m : group.n;
    const Gram a{arguments(group, nullptr, nullptr, 0), outer, inner, plan.rows, plan.chunks, b, x, y, partial,
                 plan.tensor ? account : nullptr};
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
