// The two inner loops behind every product with delta: a few rows of a matrix against W vectors.
//
// The vectors are stored as rows, [W, n] padded, so that the vector lanes run along n in both loops. Rows of `a` are
// meant to sit in L1: `dots` reads them once and `accumulate` reads them again. The widths are 4 and 2; any even number
// of vectors is made of these by `each_group`.
#pragma once

#include <type_traits>

#include "simd.h"

namespace lors {

// Rows that `dots` takes at once: 16 or 24 sums, the W vectors and a row of 32 AVX-512 registers; of 16 registers 8 or
// 12 sums.
template <int W>
constexpr int kDotRows = kVectorBytes == 64 ? (W == 4 ? 6 : 8)
                         : W == 4           ? 2
                                            : 6;

constexpr int64_t kAheadRows = 24;  // 60 to 120 KB

// Vectors of columns that `accumulate` takes at once.
template <int W>
constexpr int kAccumulated = (kVectorBytes == 64 ? 16 : 8) / W;

constexpr int64_t even(int64_t width) {
    return width + width % 2;
}

// body(std::integral_constant<int, W>, first) for groups of 4 vectors and, last, of 2; `width` is even.
template <class Body>
inline void each_group(int64_t width, const Body& body) {
    int64_t first = 0;
    for (; first + 4 <= width; first += 4) body(std::integral_constant<int, 4>(), first);
    if (first < width) body(std::integral_constant<int, 2>(), first);
}

template <class T, int W, int R, bool Ahead>
inline void dots_rows(const T* a, int64_t lda, const T* x, int64_t ldx, int64_t n, T* y) {
    Vec<T> acc[R * W] = {};
    for (int64_t j = 0; j < n; j += kLanes<T>) {
        Vec<T> xs[W];
        for (int c = 0; c < W; ++c) xs[c] = load(x + c * ldx + j);
        for (int r = 0; r < R; ++r) {
            if constexpr (Ahead) __builtin_prefetch(a + (r + kAheadRows) * lda + j, 0, 2);
            Vec<T> row = load(a + r * lda + j);
            keep_in_register(row);
            for (int c = 0; c < W; ++c) acc[r * W + c] += row * xs[c];
        }
    }
    for (int i = 0; i + 4 <= R * W; i += 4) sum_lanes(acc + i, y + i);
    if constexpr (R * W % 4) {
        const Vec<T> last[4] = {acc[R * W - 2], acc[R * W - 1]};
        T sums[4];
        sum_lanes(last, sums);
        y[R * W - 2] = sums[0];
        y[R * W - 1] = sums[1];
    }
}

// y[i, c] = sum_j a[i, j] * x[c, j]    a [rows, n], x [W, n], their row steps lda and ldx; y [rows, W]; n a multiple of
// kPad
// Ahead: rows that come later are asked for already, since they are in memory and not in a cache.
template <int W, bool Ahead = false, class T>
inline void dots(const T* a, int64_t lda, int64_t rows, const T* x, int64_t ldx, int64_t n, T* y) {
    constexpr int R = kDotRows<W>;
    int64_t i = 0;
    for (; i + R <= rows; i += R) dots_rows<T, W, R, Ahead>(a + i * lda, lda, x, ldx, n, y + i * W);
    for (; i + 2 <= rows; i += 2) dots_rows<T, W, 2, Ahead>(a + i * lda, lda, x, ldx, n, y + i * W);
    for (; i < rows; ++i) dots_rows<T, W, 1, Ahead>(a + i * lda, lda, x, ldx, n, y + i * W);
}

template <class T, int W, int C>
inline void accumulate_columns(const T* a, int64_t lda, int64_t rows, const T* y, T* z, int64_t n) {
    Vec<T> acc[W][C];
    for (int c = 0; c < W; ++c) {
        for (int v = 0; v < C; ++v) acc[c][v] = load(z + c * n + v * kLanes<T>);
    }
    for (int64_t i = 0; i < rows; ++i) {
        Vec<T> row[C];
        for (int v = 0; v < C; ++v) row[v] = load(a + i * lda + v * kLanes<T>);
        for (int c = 0; c < W; ++c) {
            const Vec<T> yc = splat(y[i * W + c]);
            for (int v = 0; v < C; ++v) acc[c][v] += row[v] * yc;
        }
    }
    for (int c = 0; c < W; ++c) {
        for (int v = 0; v < C; ++v) store(z + c * n + v * kLanes<T>, acc[c][v]);
    }
}

// z[c, j] += sum_i y[i, c] * a[i, j]    shapes as above, z [W, n]
template <int W, class T>
inline void accumulate(const T* a, int64_t lda, int64_t rows, const T* y, T* z, int64_t n) {
    constexpr int C = kAccumulated<W>;
    int64_t j = 0;
    for (; j + C * kLanes<T> <= n; j += C * kLanes<T>) accumulate_columns<T, W, C>(a + j, lda, rows, y, z + j, n);
    for (; j < n; j += kLanes<T>) accumulate_columns<T, W, 1>(a + j, lda, rows, y, z + j, n);
}

// Rows first to first + W of x [count, n], zeros where there is none, as the factors [n, W] that `accumulate` takes.
template <int W>
inline void columns_of(const double* x, int64_t count, int64_t n, int64_t first, double* factors) {
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t c = 0; c < W; ++c) factors[i * W + c] = first + c < count ? x[(first + c) * n + i] : 0.0;
    }
}

}  // namespace lors
