// The next block of a Krylov basis: W columns made orthonormal, and orthogonal to a basis Q, in one launch over all
// pairs. A block per pair; the panel stays in shared memory, in float64, a column after the other.
//
// Shifted Cholesky QR, a projection against Q, and two Cholesky QRs more, as lors_kernels/backends/truncated_svd.py has
// them in torch, which says why. Where the panel is G times the newest block, it is first projected on Q, twice, which
// is what the projection T = Q.T G Q is made of. Sums are taken in an order fixed by the sizes.
#include <cmath>

#include "launch.h"
#include "shared.cuh"

namespace lors {
namespace {

constexpr int W = 8;
constexpr int kThreads = 384;  // with more the registers do not suffice
constexpr int kWarps = kThreads / 32;
constexpr int kMaxRows = 1408;  // 96 bytes of shared memory each
constexpr int kColumns = 128;   // of Q at a time
constexpr double kTiny = 1e-300;

struct Panel {
    const float* w;      // [P, n, W]
    const float* basis;  // [P, n, columns], rows and pairs these many entries apart
    int64_t row_stride, stride;
    int n, columns;
    const double* noise;  // [n, W]
    const double* scale;  // [P]
    double level;
    float* q;  // [P, n, W], rows and pairs these many entries apart
    int64_t q_row, q_stride;
    double* below;  // [P, W, W]
    double* t;      // [P, room, room], or null: its last W of `columns` rows and columns are written
    int64_t room;
};

// What W x W numbers of one warp's work there are: R, its inverse, and the product of all R so far.
struct Triangles {
    double r[W * W], inverse[W * W], product[W * W], norms[W];
};

// The factor R of a panel from its Gram matrix in t.r, R's inverse, and product = R product. One warp, all lanes.
__device__ __forceinline__ void factor(Triangles& t, double shift) {
    const int lane = static_cast<int>(threadIdx.x) % 32, j = lane % W;
    if (lane < W) {
        const double norm = sqrt(t.r[j * W + j]);
        t.norms[j] = norm > kTiny ? norm : kTiny;
    }
    __syncwarp();
    // Cholesky, of columns scaled to norm 1: lane j has column j of the factor, whose rows so far are in t.inverse
#pragma unroll 1
    for (int i = 0; i < W; ++i) {
        double x = 0;
        if (lane < W && j >= i) {
            x = t.r[i * W + j] / t.norms[i] / t.norms[j] + (i == j ? shift : 0.0);
            for (int k = 0; k < i; ++k) x -= t.inverse[k * W + i] * t.inverse[k * W + j];
        }
        const double pivot = sqrt(__shfl_sync(~0u, x, i));
        if (lane < W) t.inverse[i * W + j] = j >= i ? x / pivot : 0.0;
        __syncwarp();
    }
    if (lane < W) {
        for (int i = 0; i < W; ++i) t.r[i * W + j] = t.inverse[i * W + j] * t.norms[j];
    }
    __syncwarp();
    double inverse[W], product[W];
    if (lane < W) {
#pragma unroll
        for (int i = W - 1; i >= 0; --i) {
            double x = i == j ? 1.0 : 0.0, y = 0;
#pragma unroll
            for (int k = i + 1; k < W; ++k) x -= t.r[i * W + k] * inverse[k];
#pragma unroll
            for (int k = i; k < W; ++k) y += t.r[i * W + k] * t.product[k * W + j];
            inverse[i] = i <= j ? x / t.r[i * W + i] : 0.0;
            product[i] = y;
        }
    }
    __syncwarp();
    if (lane < W) {
#pragma unroll
        for (int i = 0; i < W; ++i) t.inverse[i * W + j] = inverse[i], t.product[i * W + j] = product[i];
    }
}

// panel = Q R: leaves Q in its place.
__device__ __forceinline__ void cholesky_qr(double* panel, int n, double shift, Triangles& t) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    for (int entry = warp; entry < W * W; entry += kWarps) {
        const int i = entry / W, j = entry % W;
        if (i > j) continue;
        double sum = 0;
        for (int row = lane; row < n; row += 32) sum += panel[i * n + row] * panel[j * n + row];
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if (lane == 0) t.r[i * W + j] = sum;
    }
    __syncthreads();
    if (warp == 0) factor(t, shift);
    __syncthreads();
#pragma unroll 1
    for (int row = static_cast<int>(threadIdx.x); row < n; row += kThreads) {
        double x[W];
#pragma unroll
        for (int j = 0; j < W; ++j) x[j] = panel[j * n + row];
#pragma unroll
        for (int j = 0; j < W; ++j) {
            double sum = 0;
#pragma unroll
            for (int i = 0; i <= j; ++i) sum += x[i] * t.inverse[i * W + j];
            panel[j * n + row] = sum;
        }
    }
    __syncthreads();
}

// panel -= Q Q.T panel, in float32: a thread sums for one column of Q over a part of the rows; then a thread per row.
// Q.T panel is added to `image` [columns, W], rows g.room apart, or begins it.
__device__ __forceinline__ void project(const Panel& g, const float* basis, double* panel, float* narrow, float* parts,
                                        double* image = nullptr, bool begins = false) {
    const int thread = static_cast<int>(threadIdx.x), n = g.n;
    for (int row = thread; row < n; row += kThreads) {
        for (int j = 0; j < W; ++j) {
            narrow[row * W + j] = static_cast<float>(panel[j * n + row]);
            panel[j * n + row] = static_cast<double>(narrow[row * W + j]);
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int first = 0; first < g.columns; first += kColumns) {
        const int here = g.columns - first < kColumns ? g.columns - first : kColumns, padded = (here + 31) / 32 * 32;
        const int shares = kThreads / padded, column = thread % padded, share = thread / padded;
        float sums[W] = {};
        if (column < here && share < shares) {
#pragma unroll 4
            for (int row = share; row < n; row += shares) {
                const float q = basis[row * g.row_stride + first + column];
#pragma unroll
                for (int j = 0; j < W; ++j) sums[j] += q * narrow[row * W + j];
            }
        }
#pragma unroll
        for (int j = 0; j < W; ++j) parts[thread * W + j] = sums[j];
        __syncthreads();
        for (int i = thread; i < here * W; i += kThreads) {
            float sum = 0;
            for (int other = 0; other < shares; ++other) sum += parts[other * padded * W + i];
            parts[i] = sum;
            if (image) {  // the same thread's in every projection
                double& entry = image[(first + i / W) * g.room + i % W];
                entry = begins ? static_cast<double>(sum) : entry + static_cast<double>(sum);
            }
        }
        __syncthreads();
#pragma unroll 1
        for (int row = thread; row < n; row += kThreads) {
            float v[W] = {};
            const float4* line = reinterpret_cast<const float4*>(basis + row * g.row_stride + first);
#pragma unroll 2
            for (int c = 0; c < here; c += 4) {
                const float4 four = line[c / 4];
                const float q[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                for (int k = 0; k < 4; ++k) {
#pragma unroll
                    for (int j = 0; j < W; ++j) v[j] += q[k] * parts[(c + k) * W + j];
                }
            }
#pragma unroll
            for (int j = 0; j < W; ++j) panel[j * n + row] -= static_cast<double>(v[j]);
        }
        __syncthreads();
    }
}

// T's last columns: symmetric where they cross its last rows, which are the same numbers. Returns T's largest diagonal
// entry.
__device__ __forceinline__ double mirror(const Panel& g, double* t) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, old = g.columns - W;
    double* image = t + old;
    double mean = 0;
    if (thread < W * W) {
        const int i = thread / W, j = thread % W;
        mean = 0.5 * (image[(old + i) * g.room + j] + image[(old + j) * g.room + i]);
    }
    __syncthreads();
    if (thread < W * W) image[(old + thread / W) * g.room + thread % W] = mean;
    for (int i = thread; i < old * W; i += kThreads) t[(old + i % W) * g.room + i / W] = image[i / W * g.room + i % W];
    double top = t[0];  // the diagonal is what it was
    for (int i = lane; i < g.columns; i += 32) top = t[i * g.room + i] > top ? t[i * g.room + i] : top;
    for (int step = 16; step > 0; step /= 2) {
        const double other = __shfl_xor_sync(~0u, top, step);
        top = other > top ? other : top;
    }
    return top;
}

__global__ void __launch_bounds__(kThreads) orthonormalise_kernel(Panel g) {
    LORS_DYNAMIC_SHARED(memory);
    LORS_SHARED(Triangles, triangles);
    LORS_SHARED(__align__(16) float, parts, [kThreads * W]);
    const int64_t p = blockIdx.x;
    const int n = g.n, thread = static_cast<int>(threadIdx.x);
    double* panel = reinterpret_cast<double*>(memory);
    float* narrow = reinterpret_cast<float*>(panel + n * W);
    const float* basis = g.basis + p * g.stride;
    for (int i = thread; i < n * W; i += kThreads) panel[i % W * n + i / W] = static_cast<double>(g.w[p * n * W + i]);
    for (int i = thread; i < W * W; i += kThreads) triangles.product[i] = i / W == i % W ? 1.0 : 0.0;
    __syncthreads();
    double scale = 0;
    if (g.t) {
        double* t = g.t + p * g.room * g.room;
        for (int again = 0; again < 2; ++again) {
            project(g, basis, panel, narrow, parts, t + g.columns - W, again == 0);
        }
        scale = mirror(g, t);
    } else {
        scale = g.scale[p];
    }
    const double floor = (scale > 0 ? scale * g.level : 1.0) / sqrt(static_cast<double>(n));
    for (int i = thread; i < n * W; i += kThreads) panel[i % W * n + i / W] += floor * g.noise[i];
    __syncthreads();
    cholesky_qr(panel, n, 1e-13 * W, triangles);
    if (g.columns) project(g, basis, panel, narrow, parts);
    cholesky_qr(panel, n, 0.0, triangles);
    cholesky_qr(panel, n, 0.0, triangles);
    for (int i = thread; i < n * W; i += kThreads) {
        g.q[p * g.q_stride + i / W * g.q_row + i % W] = static_cast<float>(panel[i % W * n + i / W]);
    }
    for (int i = thread; i < W * W; i += kThreads) g.below[p * W * W + i] = triangles.product[i];
}

int64_t dynamic_shared(int64_t n) {
    return n * W * static_cast<int64_t>(sizeof(double) + sizeof(float));
}

void launch_panels(const Launch& launch, const char* name, int64_t pairs, const Panel& g) {
    const Group group{nullptr, 0, 0, false, pairs, 1, g.n, W};
    const Selected selected = begin(launch, name, group);
    const int64_t shared = dynamic_shared(g.n);
    check(cudaFuncSetAttribute(orthonormalise_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared)),
          name, group);
    start(launch, name, group, blocks(pairs, name, group), kThreads, shared, orthonormalise_kernel, g);
}

}  // namespace

int orthonormalise_max_rows(int device) {
    const int64_t fixed = static_cast<int64_t>(sizeof(Triangles) + kThreads * W * sizeof(float));
    const int64_t rows = (shared_memory_of(device) - fixed) / dynamic_shared(1);
    return static_cast<int>(rows < 0 ? 0 : rows < kMaxRows ? rows : kMaxRows);
}

void orthonormalise(const Launch& launch, const float* w, const float* basis, int64_t row_stride, int64_t stride,
                    int64_t pairs, int64_t n, int64_t columns, const double* noise, const double* scale, double level,
                    float* q, double* below) {
    launch_panels(launch, "orthonormalise", pairs,
                  {w, basis, row_stride, stride, static_cast<int>(n), static_cast<int>(columns), noise, scale, level, q,
                   W, n * W, below, nullptr, 0});
}

void expand(const Launch& launch, const float* w, float* basis, int64_t row_stride, int64_t stride, int64_t pairs,
            int64_t n, int64_t columns, const double* noise, double level, double* t, int64_t room, double* below) {
    launch_panels(launch, "expand", pairs,
                  {w, basis, row_stride, stride, static_cast<int>(n), static_cast<int>(columns), noise, nullptr, level,
                   basis + columns, row_stride, stride, below, t, room});
}

}  // namespace lors
