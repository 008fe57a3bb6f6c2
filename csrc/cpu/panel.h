// The two inner loops behind every product with delta: a few rows of a matrix against kWidth vectors.
//
// The vectors are stored as rows, [kWidth, n] padded, so that the vector lanes run along n in both loops. Rows of `a`
// are meant to sit in L1: `dots` reads them once and `accumulate` reads them again.
#pragma once

#include "simd.h"

namespace lors {

constexpr int kWidth = 4;  // vectors per group; with 6 rows 24 sums, 6 rows and a vector: 31 of 32 AVX-512 registers

template <class T, int R>
inline void dots_rows(const T* a, int64_t lda, const T* x, int64_t n, T* y) {
    Vec<T> acc[R][kWidth] = {};
    for (int64_t j = 0; j < n; j += kLanes<T>) {
        Vec<T> row[R];
        for (int r = 0; r < R; ++r) row[r] = load(a + r * lda + j);
        for (int c = 0; c < kWidth; ++c) {
            const Vec<T> xc = load(x + c * n + j);
            for (int r = 0; r < R; ++r) acc[r][c] += row[r] * xc;
        }
    }
    for (int r = 0; r < R; ++r) sum_lanes(acc[r], y + r * kWidth);
}

// y[i, c] = sum_j a[i, j] * x[c, j]    a [rows, n], row step lda; x [kWidth, n]; y [rows, kWidth]; n a multiple of kPad
template <class T>
inline void dots(const T* a, int64_t lda, int64_t rows, const T* x, int64_t n, T* y) {
    constexpr int R = kVectorBytes == 64 ? 6 : 2;
    int64_t i = 0;
    for (; i + R <= rows; i += R) dots_rows<T, R>(a + i * lda, lda, x, n, y + i * kWidth);
    for (; i < rows; ++i) dots_rows<T, 1>(a + i * lda, lda, x, n, y + i * kWidth);
}

template <class T, int C>
inline void accumulate_columns(const T* a, int64_t lda, int64_t rows, const T* y, T* z, int64_t n) {
    Vec<T> acc[kWidth][C];
    for (int c = 0; c < kWidth; ++c) {
        for (int v = 0; v < C; ++v) acc[c][v] = load(z + c * n + v * kLanes<T>);
    }
    for (int64_t i = 0; i < rows; ++i) {
        Vec<T> row[C];
        for (int v = 0; v < C; ++v) row[v] = load(a + i * lda + v * kLanes<T>);
        for (int c = 0; c < kWidth; ++c) {
            const Vec<T> yc = splat(y[i * kWidth + c]);
            for (int v = 0; v < C; ++v) acc[c][v] += row[v] * yc;
        }
    }
    for (int c = 0; c < kWidth; ++c) {
        for (int v = 0; v < C; ++v) store(z + c * n + v * kLanes<T>, acc[c][v]);
    }
}

// z[c, j] += sum_i y[i, c] * a[i, j]    shapes as above, z [kWidth, n]
template <class T>
inline void accumulate(const T* a, int64_t lda, int64_t rows, const T* y, T* z, int64_t n) {
    constexpr int C = kVectorBytes == 64 ? 4 : 2;
    int64_t j = 0;
    for (; j + C * kLanes<T> <= n; j += C * kLanes<T>) accumulate_columns<T, C>(a + j, lda, rows, y, z + j, n);
    for (; j < n; j += kLanes<T>) accumulate_columns<T, 1>(a + j, lda, rows, y, z + j, n);
}

}  // namespace lors
