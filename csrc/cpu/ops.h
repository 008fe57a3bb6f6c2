// What the CPU backend computes. Every pointer's shape stands behind it; sizes are in elements.
#pragma once

#include <cstdint>

#include "../common/views.h"

namespace lors {

// z = delta.T @ (delta @ x), or delta @ (delta.T @ x) when `transposed`.
void gram_apply(const Matrix& base, const Matrix& tuned, bool transposed,
                const float* x,  // [n, width] with n = cols, or rows when transposed
                int64_t width,
                float* z,  // [n, width]
                int threads);

// The k-th largest |delta - L|, exactly. Non-finite residuals are counted, never selected from.
struct Selection {
    Threshold threshold;
    int64_t non_finite;
};
Selection residual_threshold(const Matrix& base, const Matrix& tuned, const LowRank& low_rank, int64_t k, int threads);

// out += sum_t weight[t] * (L_t + keep_t(delta_t - L_t)), experts added in order in float32, one rounding to out's
// dtype.
struct UpdateStats {
    double delta_energy;     // sum of delta^2
    double residual_energy;  // sum of (delta - L)^2
    double kept_energy;      // sum of the kept (delta - L)^2
    int64_t kept;            // entries kept
    int64_t non_finite;      // entries of delta that are NaN or infinite
};
struct Expert {
    Matrix tuned;
    LowRank low_rank;
    Threshold threshold;
    float weight;
};
void merge_update(const Matrix& out, const Matrix& base, const Expert* experts, int64_t count,
                  UpdateStats* stats,  // [count]
                  int threads);

// out = scale * base + update, added in float32, with one rounding to out's dtype: the end of a merge. A matrix without
// data is one of zeros. Returns the largest |scale * base + update| before that rounding, NaN where there is one.
float apply_update(const Matrix& out, const Matrix& base, const Matrix& update, double scale, int threads);

// Which entries of one expert's delta survive: those that `low` selects and `high` does not, each with probability
// limit / 2^32 by the random numbers of `key`; survivors are multiplied by `factor`.
struct Keep {
    Threshold low, high;
    uint64_t key, limit;
    float factor;
};
struct KeepStats {
    double delta_energy;  // sum of delta^2
    double kept_energy;   // sum of the kept delta^2
    double delta_sum;     // sum of |delta|
    double kept_sum;      // sum of the kept |delta|
    int64_t kept;
    int64_t non_finite;  // entries of delta that are NaN or infinite
};
struct TiesExpert {
    Matrix tuned;
    Keep keep;
    float weight;
};
struct Consensus {
    bool elect;      // sum only the values with the sign of their sum
    bool normalize;  // divide by the sum of the weights that went in
    float scale;
    float divisor;  // of the sum when there is no election
};
// out += scale * consensus_t(weight[t] * factor[t] * keep_t(delta_t)). A null `out` leaves only the account. `start` is
// the row-major index of the first entry in its tensor: thresholds and random numbers count from there.
void ties_update(const Matrix& out, const Matrix& base, const TiesExpert* experts, int64_t count, const Consensus& rule,
                 int64_t start,
                 KeepStats* stats,  // [count]
                 int threads);

// L = left @ right.T, the truncated SVD of delta, with a certificate of its accuracy.
enum class SvdMethod : int { kKrylov = 0, kKrylovDouble = 1, kNotConverged = 2 };
struct SvdResult {
    SvdMethod method;
    int passes;       // products with delta.T @ delta
    double residual;  // bound on ||L - exact L|| / ||L||; on the excess of ||delta - L||^2 where L is not unique
    bool unique;      // false: singular values agree across the cut
    double energy;    // sum of delta^2
    int64_t non_finite;
    int64_t overflows;  // entries of `left` that float32 cannot hold
};
SvdResult truncated_svd(const Matrix& base, const Matrix& tuned, int64_t rank, uint64_t seed,
                        float* left,   // [rows, rank]: left singular vectors times singular values
                        float* right,  // [cols, rank]: right singular vectors
                        float* sigma,  // [rank]
                        int threads);

// The kept entries of R = delta - L in row-major order: one bit each in `mask`, least significant first, and their
// values. Returns how many there are, -1 when they are more than `capacity`.
int64_t sparse_part(const Matrix& base, const Matrix& tuned, const LowRank& low_rank, const Threshold& threshold,
                    uint8_t* mask,  // [ceil(rows * cols / 8)]
                    float* values,  // [capacity]
                    int64_t capacity);

// out += weight * (L + S), S given by a mask and the values of its set bits, times a scale.
struct Sparse {
    const uint8_t* mask;  // [ceil(size / 8)]
    int64_t size;         // rows * cols
    const void* values;   // [count]
    DType dtype;
    int64_t count;
    float scale;
};
struct SparseStats {
    double energy;       // sum of S^2
    int64_t used;        // set bits; where they are not `count`, nothing was written
    int64_t non_finite;  // entries of L or S that are NaN or infinite
};
SparseStats sparse_update(float* out,           // [rows, cols], contiguous
                          const Matrix& shape,  // its rows and columns
                          const LowRank& low_rank, const Sparse& sparse, float weight);

}  // namespace lors
