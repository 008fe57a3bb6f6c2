#include "eigh.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <vector>

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
#pragma GCC ivdep
            for (int64_t j = k + 1; j < n; ++j) sum += row[j] * v[j];
            p[static_cast<size_t>(i)] = beta[k] * sum;
            overlap += p[static_cast<size_t>(i)] * v[i];
        }
        for (int64_t i = k + 1; i < n; ++i) p[static_cast<size_t>(i)] -= 0.5 * beta[k] * overlap * v[i];
        for (int64_t i = k + 1; i < n; ++i) {
            double* row = a + i * n;
            const double vi = v[i], pi = p[static_cast<size_t>(i)];
            const double* pj = p.data();
#pragma GCC ivdep
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
        const double root = std::hypot(half, e[high - 1]);
        const double shift = d[high] - e[high - 1] * (e[high - 1] / (half + (half >= 0 ? root : -root)));
        double x = d[low] - shift, bulge = e[low];
        for (int64_t k = low; k < high; ++k) {
            const double r = std::hypot(x, bulge);
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
#pragma GCC ivdep
            for (int64_t j = 0; j < n; ++j) {
                const double t = zk[j];
                zk[j] = c * t + s * zn[j];
                zn[j] = c * zn[j] - s * t;
            }
        }
    }
}

}  // namespace

Eigen eigh(double* a, int64_t n, int64_t wanted) {
    Buffer<double> d(n), e(n), beta(n), z(n * n);
    e.zero();
    beta.zero();
    z.zero();
    for (int64_t i = 0; i < n; ++i) z[i * n + i] = 1;
    tridiagonalise(a, n, d.data(), e.data(), beta.data());
    implicit_qr(d.data(), e.data(), n, z.data());

    std::vector<int64_t> order(static_cast<size_t>(n));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return d[i] > d[j]; });
    Eigen result;
    result.values.allocate(n);
    result.vectors.allocate(wanted * n);
    for (int64_t i = 0; i < n; ++i) result.values[i] = d[order[static_cast<size_t>(i)]];
    for (int64_t i = 0; i < wanted; ++i) {
        double* vector = result.vectors.data() + i * n;
        const double* row = z.data() + order[static_cast<size_t>(i)] * n;
        std::copy(row, row + n, vector);
        for (int64_t k = n - 3; k >= 0; --k) {  // undo the reflections, last first
            const double* v = a + k * n;
            double sum = 0;
            for (int64_t j = k + 1; j < n; ++j) sum += v[j] * vector[j];
            for (int64_t j = k + 1; j < n; ++j) vector[j] -= beta[k] * sum * v[j];
        }
    }
    return result;
}

}  // namespace lors
