// Eigenvalues and eigenvectors of many small symmetric matrices in float64: a block per matrix, cyclic Jacobi.
//
// The matrix and the transposed eigenvectors stay in shared memory. A round rotates n / 2 disjoint pairs of rows and
// columns at once (the pairings of a round-robin tournament): the angles first, then every 2 x 2 block of the matrix
// and every pair of eigenvectors by itself, so that two barriers are all a round waits for. A sweep is every pair once;
// sweeps go on until one finds nothing above rounding. Residual and orthogonality are measured at the end, against the
// matrix as it was given.
//
// Jacobi, and not a tridiagonal reduction with QL: that has fewer operations but a chain of n^2 dependent divisions and
// roots, and none of the parallelism.
#include <cmath>

#include "launch.h"
#include "shared.cuh"

namespace lors {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxSize = 96;
constexpr int kPairs = kMaxSize / 2;
constexpr int kMaxSweeps = 30;
constexpr double kNegligible = 0x1p-56;  // of the largest entry

struct Eigh {
    const double* a;  // [count, n, n], symmetric: rows and matrices these many entries apart
    int64_t row_stride, stride;
    double* theta;    // [count, n], smallest first
    double* vectors;  // [count, n, n], a column each
    double* error;    // [count]
    int n;
};

// Entries from one row to the next: odd, so that a column's entries lie in different banks.
constexpr __host__ __device__ int pitch(int n) {
    return n | 1;
}

// The pair `k` of round `round` among m players, m even; the last player stays, the others move round a table.
__device__ __forceinline__ void pairing(int m, int round, int k, int& p, int& q) {
    const int seats = m - 1;
    const int there = round + k < seats ? round + k : round + k - seats;
    const int back = round < k ? round - k + seats : round - k;
    p = k == 0 ? round : there < back ? there : back;
    q = k == 0 ? seats : there < back ? back : there;
}

// Cosine and sine of the rotation that makes a[p][q] zero; the smaller of the two angles.
__device__ __forceinline__ void rotation(double pp, double qq, double pq, double& c, double& s) {
    const double half = (qq - pp) / (2 * pq);
    const double t = (half < 0 ? -1.0 : 1.0) / (fabs(half) + sqrt(half * half + 1));
    c = 1 / sqrt(t * t + 1);
    s = t * c;
}

// The largest of all threads' values; NaN where there is one. A barrier has to pass before the scratch is used again.
__device__ __forceinline__ double block_largest(double value, double* scratch) {
    for (int step = 16; step > 0; step /= 2) {
        const double other = __shfl_xor_sync(~0u, value, step);
        value = other > value || other != other ? other : value;
    }
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = scratch[0];
    for (int warp = 1; warp < kWarps; ++warp) {
        value = scratch[warp] > value || scratch[warp] != scratch[warp] ? scratch[warp] : value;
    }
    return value;
}

__global__ void __launch_bounds__(kThreads) eigh_kernel(Eigh g) {
    LORS_DYNAMIC_SHARED(memory);
    LORS_SHARED(double, cosines, [kPairs]);
    LORS_SHARED(double, sines, [kPairs]);
    LORS_SHARED(double, scratch, [kWarps]);
    const int n = g.n, ld = pitch(n), players = n + n % 2, pairs = players / 2;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const double* given = g.a + blockIdx.x * g.stride;
    double* a = reinterpret_cast<double*>(memory);
    double* v = a + n * ld;  // v[k] is the k-th eigenvector

    double top = 0;
    for (int i = warp; i < n; i += kWarps) {
        for (int j = lane; j < n; j += 32) {
            const double x = given[i * g.row_stride + j];
            a[i * ld + j] = x;
            v[i * ld + j] = i == j ? 1.0 : 0.0;
            top = fabs(x) > top || x != x ? fabs(x) : top;
        }
    }
    top = block_largest(top, scratch);
    const double negligible = kNegligible * top;

    bool moving = true;
    for (int sweep = 0; sweep < kMaxSweeps && moving; ++sweep) {
        moving = false;
        for (int round = 0; round < players - 1; ++round) {
            bool turns = false;
            if (static_cast<int>(threadIdx.x) < pairs) {
                const int k = static_cast<int>(threadIdx.x);
                int p, q;
                pairing(players, round, k, p, q);
                double c = 1, s = 0;
                if (q < n && fabs(a[p * ld + q]) > negligible) {
                    rotation(a[p * ld + p], a[q * ld + q], a[p * ld + q], c, s);
                    turns = true;
                }
                cosines[k] = c, sines[k] = s;
            }
            if (!__syncthreads_or(turns)) continue;
            moving = true;
            for (int i = warp; i < pairs; i += kWarps) {
                int pi, qi, pj, qj;
                pairing(players, round, i, pi, qi);
                const double ci = cosines[i], si = sines[i];
                const bool alone = qi >= n;  // this round's bye
                if (si != 0) {
                    for (int j = lane; j < n; j += 32) {
                        const double x = v[pi * ld + j], y = v[qi * ld + j];
                        v[pi * ld + j] = ci * x - si * y;
                        v[qi * ld + j] = si * x + ci * y;
                    }
                }
                for (int j = i + lane; j < pairs; j += 32) {
                    pairing(players, round, j, pj, qj);
                    const double cj = cosines[j], sj = sines[j];
                    if (si == 0 && sj == 0) continue;
                    if (j == i) {
                        const double pq = a[pi * ld + qi], move = si / ci * pq;
                        a[pi * ld + pi] -= move;
                        a[qi * ld + qi] += move;
                        a[pi * ld + qi] = a[qi * ld + pi] = 0;
                        continue;
                    }
                    const bool other_alone = qj >= n;
                    const double pp = a[pi * ld + pj], pq = other_alone ? 0 : a[pi * ld + qj];
                    const double qp = alone ? 0 : a[qi * ld + pj], qq = alone || other_alone ? 0 : a[qi * ld + qj];
                    const double rpp = ci * pp - si * qp, rpq = ci * pq - si * qq;
                    const double rqp = si * pp + ci * qp, rqq = si * pq + ci * qq;
                    a[pi * ld + pj] = a[pj * ld + pi] = cj * rpp - sj * rpq;
                    if (!other_alone) a[pi * ld + qj] = a[qj * ld + pi] = sj * rpp + cj * rpq;
                    if (!alone) a[qi * ld + pj] = a[pj * ld + qi] = cj * rqp - sj * rqq;
                    if (!alone && !other_alone) a[qi * ld + qj] = a[qj * ld + qi] = sj * rqp + cj * rqq;
                }
            }
            __syncthreads();
        }
    }

    // A place for every eigenvalue by counting the smaller ones.
    for (int k = warp; k < n; k += kWarps) {
        const double mine = a[k * ld + k];
        int place = 0;
        for (int j = lane; j < n; j += 32) {
            const double other = a[j * ld + j];
            place += other < mine || (other == mine && j < k);
        }
        for (int step = 16; step > 0; step /= 2) place += __shfl_xor_sync(~0u, place, step);
        if (lane == 0) g.theta[int64_t{blockIdx.x} * n + place] = mine;
        for (int i = lane; i < n; i += 32) g.vectors[(int64_t{blockIdx.x} * n + i) * n + place] = v[k * ld + i];
    }

    // |V.T V - 1| and |A V - V theta| / |A|, entry by entry.
    double worst = 0;
    for (int k = warp; k < n; k += kWarps) {
        const double mine = a[k * ld + k];
        for (int i = lane; i < n; i += 32) {
            double product = 0, image = -mine * v[k * ld + i];
            for (int j = 0; j < n; ++j) {
                product += v[k * ld + j] * v[i * ld + j];
                image +=
                    given[j * g.row_stride + i] * v[k * ld + j];  // the matrix is symmetric: neighbours, one cache line
            }
            const double skew = fabs(product - (i == k ? 1.0 : 0.0));
            const double residual = top > 0 ? fabs(image) / top : 0;
            worst = skew > worst || skew != skew ? skew : worst;
            worst = residual > worst || residual != residual ? residual : worst;
        }
    }
    worst = block_largest(worst, scratch);
    if (threadIdx.x == 0) g.error[blockIdx.x] = worst;
}

}  // namespace

int eigh_max_size() {
    return kMaxSize;
}

void eigh(const Launch& launch, const double* a, int64_t row_stride, int64_t stride, int64_t count, int64_t n,
          double* theta, double* vectors, double* error) {
    const Group group{nullptr, 0, 0, false, count, 1, n, n};
    const Selected selected = begin(launch, "eigh", group);
    const int64_t shared = 2 * n * pitch(static_cast<int>(n)) * static_cast<int64_t>(sizeof(double));
    check(cudaFuncSetAttribute(eigh_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
          "eigh", group);
    const Eigh g{a, row_stride, stride, theta, vectors, error, static_cast<int>(n)};
    start(launch, "eigh", group, blocks(count, "eigh", group), kThreads, shared, eigh_kernel, g);
}

}  // namespace lors
