// Ritz vectors of a Krylov space, and what products with A say of them.
#pragma once

#include <vector>

#include "krylov.h"

namespace lors {

struct Pairs {
    int64_t count, width;            // width: count made even
    Buffer<double> vectors;          // [width, np], orthonormal rows
    Buffer<double> product;          // [rows, width] = A @ vectors.T
    std::vector<double> theta, rho;  // Rayleigh quotients, largest first, and residual norms
    double skew = 0;                 // of the vectors from orthonormal
    double turn = 0;                 // entries that the projection of G on them may have beside its diagonal

    Pairs(int64_t pairs, int64_t rows, int64_t np)
        : count(pairs), width(even(pairs)), vectors(width * np), product(rows * width) {
        vectors.zero();
    }
};

inline double dot64(const double* x, const double* y, int64_t padded_n) {
    Vec<double> sums = {};
    for (int64_t j = 0; j < padded_n; j += kLanes<double>) sums += load(x + j) * load(y + j);
    double total = 0;
    for (int lane = 0; lane < kLanes<double>; ++lane) total += sums[lane];
    return total;
}

inline void add_multiple(double* x, double factor, const double* y, int64_t padded_n) {
    for (int64_t j = 0; j < padded_n; j += kLanes<double>) store(x + j, load(x + j) + factor * load(y + j));
}

// Residuals of the vectors, from a product in T.
template <class T>
void measure_residuals(const PackedRows& a, Pairs& pairs, T* product, int threads) {
    const int64_t np = padded(a.cols());
    Buffer<T> v(pairs.width * np), z(pairs.width * np);
    for (int64_t i = 0; i < v.size(); ++i) v[i] = static_cast<T>(pairs.vectors[i]);
    gram<T>(a, v.data(), pairs.width, z.data(), product, threads);
    if (product) {
        pairs.theta.assign(static_cast<size_t>(pairs.width), 0.0);
        for (int64_t i = 0; i < a.rows() * pairs.width; ++i) {
            pairs.product[i] = static_cast<double>(product[i]);
            pairs.theta[static_cast<size_t>(i % pairs.width)] += pairs.product[i] * pairs.product[i];
        }
    }
    for (int64_t c = 0; c < pairs.count; ++c) {
        const double theta = pairs.theta[static_cast<size_t>(c)];
        double sum = 0;
        for (int64_t j = c * np; j < c * np + a.cols(); ++j) {
            const double entry = static_cast<double>(z[j]) - theta * pairs.vectors[j];
            sum += entry * entry;
        }
        pairs.rho.push_back(std::sqrt(sum));
    }
}

// The first `count` Ritz vectors as they are, with one product in T.
template <class T>
Pairs measured(const PackedRows& a, const Krylov<T>& krylov, int64_t count, int threads) {
    const int64_t np = padded(a.cols());
    Pairs pairs(count, a.rows(), np);
    krylov.ritz_vectors(count, pairs.vectors.data());
    for (int64_t i = 0; i < pairs.vectors.size(); ++i) {  // as the product sees them
        pairs.vectors[i] = static_cast<double>(static_cast<T>(pairs.vectors[i]));
    }
    Buffer<T> product(a.rows() * pairs.width);
    measure_residuals(a, pairs, product.data(), threads);
    for (int64_t p = 0; p < count; ++p) {
        for (int64_t q = 0; q <= p; ++q) {
            const double overlap = dot64(&pairs.vectors[p * np], &pairs.vectors[q * np], np) - (p == q);
            pairs.skew += (p == q ? 1 : 2) * overlap * overlap;
        }
    }
    pairs.skew = std::sqrt(pairs.skew);
    return pairs;
}

// A @ x in float64, x [width, np]; the entries of y [rows, width].
inline void product64(const PackedRows& a, const double* x, int64_t width, double* y, int threads) {
    const int64_t n = padded(a.cols()), block = block_rows<double>(a.cols()), blocks = (a.rows() + block - 1) / block;
    const int workers = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, blocks)));
    Buffer<double> panels(workers * block * n), parts(workers * block * 4);
    parallel_for(blocks, workers, [&](int64_t task, int worker) {
        const int64_t i = task * block, rows = std::min(block, a.rows() - i);
        const double* panel = a.fetch(i, rows, panels.data() + worker * block * n);
        double* part = parts.data() + worker * block * 4;
        each_group(width, [&](auto group, int64_t first) {
            constexpr int W = decltype(group)::value;
            dots<W>(panel, n, rows, x + first * n, n, n, part);
            for (int64_t r = 0; r < rows; ++r) std::copy(part + r * W, part + (r + 1) * W, &y[(i + r) * width + first]);
        });
    });
}

// The first `count` Ritz vectors after a Rayleigh-Ritz step in float64: what rounding has mixed is sorted out again.
template <class T>
Pairs held_apart(const PackedRows& a, const Krylov<T>& krylov, int64_t count, int threads) {
    const int64_t np = padded(a.cols()), rows = a.rows();
    Pairs pairs(count, rows, np);
    const int64_t width = pairs.width;
    Buffer<double> x(width * np), y(rows * width), h(count * count);
    x.zero();
    krylov.ritz_vectors(count, x.data());
    for (int64_t p = 0; p < count; ++p) {
        for (int64_t k = 0; k < 2 * p; ++k) {  // twice against each before
            const double* q = &x[k % p * np];
            add_multiple(&x[p * np], -dot64(&x[p * np], q, np), q, np);
        }
        const double norm = std::sqrt(dot64(&x[p * np], &x[p * np], np));
        add_multiple(&x[p * np], norm > 0 ? 1 / norm - 1 : 0, &x[p * np], np);
    }
    product64(a, x.data(), width, y.data(), threads);
    h.zero();
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t p = 0; p < count; ++p) {
            for (int64_t q = 0; q < count; ++q) h[p * count + q] += y[i * width + p] * y[i * width + q];
        }
    }
    const Eigen ritz = eigh(h.data(), count);
    pairs.theta.assign(ritz.values.data(), ritz.values.data() + count);
    pairs.turn = kRounding<double> * std::max(0.0, pairs.theta[0]);
    pairs.product.zero();
    for (int64_t p = 0; p < count; ++p) {
        const double* turned = &ritz.vectors[p * count];
        for (int64_t q = 0; q < count; ++q) add_multiple(&pairs.vectors[p * np], turned[q], &x[q * np], np);
        for (int64_t i = 0; i < rows; ++i) {
            for (int64_t q = 0; q < count; ++q) pairs.product[i * width + p] += turned[q] * y[i * width + q];
        }
    }
    measure_residuals(a, pairs, static_cast<T*>(nullptr), threads);
    return pairs;
}

}  // namespace lors
