// Eigen-decomposition of a small symmetric matrix in float64: the Rayleigh-Ritz step of truncated_svd.
#pragma once

#include <cstdint>

#include "buffer.h"

namespace lors {

struct Eigen {
    Buffer<double> values;   // [n], largest first
    Buffer<double> vectors;  // [wanted, n], row i belongs to values[i]
};

// a [n, n] symmetric, overwritten. Householder tridiagonalisation, then implicit QR with Wilkinson shifts; eigenvectors
// of the first `wanted` values only.
Eigen eigh(double* a, int64_t n, int64_t wanted);

}  // namespace lors
