// The operations that have CUDA kernels, over groups of same-shaped matrices: device pointers, the caller's stream.
//
// Everything here is asynchronous; arguments arrive checked. Every CUDA call is checked: a failure throws CudaError,
// which names the kernel and the shape.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace lors {

struct CudaError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// P = matrices * experts pairs; pair p = i * experts + t is delta_p = tuned[i][t] - base[i], [m, n].
struct Group {
    const int64_t* table;  // device [4, P]: base address (0: zeros), base row stride, tuned address, tuned row stride
    int base_dtype;        // DType of csrc/common/views.h
    int tuned_dtype;
    bool aligned;  // every row starts on 16 bytes
    int64_t matrices, experts, m, n;

    int64_t pairs() const { return matrices * experts; }
};

struct Launch {
    int device;
    cudaStream_t stream;
};

// How one gram_apply is cut into blocks; a function of sizes alone, tested on the host.
struct GramPlan {
    int64_t rows;    // rows of A per block, a multiple of the rows per stage
    int64_t chunks;  // blocks per pair
    int per_thread;  // inner indices per thread; 0: the inner side is too long for registers, plain kernels run
    int64_t shared;  // bytes of dynamic shared memory
    bool tensor;     // on tensor cores
};
// room: bytes of shared memory that a block may have
GramPlan plan_gram(int64_t pairs, int64_t outer, int64_t inner, int item_size, bool vectors, int processors,
                   int64_t room);
int64_t shared_memory(int device);  // what it is on this one

// A = delta [outer, inner], or its transpose: partial[p, chunk] = A[chunk].T @ (A[chunk] @ x[p]), to be summed over
// chunks.
//   x [P, inner, b]   y [P, outer, b] = A @ x (may be null unless the plan has per_thread 0)
//   partial [P, chunks, inner, b]
//   account [P, chunks, 2] or null, written where the plan has tensor cores: sum of squares of the deltas, not finite
//   where one of them is not; and their largest magnitude, to the bits of float16
void gram_apply(const Launch& launch, const Group& group, bool transposed, const GramPlan& plan, const float* x,
                int64_t b, float* y, float* partial, float* account);

// The search for a threshold: what the kernels hand to one another, an entry per pair.
struct ThresholdSearch {
    int64_t k;
    int64_t pieces;             // of 32 entries in the sample, up to threshold_sample(); 0: radix passes only
    int64_t capacity;           // candidates of a pair
    float* bracket;             // [2, P]: candidates are the magnitudes from the first to the second
    unsigned long long* found;  // [3, P], zero before: above the bracket, inside it, blocks with non-finite entries
    uint32_t* candidates;       // [P, capacity]
    int32_t* settled;           // [P], zero before
    int32_t* key;               // [P], zero before: the threshold's bits
    int64_t* wanted;            // [P], k before: entries equal to it that are kept
    int64_t* equal;             // [P]: all of them
    int64_t* non_finite;        // [P]
};

// The k-th largest key of |delta - L|, and cut[p]: the row-major index just behind the wanted[p]-th entry equal to it.
//   left [P, m, rank]   right_t [P, rank, n]   passes: 3, or 1 to count non-finite entries only, with cut null
//   counts [passes, P, 2048], zero before   ties [P, tie_chunks(m, n)], scratch
void residual_threshold(const Launch& launch, const Group& group, const float* left, const float* right_t, int64_t rank,
                        const ThresholdSearch& search, int passes, int64_t* counts, int64_t* ties, int64_t* cut);
int64_t threshold_sample();
int64_t tie_chunks(int64_t m, int64_t n);

// out_i += sum_t weight[p] * (L_p + kept residual), experts in order.
//   out_table [2, matrices]: address, row stride   value float [P]   cut int64 [P]   weight float [P]
//   energy [P, tiles, 3] float: sums of delta^2, residual^2, kept^2   counts [P, tiles, 2] int32: kept, non-finite
void merge_update(const Launch& launch, const Group& group, const int64_t* out_table, int out_dtype, bool out_aligned,
                  const float* left, const float* right_t, int64_t rank, const float* value, const int64_t* cut,
                  const float* weight, float* energy, int32_t* counts);
int64_t merge_tiles(int64_t m, int64_t n);

// What ties_update keeps of every pair, as arrays on the device.
struct TiesRules {
    const float* numbers;     // [4, P]: values of the low and the high threshold, factor, weight
    const int64_t* integers;  // [4, P]: cuts of the low and the high threshold, key and limit of the random numbers
};

// How ties_update puts the experts together.
struct TiesSum {
    bool elect, normalize;
    float scale, all_weights;  // all_weights: the divisor without an election
    int64_t start;             // row-major index of the matrix's first entry in its tensor
};

// out_i += scale * consensus over the experts of what is kept of delta_p; out_table null: only the account is made.
//   energy [P, tiles, 4] float: sums of delta^2, kept^2, |delta|, |kept|
//   counts [P, tiles, 2] int32: kept, non-finite; tiles = ties_tiles(m, n)
void ties_update(const Launch& launch, const Group& group, const int64_t* out_table, int out_dtype, bool out_aligned,
                 const TiesRules& rules, const TiesSum& sum, float* energy, int32_t* counts);
int64_t ties_tiles(int64_t m, int64_t n);

// energy [P, tiles] float: sum of delta^2; counts [P, tiles, 2] int32: non-finite entries, and where there are none the
// key of the largest; tiles = measure_tiles(m, n)
void measure(const Launch& launch, const Group& group, float* energy, int32_t* counts);
int64_t measure_tiles(int64_t m, int64_t n);

// Eigenpairs of `count` symmetric matrices [n, n] float64, n up to eigh_max_size(device); rows and matrices of `a`
// these many entries apart.
//   theta [count, n], smallest first   vectors [count, n, n], a column each
//   error [count]: the largest entry of |V.T V - 1| and of |A V - V theta| / |A|
void eigh(const Launch& launch, const double* a, int64_t row_stride, int64_t stride, int64_t count, int64_t n,
          double* theta, double* vectors, double* error);
int eigh_max_size(int device);

// The panels w [P, n, 8], their columns made orthonormal and orthogonal to those of the basis [P, n, columns] (rows, on
// 16 bytes each, and pairs these many entries apart; columns a multiple of 4), n up to orthonormalise_max_rows(device):
// w = q below, up to rounding, with q [P, n, 8] and below [P, 8, 8]. noise [n, 8], times level times scale [P] (1 where
// that is 0), fills directions that are not there.
void orthonormalise(const Launch& launch, const float* w, const float* basis, int64_t row_stride, int64_t stride,
                    int64_t pairs, int64_t n, int64_t columns, const double* noise, const double* scale, double level,
                    float* q, double* below);
int orthonormalise_max_rows(int device);

// One step of block Lanczos, after w [P, n, 8] = G times the newest 8 of `columns` columns of the basis: the last 8
// rows and columns of t [P, room, room] = Q.T G Q, symmetric; the next block, behind those columns; and `below` as
// above, of w without its projection on them. The scale is t's largest diagonal entry.
void expand(const Launch& launch, const float* w, float* basis, int64_t row_stride, int64_t stride, int64_t pairs,
            int64_t n, int64_t columns, const double* noise, double level, double* t, int64_t room, double* below);

}  // namespace lors
