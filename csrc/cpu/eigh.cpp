#include "eigh.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "simd.h"

namespace lors {
namespace {

// a becomes Q.T a Q = tridiag(diagonal, off); reflector k is kept in row k of a, columns k+1.., its scale in beta[k].
void tridiagonalise(double* a, int64_t n, double* diagonal, double* off, double* beta) {
    std::vector<double> p(static_cast<size_t>(n));
    for (int64_t k = 0; k + 2 < n; ++k) {
        double* v = a + k * n;  // row k = column k by symmetry
        double tail = 0;
        for (int64_t j = k + 2; j < n; ++j) tail += v[j] * v[j];
        const double alpha = v[k + 1];
        beta[k] = 0;
        off[k] = alpha;
        if (tail == 0) continue;
        const double norm = std::sqrt(alpha * alpha + tail);
        const double head = alpha > 0 ? alpha + norm : alpha - norm;
        off[k] = alpha > 0 ? -norm : norm;
        for (int64_t j = k + 2; j < n; ++j) v[j] /= head;
        v[k + 1] = 1;
        beta[k] = 2 / (1 + tail / (head * head));
        double overlap = 0;
        for (int64_t i = k + 1; i < n; ++i) {
            const double* row = a + i * n;
            double sum = 0;
            for (int64_t j = k + 1; j < n; ++j) sum += row[j] * v[j];
            p[static_cast<size_t>(i)] = beta[k] * sum;
            overlap += p[static_cast<size_t>(i)] * v[i];
        }
        for (int64_t i = k + 1; i < n; ++i) p[static_cast<size_t>(i)] -= 0.5 * beta[k] * overlap * v[i];
        for (int64_t i = k + 1; i < n; ++i) {
            double* row = a + i * n;
            const double vi = v[i], pi = p[static_cast<size_t>(i)];
            const double* pj = p.data();
            LORS_NO_OVERLAP
            for (int64_t j = k + 1; j < n; ++j) row[j] -= vi * pj[j] + pi * v[j];
        }
    }
    for (int64_t k = 0; k < n; ++k) diagonal[k] = a[k * n + k];
    if (n >= 2) off[n - 2] = a[(n - 2) * n + n - 1];
}

// Diagonalises the tridiagonal matrix; row i of z [n, n] (identity on entry) collects the rotations of eigenvector i.
void implicit_qr(double* d, double* e, int64_t n, double* z) {
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
            double *zk = z + k * n, *zn = zk + n;
            LORS_NO_OVERLAP
            for (int64_t j = 0; j < n; ++j) {
                const double t = zk[j];
                zk[j] = c * t + s * zn[j];
                zn[j] = c * zn[j] - s * t;
            }
        }
    }
}

// The `count` largest eigenvalues of a tridiagonal matrix by bisection, one Sturm sequence per vector lane.
void largest_values(const double* d, const double* e, int64_t n, int64_t count, double* values) {
    typedef int64_t Mask __attribute__((vector_size(kVectorBytes)));
    constexpr int lanes = kLanes<double>;
    double low = d[0], high = d[0];
    for (int64_t k = 0; k < n; ++k) {  // Gershgorin
        const double radius = (k ? std::fabs(e[k - 1]) : 0) + (k + 1 < n ? std::fabs(e[k]) : 0);
        low = std::min(low, d[k] - radius);
        high = std::max(high, d[k] + radius);
    }
    const double eps = std::numeric_limits<double>::epsilon();
    const double scale = std::max(std::fabs(low), std::fabs(high)), tiny = scale * 1e-290 + 1e-300;
    for (int64_t first = 0; first < count; first += lanes) {
        Vec<double> lower = splat(low - eps * scale), upper = splat(high + eps * scale);
        Mask wanted;  // lane i looks for the point above which exactly `wanted` eigenvalues lie
        for (int i = 0; i < lanes; ++i) wanted[i] = std::min(first + i, count - 1);
        for (int step = 0; step < 64; ++step) {
            const Vec<double> x = (lower + upper) * 0.5;
            Vec<double> q = splat(1.0);
            Mask above = {};
            for (int64_t k = 0; k < n; ++k) {
                const double off2 = k ? e[k - 1] * e[k - 1] : 0;
                q = d[k] - x - off2 / q;
                const Mask zero = (q < tiny) & (q > -tiny);
                q = zero ? splat(-tiny) : q;
                above -= q > 0.0;
            }
            lower = above > wanted ? x : lower;
            upper = above > wanted ? upper : x;
        }
        for (int i = 0; i < lanes && first + i < count; ++i) values[first + i] = 0.5 * (lower[i] + upper[i]);
    }
}

// Solves (T - shift) x = x in place, T tridiagonal, by Gaussian elimination with row exchanges.
class ShiftedSolver {
  public:
    explicit ShiftedSolver(int64_t n) : n_(n), u0_(n), u1_(n), u2_(n), l_(n), swapped_(n) {}

    void factor(const double* d, const double* e, double shift, double tiny) {
        double diagonal = d[0] - shift, above = n_ > 1 ? e[0] : 0;
        for (int64_t k = 0; k + 1 < n_; ++k) {
            const double next = d[k + 1] - shift, next_above = k + 2 < n_ ? e[k + 1] : 0;
            swapped_[k] = std::fabs(e[k]) > std::fabs(diagonal);
            if (swapped_[k]) {
                u0_[k] = e[k], u1_[k] = next, u2_[k] = next_above;
                l_[k] = diagonal / e[k];
                diagonal = above - l_[k] * next;
                above = -l_[k] * next_above;
            } else {
                if (std::fabs(diagonal) < tiny) diagonal = tiny;
                u0_[k] = diagonal, u1_[k] = above, u2_[k] = 0;
                l_[k] = e[k] / diagonal;
                diagonal = next - l_[k] * above;
                above = next_above;
            }
        }
        u0_[n_ - 1] = std::fabs(diagonal) < tiny ? tiny : diagonal;
        u1_[n_ - 1] = u2_[n_ - 1] = 0;
    }

    void solve(double* x) const {
        for (int64_t k = 0; k + 1 < n_; ++k) {
            if (swapped_[k]) std::swap(x[k], x[k + 1]);
            x[k + 1] -= l_[k] * x[k];
        }
        for (int64_t k = n_ - 1; k >= 0; --k) {
            double sum = x[k];
            if (k + 1 < n_) sum -= u1_[k] * x[k + 1];
            if (k + 2 < n_) sum -= u2_[k] * x[k + 2];
            x[k] = sum / u0_[k];
        }
    }

  private:
    int64_t n_;
    Buffer<double> u0_, u1_, u2_, l_;
    Buffer<char> swapped_;
};

// Eigenvectors [count, n] of given eigenvalues by inverse iteration, each kept orthogonal to the ones before. False
// when one does not come out as it should (tight clusters); then the caller takes the slower, unfailing way.
bool inverse_iteration(const double* d, const double* e, int64_t n, const double* values, int64_t count,
                       double* vectors) {
    double scale = 0;
    for (int64_t k = 0; k < n; ++k) scale = std::max(scale, std::fabs(d[k]) + (k + 1 < n ? std::fabs(e[k]) : 0));
    if (scale == 0) return false;
    const double eps = std::numeric_limits<double>::epsilon();
    ShiftedSolver solver(n);
    uint32_t state = 1;
    for (int64_t i = 0; i < count; ++i) {
        double* x = vectors + i * n;
        for (int64_t k = 0; k < n; ++k) {
            state = state * 1664525u + 1013904223u;
            x[k] = 0.5 + static_cast<double>(state >> 8) * 0x1p-24;
        }
        solver.factor(d, e, values[i], eps * scale);
        bool converged = false;
        for (int step = 0; step < 5 && !converged; ++step) {
            solver.solve(x);
            double norm = 0;
            for (int pass = 0; pass < 2; ++pass) {
                for (int64_t j = 0; j < i; ++j) {
                    const double* y = vectors + j * n;
                    double overlap = 0;
                    for (int64_t k = 0; k < n; ++k) overlap += x[k] * y[k];
                    for (int64_t k = 0; k < n; ++k) x[k] -= overlap * y[k];
                }
                norm = 0;
                for (int64_t k = 0; k < n; ++k) norm += x[k] * x[k];
                norm = std::sqrt(norm);
                if (!(norm > 0) || !(norm < 1e300)) return false;
                for (int64_t k = 0; k < n; ++k) x[k] /= norm;
            }
            double residual = 0;
            for (int64_t k = 0; k < n; ++k) {
                const double tx = d[k] * x[k] + (k ? e[k - 1] * x[k - 1] : 0) + (k + 1 < n ? e[k] * x[k + 1] : 0);
                residual = std::max(residual, std::fabs(tx - values[i] * x[k]));
            }
            converged = step > 0 && residual <= 32 * eps * scale;
        }
        if (!converged) return false;
    }
    return true;
}

// vector = Q vector, the reflections of tridiagonalise undone, last first.
void back_transform(const double* a, const double* beta, int64_t n, double* vector) {
    for (int64_t k = n - 3; k >= 0; --k) {
        const double* v = a + k * n;
        double sum = 0;
        for (int64_t j = k + 1; j < n; ++j) sum += v[j] * vector[j];
        for (int64_t j = k + 1; j < n; ++j) vector[j] -= beta[k] * sum * v[j];
    }
}

}  // namespace

Eigen eigh(double* a, int64_t n, int64_t wanted, int64_t values) {
    Buffer<double> d(n), e(n), beta(n);
    e.zero();
    beta.zero();
    tridiagonalise(a, n, d.data(), e.data(), beta.data());
    Eigen result;
    result.values.allocate(values);
    result.vectors.allocate(wanted * n);
    bool found = false;
    if (values * 4 <= n) {  // few of many: do not rotate all n vectors
        largest_values(d.data(), e.data(), n, values, result.values.data());
        found = inverse_iteration(d.data(), e.data(), n, result.values.data(), wanted, result.vectors.data());
    }
    if (!found) {
        Buffer<double> z(n * n);
        z.zero();
        for (int64_t i = 0; i < n; ++i) z[i * n + i] = 1;
        implicit_qr(d.data(), e.data(), n, z.data());
        std::vector<int64_t> order(static_cast<size_t>(n));
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return d[i] > d[j]; });
        for (int64_t i = 0; i < values; ++i) result.values[i] = d[order[static_cast<size_t>(i)]];
        for (int64_t i = 0; i < wanted; ++i) {
            const double* row = z.data() + order[static_cast<size_t>(i)] * n;
            std::copy(row, row + n, result.vectors.data() + i * n);
        }
    }
    for (int64_t i = 0; i < wanted; ++i) back_transform(a, beta.data(), n, result.vectors.data() + i * n);
    return result;
}

}  // namespace lors
