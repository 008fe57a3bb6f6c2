// Eigenvalues and eigenvectors of many small symmetric matrices in float64: a block per matrix, in shared memory.
//
// Householder reflections make the matrix tridiagonal, and their product takes its place; then implicit QL. Of that,
// one thread finds the rotations of a sweep, each of which needs the one before, while the other warps apply those of
// the sweep before to the vectors, a row each. So a processor is kept busy by having several matrices, not by one.
// Everything is scaled to a largest entry of 1 to 2. Residual and orthogonality are measured at the end, against the
// matrix as it was given.
#include <cmath>

#include "launch.h"
#include "shared.cuh"

namespace lors {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxSize = 160;
constexpr int kMaxSweeps = 60;  // for one eigenvalue
constexpr double kNegligible = 0x1p-54;

struct Eigh {
    const double* a;  // [count, n, n], symmetric: rows and matrices these many entries apart
    int64_t row_stride, stride;
    double* theta;    // [count, n], smallest first
    double* vectors;  // [count, n, n], a column each
    double* error;    // [count]
    int n;
};

// What a block has besides the matrix.
struct Scratch {
    double d[kMaxSize], e[kMaxSize];                  // diagonal, and beside it
    double beta[kMaxSize];                            // of the reflections 1 - beta v v.T
    double v[kMaxSize], w[kMaxSize];                  // of the present one
    double cosines[2][kMaxSize], sines[2][kMaxSize];  // of two sweeps
    double parts[kThreads];
    int first[2], behind[2];  // of each: rotation i turns the columns i and i + 1
    int finished[2];
};

// Entries from one row to the next: odd, so that a column's entries lie in different banks.
constexpr __host__ __device__ int pitch(int n) {
    return n | 1;
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

__device__ __forceinline__ double warp_sum(double value) {
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

// How the block's threads share m rows or columns: a thread has one of them, and one part of its entries.
struct Share {
    int index, part, parts;
    bool works;

    __device__ __forceinline__ explicit Share(int m) {
        const int padded = (m + 31) / 32 * 32;
        parts = kThreads / padded;
        index = static_cast<int>(threadIdx.x) % padded, part = static_cast<int>(threadIdx.x) / padded;
        works = index < m && part < parts;
    }
    // the sum over the parts of what each thread left in `from`
    __device__ __forceinline__ double sum(const double* from, int padded, int i) const {
        double total = 0;
        for (int part_ = 0; part_ < parts; ++part_) total += from[part_ * padded + i];
        return total;
    }
};

// a -> its reflections' v below the diagonal; s.d, s.e, s.beta
__device__ __forceinline__ void tridiagonalise(double* a, int n, int ld, Scratch& s) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    for (int k = 0; k < n - 2; ++k) {
        const int m = n - k - 1, padded = (m + 31) / 32 * 32;
        double* sub = a + (k + 1) * ld + k + 1;
        const double* x = a + (k + 1) * ld + k;  // a column
        double rest = 0;                         // every warp for itself
        for (int i = lane; i < m; i += 32) rest += i ? x[i * ld] * x[i * ld] : 0.0;
        rest = warp_sum(rest);
        const double x0 = x[0], norm = sqrt(x0 * x0 + rest);
        const bool turns = rest > 0;
        const double v0 = x0 > 0 ? x0 + norm : x0 - norm, beta = turns ? 1 / (norm * (norm + fabs(x0))) : 0.0;
        const Share share(m);
        if (turns && share.works) {
            const double* row = sub + share.index * ld;
            double sum = 0;
            for (int j = share.part; j < m; j += share.parts) sum += row[j] * (j ? x[j * ld] : v0);
            s.parts[share.part * padded + share.index] = beta * sum;
        }
        __syncthreads();
        if (turns) {  // w = p - beta / 2 (p.v) v, by every warp for itself
            double product = 0;
            for (int i = lane; i < m; i += 32) product += share.sum(s.parts, padded, i) * (i ? x[i * ld] : v0);
            product = 0.5 * beta * warp_sum(product);
            for (int i = static_cast<int>(threadIdx.x); i < m; i += kThreads) {
                const double v = i ? x[i * ld] : v0;
                s.v[i] = v, s.w[i] = share.sum(s.parts, padded, i) - product * v;
            }
        }
        __syncthreads();
        if (turns && share.works) {
            double* row = sub + share.index * ld;
            const double v = s.v[share.index], w = s.w[share.index];
            for (int j = share.part; j < m; j += share.parts) row[j] -= v * s.w[j] + w * s.v[j];
        }
        if (warp == 0 && lane == 0) {
            s.d[k] = a[k * ld + k], s.beta[k] = beta;
            s.e[k] = !turns ? x0 : x0 > 0 ? -norm : norm;
            a[(k + 1) * ld + k] = v0;
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        for (int k = n < 2 ? 0 : n - 2; k < n; ++k) s.d[k] = a[k * ld + k];
        if (n > 1) s.e[n - 2] = a[(n - 1) * ld + n - 2];
        s.e[n - 1] = 0;
    }
    __syncthreads();
}

// the product of the reflections, in the place of their v
__device__ __forceinline__ void accumulate(double* a, int n, int ld, Scratch& s) {
    const int last = n < 2 ? 0 : n - 2;  // from here on it is the identity
    for (int i = static_cast<int>(threadIdx.x); i < (n - last) * (n - last); i += kThreads) {
        const int row = last + i / (n - last), column = last + i % (n - last);
        a[row * ld + column] = row == column ? 1.0 : 0.0;
    }
    __syncthreads();
    for (int k = n - 3; k >= 0; --k) {
        const int m = n - k - 1, padded = (m + 31) / 32 * 32;
        double* sub = a + (k + 1) * ld + k + 1;
        double* x = a + (k + 1) * ld + k;
        const double beta = s.beta[k];
        const Share share(m);
        if (share.works) {
            double sum = 0;
            for (int i = share.part; i < m; i += share.parts) sum += x[i * ld] * sub[i * ld + share.index];
            s.parts[share.part * padded + share.index] = beta * sum;
            if (share.part == 0) s.v[share.index] = x[share.index * ld];
        }
        __syncthreads();
        if (share.works) {
            const double sum = share.sum(s.parts, padded, share.index);
            if (beta != 0) {
                for (int i = share.part; i < m; i += share.parts) sub[i * ld + share.index] -= s.v[i] * sum;
            }
            if (share.part == 0) x[share.index * ld] = a[k * ld + k + 1 + share.index] = 0;
        }
        if (threadIdx.x == 0) a[k * ld + k] = 1;
        __syncthreads();
    }
}

// Where the sweeps are: eigenvalue l is looked for, for the tries-th time.
struct Progress {
    int l = 0, tries = 0;
};

// The rotations of one more sweep, by the first warp; false when there is none.
__device__ __forceinline__ bool sweep(Progress& at, int n, double norm, Scratch& s, int turn) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    int m = at.l;
    for (;; ++at.l, at.tries = 0) {
        if (at.l >= n - 1) break;
        m = n - 1;  // the first from l on that stands alone from the next
        for (int i = at.l + lane; i < n - 1 && m == n - 1; i += 32) {
            const double beside = fabs(s.e[i]);
            if (beside <= kNegligible * (fabs(s.d[i]) + fabs(s.d[i + 1])) || beside <= 0.25 * kNegligible * norm) m = i;
        }
        for (int step = 16; step > 0; step /= 2) {
            const int other = __shfl_xor_sync(~0u, m, step);
            m = other < m ? other : m;
        }
        if (m > at.l && at.tries < kMaxSweeps) break;  // where that is exceeded, the error will tell
    }
    ++at.tries;
    int i = m - 1;
    if (lane == 0 && at.l < n - 1) {
        const int l = at.l;
        const double half = (s.d[l + 1] - s.d[l]) / (2 * s.e[l]);
        double g = s.d[m] - s.d[l] + s.e[l] / (half + copysign(sqrt(half * half + 1), half));
        double sine = 1, cosine = 1, p = 0;
        for (; i >= l; --i) {
            const double f = sine * s.e[i], b = cosine * s.e[i], square = f * f + g * g;
            if (square < 0x1p-900) break;
            const double inverse = rsqrt(square);
            s.e[i + 1] = square * inverse;
            sine = f * inverse, cosine = g * inverse;
            g = s.d[i + 1] - p;
            const double r = (s.d[i] - g) * sine + 2 * cosine * b;
            p = sine * r;
            s.d[i + 1] = g + p;
            g = cosine * r - b;
            s.cosines[turn][i] = cosine, s.sines[turn][i] = sine;
        }
        if (i >= l) {  // it falls apart here
            s.d[i + 1] -= p, s.e[i + 1] = 0;
        } else {
            s.d[l] -= p, s.e[l] = g;
        }
        s.e[m] = 0;
    }
    if (lane == 0) s.first[turn] = i + 1, s.behind[turn] = m, s.finished[turn] = at.l >= n - 1;
    __syncwarp();
    return at.l < n - 1;
}

// Turns one row of the vectors.
__device__ __forceinline__ void rotate(double* row, const Scratch& s, int turn) {
    int i = s.behind[turn] - 1;
    const int first = s.first[turn];
    if (i < first) return;
    double upper = row[i + 1];
    for (; i >= first; --i) {
        const double lower = row[i], cosine = s.cosines[turn][i], sine = s.sines[turn][i];
        row[i + 1] = sine * lower + cosine * upper;
        upper = cosine * lower - sine * upper;
    }
    row[first] = upper;
}

__global__ void __launch_bounds__(kThreads) eigh_kernel(Eigh g) {
    LORS_DYNAMIC_SHARED(memory);
    LORS_SHARED(Scratch, s);
    const int n = g.n, ld = pitch(n);
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const double* given = g.a + blockIdx.x * g.stride;
    double* a = reinterpret_cast<double*>(memory);

    double top = 0;
    for (int i = warp; i < n; i += kWarps) {
        for (int j = lane; j < n; j += 32) {
            const double x = given[i * g.row_stride + j];
            a[i * ld + j] = x;
            top = fabs(x) > top || x != x ? fabs(x) : top;
        }
    }
    if (threadIdx.x == 0) s.first[1] = s.behind[1] = 0;  // nothing to apply in the first turn
    top = block_largest(top, s.parts);
    int exponent = 0;
    frexp(top, &exponent);
    const double unit = top > 0 && top < INFINITY ? ldexp(1.0, exponent - 1) : 1.0;
    for (int i = warp; i < n; i += kWarps) {
        for (int j = lane; j < n; j += 32) a[i * ld + j] /= unit;
    }
    __syncthreads();
    tridiagonalise(a, n, ld, s);
    accumulate(a, n, ld, s);

    Progress progress;
    if (!(top < INFINITY)) progress.l = n;  // nothing to look for
    int turn = 0;
    for (;; turn ^= 1) {
        if (warp == 0) {
            sweep(progress, n, top / unit, s, turn);
        } else if (static_cast<int>(threadIdx.x) - 32 < n) {
            rotate(a + (threadIdx.x - 32) * ld, s, turn ^ 1);
        }
        __syncthreads();
        if (s.finished[turn]) break;
    }

    // A place for every eigenvalue by counting the smaller ones.
    for (int k = warp; k < n; k += kWarps) {
        const double mine = s.d[k];
        int place = 0;
        for (int j = lane; j < n; j += 32) {
            const double other = s.d[j];
            place += other < mine || (other == mine && j < k);
        }
        for (int step = 16; step > 0; step /= 2) place += __shfl_xor_sync(~0u, place, step);
        if (lane == 0) g.theta[int64_t{blockIdx.x} * n + place] = mine * unit;
        for (int i = lane; i < n; i += 32) g.vectors[(int64_t{blockIdx.x} * n + i) * n + place] = a[i * ld + k];
    }

    // |V.T V - 1| and |A V - V theta| / |A|, entry by entry.
    double worst = top <= 0x1.fffffffffffffp1023 ? 0 : NAN;
    for (int k = warp; k < n; k += kWarps) {
        const double mine = s.d[k] * unit;
        for (int i = lane; i < n; i += 32) {
            double product = 0, image = -mine * a[i * ld + k];
            for (int j = 0; j < n; ++j) {
                product += a[j * ld + k] * a[j * ld + i];
                image += given[j * g.row_stride + i] * a[j * ld + k];  // symmetric: neighbours, one cache line
            }
            const double skew = fabs(product - (i == k ? 1.0 : 0.0));
            const double residual = top > 0 ? fabs(image) / top : 0;
            worst = skew > worst || skew != skew ? skew : worst;
            worst = residual > worst || residual != residual ? residual : worst;
        }
    }
    worst = block_largest(worst, s.parts);
    if (threadIdx.x == 0) g.error[blockIdx.x] = worst;
}

int64_t dynamic_shared(int64_t n) {
    return n * pitch(static_cast<int>(n)) * static_cast<int64_t>(sizeof(double));
}

}  // namespace

int eigh_max_size(int device) {
    int n = kMaxSize;
    while (n > 0 && dynamic_shared(n) + static_cast<int64_t>(sizeof(Scratch)) > shared_memory_of(device)) --n;
    return n;
}

void eigh(const Launch& launch, const double* a, int64_t row_stride, int64_t stride, int64_t count, int64_t n,
          double* theta, double* vectors, double* error) {
    const Group group{nullptr, 0, 0, false, count, 1, n, n};
    const Selected selected = begin(launch, "eigh", group);
    const int64_t shared = dynamic_shared(n);
    check(cudaFuncSetAttribute(eigh_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
          "eigh", group);
    const Eigh g{a, row_stride, stride, theta, vectors, error, static_cast<int>(n)};
    start(launch, "eigh", group, blocks(count, "eigh", group), kThreads, shared, eigh_kernel, g);
}

}  // namespace lors
