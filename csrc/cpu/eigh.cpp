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

double dot(const double* x, const double* y, int64_t n) {
    Vec<double> sums = {};
    int64_t j = 0;
    for (; j + kLanes<double> <= n; j += kLanes<double>) sums += load(x + j) * load(y + j);
    double total = 0;
    for (int lane = 0; lane < kLanes<double>; ++lane) total += sums[lane];
    for (; j < n; ++j) total += x[j] * y[j];
    return total;
}

// a becomes Q.T a Q = tridiag(diagonal, off); reflector k is kept in row k of a, columns k+1.., its scale in beta[k].
void tridiagonalise(double* a, int64_t n, double* diagonal, double* off, double* beta) {
    std::vector<double> p(static_cast<size_t>(n));
    for (int64_t k = 0; k + 2 < n; ++k) {
        double* v = a + k * n;  // row k = column k by symmetry
        const double tail = dot(v + k + 2, v + k + 2, n - k - 2);
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
            p[static_cast<size_t>(i)] = beta[k] * dot(a + i * n + k + 1, v + k + 1, n - k - 1);
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

// z [n, entries.size()] = the wanted rows of Q, transposed: column c is Q.T e_entry.
void unit_vectors(const double* a, const double* beta, int64_t n, const std::vector<int64_t>& entries, double* z) {
    const int64_t width = static_cast<int64_t>(entries.size());
    std::vector<double> x(static_cast<size_t>(n));
    for (int64_t c = 0; c < width; ++c) {
        std::fill(x.begin(), x.end(), 0.0);
        x[static_cast<size_t>(entries[static_cast<size_t>(c)])] = 1;
        for (int64_t k = 0; k + 2 < n; ++k) {
            const double *v = a + k * n + k + 1, factor = beta[k] * dot(v, x.data() + k + 1, n - k - 1);
            double* tail = x.data() + k + 1;
            LORS_NO_OVERLAP
            for (int64_t j = 0; j < n - k - 1; ++j) tail[j] -= factor * v[j];
        }
        for (int64_t i = 0; i < n; ++i) z[i * width + c] = x[static_cast<size_t>(i)];
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

Eigen eigh(double* a, int64_t n) {
    std::vector<int64_t> all(static_cast<size_t>(n));
    std::iota(all.begin(), all.end(), 0);
    return eigh(a, n, all);
}

}  // namespace lors
