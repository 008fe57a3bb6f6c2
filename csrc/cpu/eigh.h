// Eigen-decomposition of a small symmetric matrix in float64: the Rayleigh-Ritz step of truncated_svd.
#pragma once

#include <cstdint>

#include "buffer.h"

namespace lors {

struct Eigen {
    Buffer<double> values;   // [values], largest first
    Buffer<double> vectors;  // [wanted, n], row i belongs to values[i]
};

// The largest `values` eigenvalues of a [n, n] (symmetric, overwritten) and the eigenvectors of the first `wanted` of
// them, wanted <= values <= n. Householder tridiagonalisation; then bisection and inverse iteration where few of many
// are asked for (a third of the time at n = 88), else, or if that fails on a cluster, implicit QR with Wilkinson
// shifts.
Eigen eigh(double* a, int64_t n, int64_t wanted, int64_t values);

}  // namespace lors
