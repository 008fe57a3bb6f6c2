// Leading eigenpairs of a large positive semi-definite matrix in float32: what truncated_svd starts from at large
// ranks.
#pragma once

#include <cstdint>

namespace lors {

// values: all eigenvalues of a, largest first, as float32 has them: each is off by about 1e-7 of the largest one in
// magnitude. vectors: orthonormal eigenvectors of the first `count`, one a row, to the same.
// Householder tridiagonalisation, which reads half of the matrix once for each column, implicit QR for the values,
// inverse iteration on the tridiagonal matrix in float64 for the vectors.
void eigh_single(const float* a,  // [n, n], of which the lower triangle is read
                 int64_t n, int64_t count,
                 double* values,   // [n]
                 float* vectors);  // [count, n]

}  // namespace lors
