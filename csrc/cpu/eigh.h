// Eigen-decomposition of a small symmetric matrix in float64: the Rayleigh-Ritz step of truncated_svd.
#pragma once

#include <cstdint>
#include <vector>

#include "buffer.h"

namespace lors {

struct Eigen {
    Buffer<double> values;   // [n], largest first
    Buffer<double> vectors;  // [n, entries]: row i has the wanted entries of the eigenvector of values[i]
};

// All eigenvalues of a [n, n] (symmetric, overwritten) and those entries of every eigenvector that `entries` names:
// Householder tridiagonalisation, then implicit QR with Wilkinson shifts, which turns only the entries that are wanted.
Eigen eigh(double* a, int64_t n, const std::vector<int64_t>& entries);

// The same with all entries.
Eigen eigh(double* a, int64_t n);

// All eigenvalues and at least the first `count` eigenvectors, whole: where these are few, by inverse iteration,
// orthogonal to 1e-9 only.
Eigen eigh_leading(double* a, int64_t n, int64_t count);

// d [n] becomes the eigenvalues, largest first, of the tridiagonal matrix with d on its diagonal and e [n - 1] beside
// it, to about 1e-14 of the largest one; e is overwritten.
void tridiagonal_values(double* d, double* e, int64_t n);

}  // namespace lors
