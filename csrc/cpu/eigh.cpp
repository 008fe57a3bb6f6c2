#include "eigh.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "../common/counter_random.h"
#include "simd.h"

namespace lors {
namespace {

double dot(const double* x, const double* y, int64_t n) {
    Vec<double> sums = {};
    int64_t j = 0;
    for (; j + kLanes<double> <= n; j += kLanes<double>) sums += load(x + j) * load(y + j);
    double total = 0;
    for (int lane = 0; lane < kLanes<double>; ++lane) total += sums[lane];
    for (; j < n; ++j) total += x[j] * y[j];
    return total;
}

// Rows of `a` from column `from` on: row[j] -= u[i] p[j] + p[i] u[j], and y[i] = row . v for the R rows from i on.
template <int R>
void update_rows(double* a, int64_t n, int64_t i, int64_t from, const double* u, const double* p, const double* v,
                 double* y) {
    Vec<double> sums[R] = {};
    int64_t j = from;
    for (; j + kLanes<double> <= n; j += kLanes<double>) {
        const Vec<double> uj = load(u + j), pj = load(p + j), vj = load(v + j);
        for (int r = 0; r < R; ++r) {
            double* at = a + (i + r) * n + j;
            const Vec<double> row = load(at) - (splat(u[i + r]) * pj + splat(p[i + r]) * uj);
            store(at, row);
            sums[r] += row * vj;
        }
    }
    for (int r = 0; r < R; ++r) {
        double total = 0;
        for (int lane = 0; lane < kLanes<double>; ++lane) total += sums[r][lane];
        double* row = a + (i + r) * n;
        for (int64_t k = j; k < n; ++k) {
            row[k] -= u[i + r] * p[k] + p[i + r] * u[k];
            total += row[k] * v[k];
        }
        y[i + r] = total;
    }
}

// a becomes Q.T a Q = tridiag(diagonal, off); reflector k is kept in row k of a, columns k+1.., its scale in beta[k].
// What a reflector does to the rest waits for the next one, so that the rest is read once for both.
void tridiagonalise(double* a, int64_t n, double* diagonal, double* off, double* beta) {
    Buffer<double> u(n), p(n), y(n);  // a stands for a - u p.T - p u.T
    for (Buffer<double>* buffer : {&u, &p, &y}) buffer->zero();
    for (int64_t k = 0; k + 2 < n; ++k) {
        double* v = a + k * n;  // row k = column k by symmetry
        for (int64_t j = k; j < n; ++j) v[j] -= u[k] * p[j] + p[k] * u[j];
        diagonal[k] = v[k];
        const double tail = dot(v + k + 2, v + k + 2, n - k - 2);
        const double alpha = v[k + 1];
        off[k] = alpha;
        beta[k] = 0;
        if (tail > 0) {
            const double norm = std::sqrt(alpha * alpha + tail);
            const double head = alpha > 0 ? alpha + norm : alpha - norm;
            off[k] = alpha > 0 ? -norm : norm;
            for (int64_t j = k + 2; j < n; ++j) v[j] /= head;
            v[k + 1] = 1;
            beta[k] = 2 / (1 + tail / (head * head));
        }
        int64_t i = k + 1;
        for (; i + 4 <= n; i += 4) update_rows<4>(a, n, i, k + 1, u.data(), p.data(), v, y.data());
        for (; i < n; ++i) update_rows<1>(a, n, i, k + 1, u.data(), p.data(), v, y.data());
        double overlap = 0;
        for (int64_t j = k + 1; j < n; ++j) overlap += y[j] * v[j];
        for (int64_t j = k + 1; j < n; ++j) {
            u[j] = v[j];
            p[j] = beta[k] * (y[j] - 0.5 * beta[k] * overlap * v[j]);
        }
    }
    for (int64_t k = std::max<int64_t>(0, n - 2); k < n; ++k) diagonal[k] = a[k * n + k] - 2 * u[k] * p[k];
    if (n >= 2) off[n - 2] = a[(n - 2) * n + n - 1] - u[n - 2] * p[n - 1] - p[n - 2] * u[n - 1];
}

// Diagonalises the tridiagonal matrix; the rows of z [n, width] are turned with it, so that row i ends as what
// eigenvector i has of the basis vectors whose entries stood in the columns.
void implicit_qr(double* d, double* e, int64_t n, double* z, int64_t width) {
    const double eps = std::numeric_limits<double>::epsilon();
    const auto negligible = [&](int64_t k) { return std::fabs(e[k]) <= eps * (std::fabs(d[k]) + std::fabs(d[k + 1])); };
    int64_t high = n - 1, steps = 0;
    while (high > 0) {
        if (negligible(high - 1) || std::fabs(e[high - 1]) < std::numeric_limits<double>::min()) {
            e[--high] = 0;
            continue;
        }
        if (++steps > 60 * n) throw std::runtime_error("eigh: QR iteration did not converge");
        int64_t low = high - 1;
        while (low > 0 && !negligible(low - 1)) --low;
        const double half = (d[high - 1] - d[high]) / 2;
        const double root = std::sqrt(half * half + e[high - 1] * e[high - 1]);
        const double shift = d[high] - e[high - 1] * (e[high - 1] / (half + (half >= 0 ? root : -root)));
        double x = d[low] - shift, bulge = e[low];
        for (int64_t k = low; k < high; ++k) {
            const double r = std::sqrt(x * x + bulge * bulge);
            const double c = r > 0 ? x / r : 1, s = r > 0 ? bulge / r : 0;
            if (k > low) e[k - 1] = r;
            const double dk = d[k], dn = d[k + 1], ek = e[k];
            d[k] = c * c * dk + 2 * c * s * ek + s * s * dn;
            d[k + 1] = s * s * dk - 2 * c * s * ek + c * c * dn;
            e[k] = c * s * (dn - dk) + (c * c - s * s) * ek;
            if (k + 1 < high) {
                bulge = s * e[k + 1];
                e[k + 1] *= c;
            }
            x = e[k];
            double *zk = z + k * width, *zn = zk + width;
            LORS_NO_OVERLAP
            for (int64_t j = 0; j < width; ++j) {
                const double t = zk[j];
                zk[j] = c * t + s * zn[j];
                zn[j] = c * zn[j] - s * t;
            }
        }
    }
}

// x becomes (1 - beta v v.T) x.
void reflect(const double* v, double beta, int64_t n, double* x) {
    const double factor = beta * dot(v, x, n);
    LORS_NO_OVERLAP
    for (int64_t j = 0; j < n; ++j) x[j] -= factor * v[j];
}

// z [n, entries.size()] = the wanted rows of Q, transposed: column c is Q.T e_entry.
void unit_vectors(const double* a, const double* beta, int64_t n, const std::vector<int64_t>& entries, double* z) {
    const int64_t width = static_cast<int64_t>(entries.size());
    std::vector<double> x(static_cast<size_t>(n));
    for (int64_t c = 0; c < width; ++c) {
        std::fill(x.begin(), x.end(), 0.0);
        x[static_cast<size_t>(entries[static_cast<size_t>(c)])] = 1;
        for (int64_t k = 0; k + 2 < n; ++k) {
            reflect(a + k * n + k + 1, beta[k], n - k - 1, x.data() + k + 1);
        }
        for (int64_t i = 0; i < n; ++i) z[i * width + c] = x[static_cast<size_t>(i)];
    }
}

// Solves (T - value) x = x for a tridiagonal T by elimination with row exchanges; what vanishes counts as `least`.
class Shifted {
  public:
    Shifted(const double* d, const double* e, int64_t n, double value, double least)
        : n_(n), pivot_(n), first_(n), second_(n), factor_(n), swapped_(static_cast<size_t>(n)) {
        double diagonal = d[0] - value, right = n > 1 ? e[0] : 0;
        for (int64_t i = 0; i + 1 < n; ++i) {
            const double below = e[i], next = d[i + 1] - value, beyond = i + 2 < n ? e[i + 1] : 0;
            swapped_[static_cast<size_t>(i)] = std::fabs(below) > std::fabs(diagonal);
            if (swapped_[static_cast<size_t>(i)]) {
                factor_[i] = diagonal / below;
                pivot_[i] = below, first_[i] = next, second_[i] = beyond;
                diagonal = right - factor_[i] * next, right = -factor_[i] * beyond;
            } else {
                if (std::fabs(diagonal) < least) diagonal = least;
                factor_[i] = below / diagonal;
                pivot_[i] = diagonal, first_[i] = right, second_[i] = 0;
                diagonal = next - factor_[i] * right, right = beyond;
            }
        }
        pivot_[n - 1] = std::fabs(diagonal) < least ? least : diagonal;
        for (int64_t i = 0; i < n; ++i) pivot_[i] = 1 / pivot_[i];
    }

    void solve(double* x) const {
        for (int64_t i = 0; i + 1 < n_; ++i) {
            if (swapped_[static_cast<size_t>(i)]) std::swap(x[i], x[i + 1]);
            x[i + 1] -= factor_[i] * x[i];
        }
        double after = 0, later = 0;
        for (int64_t i = n_ - 1; i >= 0; --i) {
            double sum = x[i];
            if (i + 1 < n_) sum -= first_[i] * after + second_[i] * later;
            later = after;
            x[i] = after = sum * pivot_[i];
        }
    }

  private:
    int64_t n_;
    Buffer<double> pivot_, first_, second_, factor_;  // the upper factor's three diagonals, the lower one's
    std::vector<char> swapped_;
};

// Eigenvectors of the tridiagonal matrix for its first `count` values, as rows of z [count, n], by inverse iteration.
// Those whose values differ by less than kNear of the largest are made orthogonal; further apart they are to 1e-9.
void tridiagonal_vectors(const double* d, const double* e, int64_t n, const double* values, int64_t count, double* z) {
    constexpr double kNear = 1e-6;
    constexpr int kRounds = 3;
    const double eps = std::numeric_limits<double>::epsilon();
    const double scale = std::max(std::fabs(values[0]), std::fabs(values[n - 1]));
    const double least = std::max(eps * scale, std::numeric_limits<double>::min());
    int64_t near = 0;  // first of the values close to this one
    double shift = values[0];
    for (int64_t c = 0; c < count; ++c) {
        double* x = z + c * n;
        if (c) shift = std::min(values[c], shift - 2 * least);
        while (values[near] - values[c] > kNear * scale) ++near;
        const Shifted shifted(d, e, n, shift, least);
        Random start(static_cast<uint64_t>(c));
        for (int64_t i = 0; i < n; ++i) x[i] = start.next();
        for (int round = 0; round < kRounds; ++round) {
            shifted.solve(x);
            double largest = 0;
            for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(x[i]));
            for (int64_t i = 0; i < n; ++i) x[i] /= largest;
            for (int64_t k = near; k < c; ++k) {
                const double overlap = dot(x, z + k * n, n);
                for (int64_t i = 0; i < n; ++i) x[i] -= overlap * z[k * n + i];
            }
            const double norm = std::sqrt(dot(x, x, n));
            for (int64_t i = 0; i < n; ++i) x[i] /= norm;
        }
    }
}

}  // namespace

Eigen eigh(double* a, int64_t n, const std::vector<int64_t>& entries) {
    const int64_t width = static_cast<int64_t>(entries.size());
    Buffer<double> d(n), e(n), beta(n), z(n * width);
    e.zero();
    beta.zero();
    tridiagonalise(a, n, d.data(), e.data(), beta.data());
    unit_vectors(a, beta.data(), n, entries, z.data());
    implicit_qr(d.data(), e.data(), n, z.data(), width);
    std::vector<int64_t> order(static_cast<size_t>(n));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return d[i] > d[j]; });
    Eigen result{Buffer<double>(n), Buffer<double>(n * width)};
    for (int64_t i = 0; i < n; ++i) {
        const int64_t from = order[static_cast<size_t>(i)];
        result.values[i] = d[from];
        std::copy(&z[from * width], &z[from * width] + width, &result.vectors[i * width]);
    }
    return result;
}

Eigen eigh_leading(double* a, int64_t n, int64_t count) {
    constexpr int64_t kSmall = 64, kAtOnce = 8;  // eigenvectors that stay in L1
    if (n <= kSmall || 2 * count > n) return eigh(a, n);
    Buffer<double> d(n), e(n), beta(n), values(n), off(n);
    e.zero();
    beta.zero();
    tridiagonalise(a, n, d.data(), e.data(), beta.data());
    std::copy(d.data(), d.data() + n, values.data());
    std::copy(e.data(), e.data() + n, off.data());
    implicit_qr(values.data(), off.data(), n, nullptr, 0);
    std::sort(values.data(), values.data() + n, std::greater<double>());
    Eigen result{std::move(values), Buffer<double>(count * n)};
    double* z = result.vectors.data();
    tridiagonal_vectors(d.data(), e.data(), n, result.values.data(), count, z);
    for (int64_t first = 0; first < count; first += kAtOnce) {
        const int64_t rows = std::min(kAtOnce, count - first);
        for (int64_t k = n - 3; k >= 0; --k) {
            for (int64_t c = first; c < first + rows; ++c)
                reflect(a + k * n + k + 1, beta[k], n - k - 1, z + c * n + k + 1);
        }
    }
    return result;
}

// The QL iteration without square roots of Pal, Walker and Kahan, block by block, from the end whose values are small.
void tridiagonal_values(double* d, double* e, int64_t n) {
    double scale = 0;
    for (int64_t k = 0; k < n; ++k) scale = std::max({scale, std::fabs(d[k]), k + 1 < n ? std::fabs(e[k]) : 0.0});
    const double least = 1e-15 * scale * 1e-15 * scale;
    const auto negligible = [&](int64_t k) { return e[k] <= least; };
    for (int64_t k = 0; k + 1 < n; ++k) e[k] *= e[k];
    int64_t steps = 0;
    for (int64_t first = 0, last; first < n; first = last + 1) {
        last = first;
        while (last + 1 < n && !negligible(last)) ++last;
        if (std::fabs(d[last]) < std::fabs(d[first])) {
            std::reverse(d + first, d + last + 1);
            std::reverse(e + first, e + last);
        }
        for (int64_t low = first; low < last;) {
            int64_t high = low;
            while (high < last && !negligible(high)) ++high;
            if (high == low) {
                ++low;
                continue;
            }
            if (++steps > 60 * n) throw std::runtime_error("eigh: QL iteration did not converge");
            const double root = std::sqrt(e[low]), half = (d[low + 1] - d[low]) / (2 * root);
            const double shift = d[low] - root / (half + std::copysign(std::sqrt(half * half + 1), half));
            double c = 1, s = 0, gamma = d[high] - shift, p = gamma * gamma;
            for (int64_t i = high - 1; i >= low; --i) {
                const double square = e[i], r = p + square, before = c, gamma_before = gamma;
                const double inverse = p > least ? r / p : 0;  // beside c, which would have to be known for 1 / c
                if (i + 1 < high) e[i + 1] = s * r;
                c = p / r;
                s = square / r;
                gamma = c * (d[i] - shift) - s * gamma_before;
                d[i + 1] = gamma_before + (d[i] - gamma);
                p = inverse > 0 ? gamma * gamma * inverse : before * square;
            }
            e[low] = s * p;
            d[low] = shift + gamma;
        }
    }
    std::sort(d, d + n, std::greater<double>());
}

Eigen eigh(double* a, int64_t n) {
    std::vector<int64_t> all(static_cast<size_t>(n));
    std::iota(all.begin(), all.end(), 0);
    return eigh(a, n, all);
}

}  // namespace lors
