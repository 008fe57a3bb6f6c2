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

// The norms of the residuals z - theta v, z [width, np] = G v.
inline void add_residuals(Pairs& pairs, const double* z, int64_t n) {
    const int64_t np = padded(n);
    for (int64_t c = 0; c < pairs.count; ++c) {
        const double theta = pairs.theta[static_cast<size_t>(c)];
        double sum = 0;
        for (int64_t j = c * np; j < c * np + n; ++j) {
            const double entry = z[j] - theta * pairs.vectors[j];
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
    Buffer<T> v(pairs.width * np), product(a.rows() * pairs.width);
    Buffer<double> z(pairs.width * np);
    for (int64_t i = 0; i < v.size(); ++i) {
        v[i] = static_cast<T>(pairs.vectors[i]);
        pairs.vectors[i] = static_cast<double>(v[i]);  // as the product sees them
    }
    gram<T>(a, v.data(), pairs.width, z.data(), product.data(), krylov.passes() % 2 == 1, threads);
    pairs.theta.assign(static_cast<size_t>(pairs.width), 0.0);
    for (int64_t i = 0; i < product.size(); ++i) {
        pairs.product[i] = static_cast<double>(product[i]);
        pairs.theta[static_cast<size_t>(i % pairs.width)] += pairs.product[i] * pairs.product[i];
    }
    add_residuals(pairs, z.data(), a.cols());
    for (int64_t p = 0; p < count; ++p) {
        for (int64_t q = 0; q <= p; ++q) {
            const double overlap = dot64(&pairs.vectors[p * np], &pairs.vectors[q * np], np) - (p == q);
            pairs.skew += (p == q ? 1 : 2) * overlap * overlap;
        }
    }
    pairs.skew = std::sqrt(pairs.skew);
    return pairs;
}

// A @ x in float64, x [width, np]; the entries of y [rows, width], row step `step`.
inline void product64(const PackedRows& a, const double* x, int64_t width, double* y, int64_t step, int threads) {
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
            for (int64_t r = 0; r < rows; ++r) std::copy(part + r * W, part + (r + 1) * W, &y[(i + r) * step + first]);
        });
    });
}

// Makes the rows of x [width, np] orthonormal, four at a time, twice against each before.
inline void orthonormalise(double* x, int64_t width, int64_t np) {
    Buffer<double> overlaps(width * 4);
    each_group(width, [&](auto group, int64_t first) {
        constexpr int W = decltype(group)::value;
        double* block = x + first * np;
        for (int round = 0; round < 2; ++round) {
            dots<W>(x, np, first, block, np, np, overlaps.data());
            for (int64_t i = 0; i < first * W; ++i) overlaps[i] = -overlaps[i];
            accumulate<W>(x, np, first, overlaps.data(), block, np);
            for (int64_t p = 0; p < W; ++p) {
                double* v = block + p * np;
                for (int64_t q = 0; q < p; ++q) add_multiple(v, -dot64(v, block + q * np, np), block + q * np, np);
                const double norm = std::sqrt(dot64(v, v, np));
                add_multiple(v, norm > 0 ? 1 / norm - 1 : 0, v, np);
            }
        }
    });
}

// h [width, step] = y.T y for y [rows, step].
inline void overlaps_of(const double* y, int64_t rows, int64_t width, int64_t step, double* h) {
    constexpr int64_t kBlock = 128;  // rows that stay in L2
    Buffer<double> factors(kBlock * 4);
    std::fill(h, h + width * step, 0.0);
    for (int64_t i = 0; i < rows; i += kBlock) {
        const int64_t count = std::min(kBlock, rows - i);
        each_group(width, [&](auto group, int64_t first) {
            constexpr int W = decltype(group)::value;
            for (int64_t r = 0; r < count; ++r) {
                std::copy(&y[(i + r) * step + first], &y[(i + r) * step + first + W], &factors[r * W]);
            }
            accumulate<W>(y + i * step, step, count, factors.data(), h + first * step, step);
        });
    }
}

// The first `count` Ritz vectors after a Rayleigh-Ritz step in float64: what rounding has mixed is sorted out again.
template <class T>
Pairs held_apart(const PackedRows& a, const Krylov<T>& krylov, int64_t count, int threads) {
    const int64_t np = padded(a.cols()), rows = a.rows();
    Pairs pairs(count, rows, np);
    const int64_t width = pairs.width, step = padded(width);
    Buffer<double> x(width * np), y(rows * step), full(width * step), h(count * count), turned(width * step);
    for (Buffer<double>* buffer : {&x, &y, &turned}) buffer->zero();
    krylov.ritz_vectors(count, x.data());
    orthonormalise(x.data(), width, np);
    product64(a, x.data(), width, y.data(), step, threads);
    overlaps_of(y.data(), rows, width, step, full.data());
    for (int64_t p = 0; p < count; ++p) std::copy(&full[p * step], &full[p * step + count], &h[p * count]);
    const Eigen ritz = eigh(h.data(), count);
    pairs.theta.assign(ritz.values.data(), ritz.values.data() + count);
    pairs.turn = kRounding<double> * std::max(0.0, pairs.theta[0]);
    for (int64_t p = 0; p < count; ++p) {
        std::copy(&ritz.vectors[p * count], &ritz.vectors[(p + 1) * count], &turned[p * step]);
    }
    Buffer<double> factors(count * 4), part(rows * 4);
    each_group(width, [&](auto group, int64_t first) {
        constexpr int W = decltype(group)::value;
        columns_of<W>(ritz.vectors.data(), count, count, first, factors.data());
        accumulate<W>(x.data(), np, count, factors.data(), &pairs.vectors[first * np], np);
        dots<W>(y.data(), step, rows, &turned[first * step], step, step, part.data());
        for (int64_t i = 0; i < rows; ++i)
            std::copy(&part[i * W], &part[(i + 1) * W], &pairs.product[i * width + first]);
    });
    Buffer<double> z(width * np);
    const auto formed = [&](auto group, int64_t first, int64_t i, const T*, int64_t held, T* block, auto) {
        constexpr int W = decltype(group)::value;
        for (int64_t k = 0; k < held * W; ++k) {
            block[k] = static_cast<T>(pairs.product[(i + k / W) * width + first + k % W]);
        }
    };
    transposed_product<T>(a, width, z.data(), kChunkRows / 4, true, threads, formed);
    add_residuals(pairs, z.data(), a.cols());
    return pairs;
}

}  // namespace lors
