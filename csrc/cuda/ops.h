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
};
GramPlan plan_gram(int64_t pairs, int64_t outer, int64_t inner, int item_size, bool vectors, int processors);

// A = delta [outer, inner], or its transpose: partial[p, chunk] = A[chunk].T @ (A[chunk] @ x[p]), to be summed over
// chunks.
//   x [P, inner, b]   y [P, outer, b] = A @ x (may be null unless the plan has per_thread 0)
//   partial [P, chunks, inner, b]
void gram_apply(const Launch& launch, const Group& group, bool transposed, const GramPlan& plan, const float* x,
                int64_t b, float* y, float* partial);

// One histogram pass over digit `pass` of the keys of |delta - L| whose higher digits are prefix[p], then the choice of
// the digit that holds the wanted[p]-th largest key.
//   left [P, m, rank]   right_t [P, rank, n]   counts [P, 2048], zeroed by the caller
//   prefix int32 [P], wanted (rank of the key among those in play), equal, non_finite int64 [P]
void threshold_pass(const Launch& launch, const Group& group, const float* left, const float* right_t, int64_t rank,
                    int pass, int64_t* counts, int32_t* prefix, int64_t* wanted, int64_t* equal, int64_t* non_finite);

// cut[p]: row-major index just behind the ties[p]-th entry whose key is key[p]; counts [P, tie_chunks(m, n)] is
// scratch.
void threshold_cut(const Launch& launch, const Group& group, const float* left, const float* right_t, int64_t rank,
                   const int32_t* key, const int64_t* ties, const int64_t* equal, int64_t* counts, int64_t* cut);
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

// energy [P, tiles] float: sum of delta^2; counts [P, tiles, 2] int32: non-finite entries, key of the largest finite
// one.
void measure(const Launch& launch, const Group& group, float* energy, int32_t* counts);

// Eigenpairs of `count` symmetric matrices [n, n] float64, n up to eigh_max_size(); rows and matrices of `a` these many
// entries apart.
//   theta [count, n], smallest first   vectors [count, n, n], a column each
//   error [count]: the largest entry of |V.T V - 1| and of |A V - V theta| / |A|
void eigh(const Launch& launch, const double* a, int64_t row_stride, int64_t stride, int64_t count, int64_t n,
          double* theta, double* vectors, double* error);
int eigh_max_size();

// The panels w [P, n, 8], their columns made orthonormal and orthogonal to those of the basis [P, n, columns] (rows and
// pairs these many entries apart), n up to orthonormalise_max_rows(): w = q below, up to rounding, with q [P, n, 8] and
// below [P, 8, 8]. noise [n, 8], times level times scale [P] (1 where that is 0), fills directions that are not there.
void orthonormalise(const Launch& launch, const float* w, const float* basis, int64_t row_stride, int64_t stride,
                    int64_t pairs, int64_t n, int64_t columns, const double* noise, const double* scale, double level,
                    float* q, double* below);
int orthonormalise_max_rows();

}  // namespace lors
