#include "eigh_single.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "../common/counter_random.h"
#include "buffer.h"
#include "eigh.h"
#include "simd.h"

namespace lors {
namespace {

using Floats = Vec<float>;
using Doubles = Vec<double>;
constexpr int64_t kStep = kLanes<float>;

// --- A = Q T Q.T ----------------------------------------------------------------------------------------------------

// The lower triangle of a symmetric matrix, row after row, each to the end of its block of kPad x kPad on the diagonal:
// half of the matrix, which a cache may hold where it does not hold the whole, and no row has a tail.
class Triangle {
  public:
    explicit Triangle(int64_t n) : entries_(start(padded(n))) {}
    float* row(int64_t i) { return entries_.data() + start(i); }
    const float* row(int64_t i) const { return entries_.data() + start(i); }
    static int64_t width(int64_t i) { return i / kPad * kPad + kPad; }

  private:
    static int64_t start(int64_t i) {
        const int64_t block = i / kPad;
        return kPad * kPad * (block * (block + 1) / 2) + i % kPad * width(i);
    }
    Buffer<float> entries_;
};

// What four rows from i on, and they as columns, add to y = A v.
void multiply_rows(const Triangle& a, int64_t i, const float* v, float* y) {
    constexpr int kRows = 4;
    Floats vi[kRows], sums[kRows] = {};
    const float* rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = a.row(i + r), vi[r] = splat(v[i + r]);
    const int64_t width = Triangle::width(i);
    int64_t j = 0;
    for (; j < width - kPad; j += kStep) {
        const Floats vj = load(v + j);
        Floats yj = load(y + j);
        for (int r = 0; r < kRows; ++r) {
            Floats row = load(rows[r] + j);
            keep_in_register(row);
            sums[r] = multiply_add(row, vj, sums[r]);
            yj = multiply_add(row, vi[r], yj);
        }
        store(y + j, yj);
    }
    for (; j < width; j += kStep) {  // the block on the diagonal, whose columns are its rows
        const Floats vj = load(v + j);
        for (int r = 0; r < kRows; ++r) sums[r] = multiply_add(load(rows[r] + j), vj, sums[r]);
    }
    float totals[kRows];
    sum_lanes(sums, totals);
    for (int r = 0; r < kRows; ++r) y[i + r] += totals[r];
}

// Updates that wait: a stands for a - sum_s (u_s p_s.T + p_s u_s.T). Applied many at a time each is rounded at the size
// of their sum, and a alone is rounded at its own: so the rounding of the whole is a fraction of what it is one by one.
class Pending {
  public:
    static constexpr int kMost = 32;

    explicit Pending(int64_t n)
        : stride_(padded(n)), u_(kMost * stride_), p_(kMost * stride_), both_(stride_ * 2 * kMost) {}

    bool full() const { return count_ == kMost; }

    // To row k, of which columns 0 .. k matter.
    void apply_to_row(float* row, int64_t k) const {
        for (int64_t j = 0; j <= k; j += kStep) {
            Floats sum = {};
            for (int s = 0; s < count_; ++s) {
                const float *u = u_.data() + s * stride_, *p = p_.data() + s * stride_;
                sum = multiply_add(splat(u[k]), load(p + j), multiply_add(splat(p[k]), load(u + j), sum));
            }
            store(row + j, load(row + j) - sum);
        }
    }

    // To y = a v, v having k entries.
    void apply_to_product(const float* v, int64_t k, float* y) const {
        float with_u[kMost], with_p[kMost];
        for (int s = 0; s < count_; ++s) {
            const float *u = u_.data() + s * stride_, *p = p_.data() + s * stride_;
            Floats sums[4] = {};
            for (int64_t j = 0; j < k; j += kStep) {
                const Floats vj = load(v + j);
                sums[0] = multiply_add(vj, load(u + j), sums[0]);
                sums[1] = multiply_add(vj, load(p + j), sums[1]);
            }
            float totals[4];
            sum_lanes(sums, totals);
            with_u[s] = totals[0], with_p[s] = totals[1];
        }
        for (int64_t j = 0; j < k; j += kStep) {
            Floats sum = {};
            for (int s = 0; s < count_; ++s) {
                const float *u = u_.data() + s * stride_, *p = p_.data() + s * stride_;
                sum = multiply_add(splat(with_p[s]), load(u + j), multiply_add(splat(with_u[s]), load(p + j), sum));
            }
            store(y + j, load(y + j) - sum);
        }
    }

    // u = v, and p = beta (y - beta / 2 (y . v) v), of k entries; zeros behind them.
    void add(const float* v, const float* y, float beta, int64_t k) {
        float *u = u_.data() + count_ * stride_, *p = p_.data() + count_ * stride_;
        double overlap = 0;
        for (int64_t j = 0; j < k; ++j) overlap += static_cast<double>(y[j]) * v[j];
        const float part = static_cast<float>(0.5 * beta * overlap);
        for (int64_t j = 0; j < k; ++j) {
            u[j] = v[j];
            p[j] = beta * (y[j] - part * v[j]);
        }
        std::fill(u + k, u + stride_, 0.0f);
        std::fill(p + k, p + stride_, 0.0f);
        float* both = both_.data() + 2 * count_++;
        for (int64_t j = 0; j < stride_; ++j) both[j * 2 * kMost] = u[j], both[j * 2 * kMost + 1] = p[j];
    }

    // To rows 0 .. k - 1; those behind them are reflectors by now.
    void apply(Triangle& a, int64_t k) {
        for (int64_t i = k; i % kRows; ++i) std::fill_n(both_.data() + i * 2 * kMost, 2 * kMost, 0.0f);
        for (int64_t j = 0; j < k; j += 2 * kStep) {
            for (int64_t i = j / kPad * kPad; i < k; i += kRows) {
                if (j + 2 * kStep <= Triangle::width(i)) {
                    apply_to_tile<2>(a, i, j);
                } else {
                    apply_to_tile<1>(a, i, j);
                }
            }
        }
        count_ = 0;
    }

  private:
    static constexpr int kRows = 4;

    template <int kColumns>  // vectors of columns
    void apply_to_tile(Triangle& a, int64_t i, int64_t j) const {
        Floats sums[kRows][kColumns] = {};
        for (int s = 0; s < count_; ++s) {
            Floats u[kColumns], p[kColumns];
            for (int c = 0; c < kColumns; ++c) {
                u[c] = load(u_.data() + s * stride_ + j + c * kStep);
                p[c] = load(p_.data() + s * stride_ + j + c * kStep);
            }
            for (int r = 0; r < kRows; ++r) {
                const float* both = both_.data() + (i + r) * 2 * kMost + 2 * s;
                for (int c = 0; c < kColumns; ++c) {
                    sums[r][c] = multiply_add(splat(both[0]), p[c], multiply_add(splat(both[1]), u[c], sums[r][c]));
                }
            }
        }
        for (int r = 0; r < kRows; ++r) {
            for (int c = 0; c < kColumns; ++c) {
                float* at = a.row(i + r) + j + c * kStep;
                store(at, load(at) - sums[r][c]);
            }
        }
    }

    int64_t stride_;
    int count_ = 0;
    Buffer<float> u_, p_;  // [kMost, stride]
    Buffer<float> both_;   // [stride, kMost, 2]: the same, row by row
};

// x becomes a reflector v with (1 - beta v v.T) x = (0 .. 0, last), v[k - 1] = 1; returns beta. What is no longer than
// `least` counts as 0.
float reflector(float* x, int64_t k, double least, double& last) {
    double tail = 0;
    for (int64_t j = 0; j + 1 < k; ++j) tail += static_cast<double>(x[j]) * x[j];
    if (tail <= least * least) tail = 0;
    const double alpha = x[k - 1];
    last = alpha;
    double head = 0;
    if (tail > 0) {
        const double norm = std::sqrt(alpha * alpha + tail);
        head = alpha > 0 ? alpha + norm : alpha - norm;
        last = alpha > 0 ? -norm : norm;
    }
    const float scale = head != 0 ? static_cast<float>(1 / head) : 0.0f;
    for (int64_t j = 0; j + 1 < k; ++j) x[j] *= scale;
    x[k - 1] = head != 0 ? 1.0f : 0.0f;
    return head != 0 ? static_cast<float>(2 / (1 + tail / (head * head))) : 0.0f;
}

// From the last row to the first. Row k ends as its reflector in columns 0 .. k - 1, zeros behind it.
void tridiagonalise(Triangle& a, int64_t n, double* diagonal, double* off, float* beta) {
    Pending pending(n);
    Buffer<float> y(padded(n));
    double least = 0;  // far below the rounding of the largest entry, far above what has no inverse
    for (int64_t i = 0; i < n; ++i) least = std::max(least, 1e-20 * std::fabs(a.row(i)[i]));
    for (int64_t k = n - 1; k > 0; --k) {
        float* v = a.row(k);
        pending.apply_to_row(v, k);
        diagonal[k] = v[k];
        beta[k] = reflector(v, k, least, off[k - 1]);
        std::fill(v + k, v + Triangle::width(k), 0.0f);
        y.zero();
        for (int64_t i = 0; i < k; i += 4) multiply_rows(a, i, v, y.data());
        pending.apply_to_product(v, k, y.data());
        pending.add(v, y.data(), beta[k], k);
        if (pending.full()) pending.apply(a, k);
    }
    pending.apply(a, 1);
    diagonal[0] = *a.row(0);
}

// --- eigenvectors of T ----------------------------------------------------------------------------------------------

Doubles choose(const decltype(Doubles{} < Doubles{})& condition, Doubles yes, Doubles no) {
    return condition ? yes : no;
}
Doubles magnitude(Doubles x) {
    return choose(x < 0, -x, x);
}

// Solves (T - shift) x = x for as many shifts as a vector has lanes, by elimination with row exchanges; pivots that
// vanish count as `least`.
class Shifted {
  public:
    explicit Shifted(int64_t n) : n_(n), steps_(n) {}

    void factor(const double* d, const double* e, Doubles shift, double least) {
        Doubles diagonal = d[0] - shift, right = splat(n_ > 1 ? e[0] : 0.0);
        for (int64_t i = 0; i + 1 < n_; ++i) {
            Step& step = steps_[i];
            const Doubles below = splat(e[i]), next = d[i + 1] - shift, beyond = splat(i + 2 < n_ ? e[i + 1] : 0.0);
            const auto swap = magnitude(below) > magnitude(diagonal);
            const Doubles kept = choose(magnitude(diagonal) < least, splat(least), diagonal);
            const Doubles pivot = choose(swap, below, kept);
            step.inverse = 1 / pivot;
            step.ratio = choose(swap, diagonal, below) * step.inverse;
            step.first = choose(swap, next, right);
            step.second = choose(swap, beyond, Doubles{});
            step.swap = choose(swap, splat(1.0), Doubles{});
            diagonal = choose(swap, right, next) - step.ratio * step.first;
            right = choose(swap, Doubles{}, beyond) - step.ratio * step.second;
        }
        steps_[n_ - 1].inverse = 1 / choose(magnitude(diagonal) < least, splat(least), diagonal);
    }

    void solve(Doubles* x) const {
        for (int64_t i = 0; i + 1 < n_; ++i) {
            const Step& step = steps_[i];
            const auto swap = step.swap > 0;
            const Doubles upper = choose(swap, x[i + 1], x[i]), lower = choose(swap, x[i], x[i + 1]);
            x[i] = upper;
            x[i + 1] = lower - step.ratio * upper;
        }
        Doubles after = x[n_ - 1] * steps_[n_ - 1].inverse, later = {};
        x[n_ - 1] = after;
        for (int64_t i = n_ - 2; i >= 0; --i) {
            const Step& step = steps_[i];
            x[i] = (x[i] - step.first * after - step.second * later) * step.inverse;
            later = after;
            after = x[i];
        }
    }

  private:
    struct Step {
        Doubles inverse, first, second, ratio, swap;  // the upper factor's three diagonals, the lower one's, exchanged
    };
    int64_t n_;
    Buffer<Step> steps_;
};

double dot(const double* x, const double* y, int64_t n) {
    Doubles sums = {};
    int64_t j = 0;
    for (; j + kLanes<double> <= n; j += kLanes<double>) sums += load(x + j) * load(y + j);
    double total = 0;
    for (int lane = 0; lane < kLanes<double>; ++lane) total += sums[lane];
    for (; j < n; ++j) total += x[j] * y[j];
    return total;
}

// Eigenvectors of T for its first `count` values, as rows of z [count, n]. Those whose values are closer than kNear of
// the largest are made orthogonal; further apart they are to 1e-8.
void tridiagonal_vectors(const double* d, const double* e, int64_t n, const double* values, int64_t count, double* z) {
    constexpr double kNear = 1e-8;
    constexpr int kRounds = 3, kTogether = kLanes<double>;
    const double largest = std::max(std::fabs(values[0]), std::fabs(values[n - 1]));
    const double scale = largest > 0 ? largest : 1, least = std::numeric_limits<double>::epsilon() * scale;
    Buffer<double> start(n);
    Random random(1);
    for (int64_t i = 0; i < n; ++i) start[i] = random.next();
    Shifted shifted(n);
    Buffer<Doubles> x(n);
    int64_t near = 0;  // first of the values close to this one
    double shift = values[0] + 2 * least;
    for (int64_t first = 0; first < count; first += kTogether) {
        const int64_t lanes = std::min<int64_t>(kTogether, count - first);
        Doubles shifts = {};
        for (int64_t c = 0; c < kTogether; ++c) {
            if (c < lanes) shift = std::min(values[first + c], shift - 2 * least);  // equal ones a little apart
            shifts[c] = shift;
            for (int64_t i = 0; i < n; ++i) x[i][c] = start[(i + 7 * (first + c)) % n];
        }
        shifted.factor(d, e, shifts, least);
        int64_t nearest = near;
        for (int round = 0; round < kRounds; ++round) {
            shifted.solve(x.data());
            Doubles squares = {};
            for (int64_t i = 0; i < n; ++i) squares += x[i] * x[i];
            Doubles inverse;
            for (int c = 0; c < kTogether; ++c) inverse[c] = 1 / std::sqrt(squares[c]);
            for (int64_t i = 0; i < n; ++i) x[i] *= inverse;
            nearest = near;
            for (int64_t c = first; c < first + lanes; ++c) {
                while (values[nearest] - values[c] > kNear * scale) ++nearest;
                const bool alone = nearest == c;
                const bool asked = c + 1 < count && values[c] - values[c + 1] <= kNear * scale;  // by the next one
                if (alone && !asked && round + 1 < kRounds) continue;
                double* row = z + c * n;
                for (int64_t i = 0; i < n; ++i) row[i] = x[i][c - first];
                if (alone) continue;
                for (int64_t k = nearest; k < c; ++k) {
                    const double overlap = dot(row, z + k * n, n);
                    for (int64_t i = 0; i < n; ++i) row[i] -= overlap * z[k * n + i];
                }
                const double factor = 1 / std::sqrt(dot(row, row, n));
                for (int64_t i = 0; i < n; ++i) x[i][c - first] = row[i] *= factor;
            }
        }
        near = nearest;
    }
}

// --- back to A ------------------------------------------------------------------------------------------------------

// x becomes Q x for kTogether vectors, rows of `stride` entries.
constexpr int kTogether = 8;
void reflect(const Triangle& a, int64_t n, int64_t stride, const float* beta, float* x) {
    for (int64_t k = 2; k < n; ++k) {
        const float* v = a.row(k);
        Floats sums[kTogether] = {};
        for (int64_t j = 0; j < k; j += kStep) {
            const Floats vj = load(v + j);
            for (int c = 0; c < kTogether; ++c) sums[c] = multiply_add(vj, load(x + c * stride + j), sums[c]);
        }
        float totals[kTogether];
        sum_lanes(sums, totals);
        sum_lanes(sums + 4, totals + 4);
        Floats factors[kTogether];
        for (int c = 0; c < kTogether; ++c) factors[c] = splat(-beta[k] * totals[c]);
        for (int64_t j = 0; j < k; j += kStep) {
            const Floats vj = load(v + j);
            for (int c = 0; c < kTogether; ++c) {
                float* at = x + c * stride + j;
                store(at, multiply_add(factors[c], vj, load(at)));
            }
        }
    }
}

}  // namespace

void eigh_single(const float* a, int64_t n, int64_t count, double* values, float* vectors) {
    constexpr double kTiny = 1e-25;  // of a unit vector: multiplied on, it would be denormal, which is slow
    Triangle lower(n);
    for (int64_t i = 0; i < padded(n); ++i) {
        float* row = lower.row(i);
        for (int64_t j = 0; j < Triangle::width(i); ++j) {
            row[j] = std::max(i, j) < n ? a[std::max(i, j) * n + std::min(i, j)] : 0.0f;
        }
    }
    Buffer<float> beta(n);
    Buffer<double> d(n), e(n), off(n), z(count * n);
    beta.zero();
    e.zero();
    tridiagonalise(lower, n, d.data(), e.data(), beta.data());
    std::copy(d.data(), d.data() + n, values);
    std::copy(e.data(), e.data() + n, off.data());
    tridiagonal_values(values, off.data(), n);
    tridiagonal_vectors(d.data(), e.data(), n, values, count, z.data());
    const int64_t stride = padded(n);
    Buffer<float> x(kTogether * stride);
    for (int64_t first = 0; first < count; first += kTogether) {
        const int64_t some = std::min<int64_t>(kTogether, count - first);
        x.zero();
        for (int64_t c = 0; c < some; ++c) {
            for (int64_t i = 0; i < n; ++i) {
                const double entry = z[(first + c) * n + i];
                x[c * stride + i] = std::fabs(entry) > kTiny ? static_cast<float>(entry) : 0.0f;
            }
        }
        reflect(lower, n, stride, beta.data(), x.data());
        for (int64_t c = 0; c < some; ++c) std::copy_n(&x[c * stride], n, vectors + (first + c) * n);
    }
}

}  // namespace lors
