// z = A.T @ (A @ x) in one pass over A, for an A that is formed while it is read.
//
// A is [rows, n] with n the shorter side of delta: delta itself, or its transpose. A block of rows is brought into L1
// and used for both halves of the product. Rows are cut into chunks of kChunkRows by the shape alone; a chunk sums in
// float32 from zero and the chunks' sums are added in the pass's order, which bounds the rounding error of tall
// matrices and makes the result independent of the number of threads.
#pragma once

#include <algorithm>

#include "../common/parallel.h"
#include "buffer.h"
#include "delta.h"
#include "panel.h"

namespace lors {

constexpr int64_t kChunkRows = 128;
constexpr int64_t kCached = 12 << 20;  // bytes of a matrix that passes find in the last cache

// Rows of delta, formed on the fly.
struct DeltaRows {
    const Delta& delta;
    int64_t rows() const { return delta.rows(); }
    int64_t cols() const { return delta.cols(); }
    template <class T>
    const T* fetch(int64_t i, int64_t count, T* buffer) const;
};

// Rows of delta.T, formed on the fly: a strip of columns is read row by row and stored transposed.
struct DeltaColumns {
    const Delta& delta;
    int64_t rows() const { return delta.cols(); }
    int64_t cols() const { return delta.rows(); }
    template <class T>
    const T* fetch(int64_t i, int64_t count, T* buffer) const;
};

// Rows of a float32 matrix in memory, padded.
struct PackedRows {
    const float* data;
    int64_t rows_, cols_;
    int64_t rows() const { return rows_; }
    int64_t cols() const { return cols_; }
    template <class T>
    const T* fetch(int64_t i, int64_t count, T* buffer) const;
};

template <>
inline const float* DeltaRows::fetch(int64_t i, int64_t count, float* buffer) const {
    const int64_t n = padded(cols());
    for (int64_t r = 0; r < count; ++r) delta.row(i + r, buffer + r * n);
    return buffer;
}

template <>
inline const float* DeltaColumns::fetch(int64_t i, int64_t count, float* buffer) const {
    constexpr int64_t kStrip = 128;  // columns of delta brought in per visit to a row: 512 bytes are worth the jump
    const int64_t n = padded(cols());
    alignas(64) float strip[kPad][kStrip];
    for (int64_t part = 0; part < count; part += kStrip) {
        const int64_t width = std::min(kStrip, count - part);
        for (int64_t j = 0; j < n; j += kPad) {
            const float* from = &strip[0][0];
            int64_t step = kStrip;
            if (delta.stored() && j + kPad <= cols()) {
                from = delta.stored_row(j) + i + part;
                step = delta.step();
            } else {
                for (int64_t r = 0; r < kPad; ++r) {
                    if (j + r < cols()) {
                        delta.row(j + r, i + part, width, strip[r]);
                    } else {
                        std::fill(strip[r], strip[r] + width, 0.0f);
                    }
                }
            }
            float* out = buffer + part * n + j;
            int64_t c = 0;
            for (; c + kPad <= width; c += kPad) transpose_tile(from + c, step, out + c * n, n);
            for (; c < width; ++c) {
                for (int64_t r = 0; r < kPad; ++r) out[c * n + r] = from[r * step + c];
            }
        }
    }
    return buffer;
}

template <>
inline const float* PackedRows::fetch(int64_t i, int64_t, float*) const {
    return data + i * padded(cols_);
}

template <>
inline const double* PackedRows::fetch(int64_t i, int64_t count, double* buffer) const {
    const int64_t n = padded(cols_);
    const float* from = data + i * n;
    for (int64_t j = 0; j < count * n; ++j) buffer[j] = static_cast<double>(from[j]);
    return buffer;
}

// Rows per block: 192 KiB at most stay in L2 between the two halves of the product (smaller blocks write z more often).
template <class T>
inline int64_t block_rows(int64_t n) {
    return std::clamp<int64_t>(196608 / (padded(n) * static_cast<int64_t>(sizeof(T))) / 16 * 16, 16, 32);
}

// As `dots`, in float64 over strips of columns, so that terms of one sign do not add up their rounding along a whole
// row.
template <int W, bool Ahead = false, class T>
void exact_dots(const T* a, int64_t n, int64_t rows, const T* x, T* y) {
    constexpr int64_t kStrip = 16 * kPad, kRows = 12;
    T part[kRows * W];
    for (int64_t i = 0; i < rows; i += kRows) {
        const int64_t count = std::min(kRows, rows - i);
        double sums[kRows * W] = {};
        for (int64_t j = 0; j < n; j += kStrip) {
            dots<W, Ahead>(a + i * n + j, n, count, x + j, n, std::min(kStrip, n - j), part);
            for (int64_t k = 0; k < count * W; ++k) sums[k] += static_cast<double>(part[k]);
        }
        for (int64_t k = 0; k < count * W; ++k) y[i * W + k] = static_cast<T>(sums[k]);
    }
}

// z = A.T @ y for y that is had block by block: y_of(group, first, i, panel, count, y, ahead) forms rows i to i + count
// of vectors `first` on, [count, W], from these rows of A.
//   z          [width, padded(n)], width even; in float64 the sums of the chunks, of chunk_rows each, lose nothing
//   backwards  from the last chunk to the first: what a pass has read last is still in a cache that holds a part of A,
//              so passes that turn round find it there
template <class T, class Source, class Z, class Rows>
void transposed_product(const Source& a, int64_t width, Z* z, int64_t chunk_rows, bool backwards, int threads,
                        const Rows& y_of) {
    const int64_t n = padded(a.cols()), rows = a.rows(), slab = width * n;
    const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows, block = block_rows<T>(a.cols());
    const int workers = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, chunks)));
    Buffer<T> rows_buffer(workers * block * n), y_buffer(workers * block * 4);
    // One thread adds each chunk's sums as they come; several keep them apart until all are there. Same order, same
    // bits.
    Buffer<T> partial((workers > 1 ? chunks : 1) * slab);
    const bool ahead = rows * n * static_cast<int64_t>(sizeof(T)) > kCached;
    std::fill(z, z + slab, Z{});
    const auto add = [&](const T* from) {
        LORS_NO_OVERLAP
        for (int64_t j = 0; j < slab; ++j) z[j] += static_cast<Z>(from[j]);
    };
    parallel_for(chunks, workers, [&](int64_t turn, int worker) {
        const int64_t chunk = backwards ? chunks - 1 - turn : turn;
        T* sums = partial.data() + (workers > 1 ? turn : 0) * slab;
        T* y = y_buffer.data() + worker * block * 4;
        std::fill(sums, sums + slab, T{});
        const int64_t end = std::min(rows, (chunk + 1) * chunk_rows);
        for (int64_t i = chunk * chunk_rows; i < end; i += block) {
            const int64_t count = std::min(block, end - i);
            const T* panel = a.fetch(i, count, rows_buffer.data() + worker * block * n);
            each_group(width, [&](auto group, int64_t first) {
                constexpr int W = decltype(group)::value;
                if (ahead && first == 0) {
                    y_of(group, first, i, panel, count, y, std::true_type());
                } else {
                    y_of(group, first, i, panel, count, y, std::false_type());
                }
                accumulate<W>(panel, n, count, y, sums + first * n, n);
            });
        }
        if (workers == 1) add(sums);
    });
    if (workers > 1) {
        for (int64_t turn = 0; turn < chunks; ++turn) add(partial.data() + turn * slab);
    }
}

// z[c, :] = A.T @ (A @ x[c, :]) for an even number of vectors, and A @ x where `product` is not null.
//   x, z     [width, padded(n)]
//   product  [rows, width]
template <class T, class Source, class Z>
void gram(const Source& a, const T* x, int64_t width, Z* z, T* product, bool backwards, int threads) {
    const int64_t n = padded(a.cols());
    const auto multiply = [&](auto group, int64_t first, int64_t i, const T* panel, int64_t count, T* y, auto ahead) {
        constexpr int W = decltype(group)::value;
        constexpr bool kAhead = decltype(ahead)::value;
        if (!product) return dots<W, kAhead>(panel, n, count, x + first * n, n, n, y);
        exact_dots<W, kAhead>(panel, n, count, x + first * n, y);
        for (int64_t r = 0; r < count; ++r) {
            std::copy(&y[r * W], &y[(r + 1) * W], &product[(i + r) * width + first]);
        }
    };
    transposed_product<T>(a, width, z, kChunkRows, backwards, threads, multiply);
}

}  // namespace lors
