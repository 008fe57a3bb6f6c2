// The kernels without Python, for the sanitizers: every operation on awkward shapes in buffers of exactly the needed
// size, on one and on several threads, from several callers at once, against plain loops. Also what another compiler or
// processor (make aarch64) has to pass.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "common/counter_random.h"
#include "common/ordered_key.h"
#include "cpu/eigh_single.h"
#include "cpu/krylov.h"
#include "cpu/ops.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

namespace {

using lors::DType;
using lors::Matrix;

std::atomic<int> failures{0};

void expect(bool ok, const char* what, int64_t m, int64_t n) {
    if (ok) return;
    ++failures;
    std::fprintf(stderr, "FAILED %s at %lld x %lld\n", what, static_cast<long long>(m), static_cast<long long>(n));
}

// A matrix in a heap block that ends with its last element, so that reading past it is seen.
struct Owned {
    Owned(int64_t m, int64_t n, DType dtype, std::mt19937& random) : bytes(m * n * lors::item_size(dtype)) {
        std::normal_distribution<float> normal;
        for (int64_t i = 0; i < m * n; ++i) {
            const float value = normal(random);
            const uint16_t half = dtype == DType::kFloat16 ? lors::float_to_half(value) : lors::float_to_bfloat(value);
            if (dtype == DType::kFloat32) {
                std::memcpy(bytes.data() + 4 * i, &value, 4);
            } else {
                std::memcpy(bytes.data() + 2 * i, &half, 2);
            }
        }
        matrix = {bytes.data(), dtype, m, n, n};
    }
    float at(int64_t i, int64_t j) const {
        switch (matrix.dtype) {
            case DType::kFloat16: return lors::load_one<DType::kFloat16>(matrix.at(i, 0), j);
            case DType::kBFloat16: return lors::load_one<DType::kBFloat16>(matrix.at(i, 0), j);
            default: return lors::load_one<DType::kFloat32>(matrix.at(i, 0), j);
        }
    }
    std::vector<char> bytes;
    Matrix matrix;
};

void check(int64_t m, int64_t n, DType base_type, DType tuned_type, int threads, std::mt19937& random) {
    const Owned base(m, n, base_type, random), tuned(m, n, tuned_type, random);
    std::vector<float> delta(m * n);
    for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) delta[i * n + j] = tuned.at(i, j) - base.at(i, j);
    }

    const int64_t width = 3;
    std::vector<float> x(n * width), z(n * width);
    for (float& value : x) value = std::normal_distribution<float>()(random);
    lors::gram_apply(base.matrix, tuned.matrix, false, x.data(), width, z.data(), threads);
    double energy = 0, wrong = 0;
    for (float value : delta) energy += double{value} * value;
    for (int64_t c = 0; c < width; ++c) {
        std::vector<double> y(m);
        for (int64_t i = 0; i < m; ++i) {
            for (int64_t j = 0; j < n; ++j) y[i] += double{delta[i * n + j]} * x[j * width + c];
        }
        for (int64_t j = 0; j < n; ++j) {
            double sum = 0;
            for (int64_t i = 0; i < m; ++i) sum += delta[i * n + j] * y[i];
            wrong = std::max(wrong, std::fabs(sum - z[j * width + c]));
        }
    }
    expect(wrong <= 1e-5 * energy * std::sqrt(double(n)) + 1e-6, "gram_apply", m, n);

    const int64_t rank = std::min<int64_t>({m, n, 5});
    std::vector<float> left(m * rank), right(n * rank), sigma(rank);
    const lors::SvdResult svd =
        lors::truncated_svd(base.matrix, tuned.matrix, rank, 1, left.data(), right.data(), sigma.data(), threads);
    expect(svd.non_finite == 0, "truncated_svd counts", m, n);
    expect(std::fabs(svd.energy - energy) <= 1e-4 * energy + 1e-9, "truncated_svd energy", m, n);
    double off = 0;  // of L's columns from delta @ right, of right's from each other's perpendicular
    for (int64_t r = 0; r < rank; ++r) {
        for (int64_t i = 0; i < m; ++i) {
            double sum = 0;
            for (int64_t j = 0; j < n; ++j) sum += double{delta[i * n + j]} * right[j * rank + r];
            off = std::max(off, std::fabs(sum - left[i * rank + r]) / sigma[0]);
        }
        for (int64_t s = 0; s < rank; ++s) {
            double sum = 0;
            for (int64_t j = 0; j < n; ++j) sum += double{right[j * rank + r]} * right[j * rank + s];
            off = std::max(off, std::fabs(sum - (r == s)));
        }
    }
    expect(svd.residual <= 1e-5 && off <= 1e-5, "truncated_svd", m, n);
    const lors::LowRank low{left.data(), right.data(), rank};

    for (int64_t k : {int64_t{0}, int64_t{1}, m * n / 3, m * n}) {
        const lors::Selection found = lors::residual_threshold(base.matrix, tuned.matrix, low, k, threads);
        std::vector<float> out(m * n);
        const lors::Expert expert{tuned.matrix, low, found.threshold, 0.5f};
        lors::UpdateStats stats;
        lors::merge_update({out.data(), DType::kFloat32, m, n, n}, base.matrix, &expert, 1, &stats, threads);
        expect(stats.kept == k, "exactly k", m, n);
        std::vector<uint8_t> mask((m * n + 7) / 8);
        std::vector<float> values(k), sum(m * n);
        const lors::Matrix all{sum.data(), DType::kFloat32, m, n, n};
        const int64_t stored =
            lors::sparse_part(base.matrix, tuned.matrix, low, found.threshold, mask.data(), values.data(), k);
        const lors::Sparse part{mask.data(), m * n, values.data(), DType::kFloat32, k, 1.0f};
        const lors::SparseStats added = lors::sparse_update(sum.data(), all, low, part, 0.5f);
        expect(stored == k && added.used == k, "sparse_part and sparse_update count", m, n);
        expect(sum == out, "sparse_update gives the bits of merge_update", m, n);
        expect(std::fabs(stats.delta_energy - energy) <= 1e-4 * energy + 1e-9, "merge_update energy", m, n);
        if (k == m * n) {
            double error = 0;
            for (int64_t i = 0; i < m * n; ++i) error = std::max(error, std::fabs(double{out[i]} - 0.5 * delta[i]));
            expect(error <= 1e-5, "merge_update of everything", m, n);
        }
    }
}

void check_apply_update(int64_t m, int64_t n, DType base_type, DType out_type, int threads, std::mt19937& random) {
    const Owned base(m, n, base_type, random), update(m, n, DType::kFloat32, random), out(m, n, out_type, random);
    const float largest = lors::apply_update(out.matrix, base.matrix, update.matrix, 0.5f, threads);
    const double unit = out_type == DType::kFloat32 ? 0x1p-24 : out_type == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
    double wrong = 0, most = 0;
    for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) {
            const double exact = 0.5 * base.at(i, j) + double{update.at(i, j)};
            wrong = std::max(wrong, std::fabs(out.at(i, j) - exact) - (unit + 0x1p-24) * std::fabs(exact));
            most = std::max(most, std::fabs(exact));
        }
    }
    expect(wrong <= 0x1p-24 && std::fabs(largest - most) <= 1e-6 * most, "apply_update", m, n);
}

void check_ties() {
    const std::vector<float> equal(30 * 40, -0.25f);
    const Matrix tuned{equal.data(), DType::kFloat32, 30, 40, 40}, zeros{nullptr, DType::kFloat32, 30, 40, 40};
    const lors::LowRank none{nullptr, nullptr, 0};
    for (int64_t k = 1; k <= 1200; k += 37) {
        const lors::Threshold t = lors::residual_threshold(zeros, tuned, none, k, 2).threshold;
        expect(t.value == 0.25f && t.ties == k && (t.cut == k || k == 1200), "ties in row-major order", 30, 40);
    }
}

// Every half and bfloat there is, by the vector unit and by arithmetic on integers; then back from float32, with what
// lies between and beside the representable numbers.
template <DType D>
void check_conversion(const char* what) {
    std::vector<uint16_t> all(1 << 16), back;
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
    std::vector<float> values(all.size()), wide;
    lors::read_row({all.data(), D, 1, 1 << 16, 1 << 16}, 0, 0, 1 << 16, values.data());
    const auto same = [](float a, float b) {
        return std::isnan(a) ? std::isnan(b) : std::memcmp(&a, &b, sizeof a) == 0;  // a NaN may become quiet
    };
    for (int64_t i = 0; i < 1 << 16; ++i) {
        if (!same(values[i], lors::load_one<D>(all.data(), i))) return expect(false, what, i, 0);
    }
    const float infinity = std::numeric_limits<float>::infinity();
    for (float value : values) {
        for (float near : {value, std::nextafter(value, infinity), std::nextafter(value, -infinity),
                           value * 1.00024414f, value * 1.00195312f, value * 1.00048828f}) {
            wide.push_back(near);
        }
    }
    back.resize(wide.size());
    const int64_t size = static_cast<int64_t>(wide.size());
    lors::write_row({back.data(), D, 1, size, size}, 0, 0, size, wide.data());
    for (int64_t i = 0; i < size; ++i) {
        const uint16_t one = D == DType::kFloat16 ? lors::float_to_half(wide[i]) : lors::float_to_bfloat(wide[i]);
        if (!same(lors::load_one<D>(&one, 0), lors::load_one<D>(back.data(), i))) return expect(false, what, i, 1);
    }
}

// Diagonal matrices whose values are copies, nearly copies, or of very different size: blocks that widen, pairs held
// apart in float64, the search in float64. What is certified has to hold.
void check_hard_spectra(int threads) {
    const int64_t n = 96, rank = 5;
    for (int kind = 0; kind < 6; ++kind) {
        std::vector<float> a(n * n), left(n * rank), right(n * rank), sigma(rank);
        for (int64_t i = 0; i < n; ++i) {
            const double x = static_cast<double>(i), spread[] = {0, 1e-7 * x, 1e-4 * x};
            const double value = kind < 3    ? (i < 9 ? 1 - spread[kind] : 0.9 / (x + 1))
                                 : kind == 3 ? 1
                                 : kind == 4 ? std::pow(10.0, -0.8 * x)
                                             : 1 / (1 + std::floor(x / 3));
            a[i * n + i] = static_cast<float>(value);
        }
        const Matrix tuned{a.data(), DType::kFloat32, n, n, n}, zeros{nullptr, DType::kFloat32, n, n, n};
        const lors::SvdResult svd =
            lors::truncated_svd(zeros, tuned, rank, 3, left.data(), right.data(), sigma.data(), threads);
        if (svd.method == lors::SvdMethod::kNotConverged) continue;
        double off = 0, wanted = 0, found = 0;
        for (int64_t r = 0; r < rank; ++r) {
            wanted += double{a[r * n + r]} * a[r * n + r];
            found += double{sigma[r]} * sigma[r];
            off = std::max(off, std::fabs(double{sigma[r]} - a[r * n + r]));
        }
        expect(off <= 2e-6 && std::fabs(found - wanted) <= 2e-6 * wanted, "hard spectrum", n, kind);
        expect(svd.unique == (kind == 1 ? svd.unique : kind == 2 || kind == 4), "unique", n, kind);
    }
}

// Some eigenvectors of many, by inverse iteration: values apart, close, equal, in blocks that do not touch, and none
// but 0.
void check_leading_eigenvectors() {
    const int64_t n = 150, count = 40;
    for (int kind = 0; kind < 6; ++kind) {
        lors::Random random(static_cast<uint64_t>(kind));
        lors::Buffer<double> a(n * n), b(n * n);
        a.zero();
        if (kind == 0) {
            for (int64_t i = 0; i < n * n; ++i) a[i] = a[i % n * n + i / n] = random.next();
        }
        for (int64_t i = 0; i < n && kind && kind < 5; ++i) {
            const double x = static_cast<double>(i),
                         values[] = {0, 1 - 1e-9 * x, x < 25 ? 1 : 1 / x, x < 3 ? 1.0 : 0.0, 1};
            a[i * n + i] = values[kind];
        }
        const int64_t mirrors = kind == 4 ? 0 : 3;  // turn all axes, but not the blocks of one
        for (int64_t mirror = 0; mirror < mirrors; ++mirror) {
            std::vector<double> v(n), p(n);
            double square = 0;
            for (double& x : v) x = random.next(), square += x * x;
            for (int side = 0; side < 2; ++side) {
                for (int64_t i = 0; i < n; ++i) {
                    double dot = 0;
                    for (int64_t j = 0; j < n; ++j)
                        dot += (side ? a[i * n + j] : a[j * n + i]) * v[static_cast<size_t>(j)];
                    for (int64_t j = 0; j < n; ++j)
                        (side ? a[i * n + j] : a[j * n + i]) -= 2 * dot / square * v[static_cast<size_t>(j)];
                }
            }
        }
        std::copy(a.data(), a.data() + n * n, b.data());
        const auto judge = [&](const double* values, const auto* vectors, double exact, double orthogonal) {
            double residual = 0, skew = 0;
            for (int64_t p = 0; p < count; ++p) {
                const auto* v = vectors + p * n;
                for (int64_t i = 0; i < n; ++i) {
                    double sum = -values[p] * v[i];
                    for (int64_t j = 0; j < n; ++j) sum += a[i * n + j] * v[j];
                    residual = std::max(residual, std::fabs(sum));
                }
                for (int64_t q = 0; q <= p; ++q) {
                    double sum = -(p == q);
                    for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(v[i]) * vectors[q * n + i];
                    skew = std::max(skew, std::fabs(sum));
                }
            }
            expect(residual <= exact * (1 + std::fabs(values[0])), "eigenvectors", n, kind);
            expect(skew <= orthogonal, "orthogonal eigenvectors", n, kind);
        };
        const lors::Eigen found = lors::eigh_leading(b.data(), n, count);
        judge(found.values.data(), found.vectors.data(), 1e-13, 1e-9);
        std::vector<float> single(a.data(), a.data() + n * n), vectors(count * n);
        std::vector<double> values(n);
        lors::eigh_single(single.data(), n, count, values.data(), vectors.data());
        judge(values.data(), vectors.data(), 2e-6, 2e-6);
    }
    for (int64_t small : {1, 2, 15, 16, 17, 33}) {
        std::vector<float> ones(small * small, 1), vectors(small * small);
        std::vector<double> values(small);
        lors::eigh_single(ones.data(), small, small, values.data(), vectors.data());
        expect(std::fabs(values[0] - static_cast<double>(small)) <= 1e-5, "values of ones", small, small);
    }
}

// The next Ritz value lies below the next eigenvalue; what bounds that from above must not, however early it is asked
// for. And two random vectors show no third copy.
void check_spectrum() {
    const int64_t n = 83, np = lors::padded(n);
    std::vector<float> a(n * np);
    int known = 0, low = 0;
    for (uint64_t seed = 0; seed < 20; ++seed) {
        for (int64_t i = 0; i < n; ++i) {
            const double x = static_cast<double>(i), eigenvalue = i < 3 ? 1 - 0.1 * x : 0.5 - 1e-3 * (x - 3);
            a[i * np + i] = static_cast<float>(std::sqrt(eigenvalue));
        }
        const lors::PackedRows rows{a.data(), n, n};
        lors::Krylov<double> krylov(rows, 2, 40, seed, 1);
        while (krylov.passes() < 18) {
            krylov.expand();
            if (krylov.passes() < 6) continue;
            const lors::Spectrum s = krylov.spectrum();
            const auto cut = s.cut(3);
            known += cut.has_value();
            low += cut && s.theta[3] < 0.4999;
            expect(!cut || cut->upper >= 0.5 - 1e-7, "beyond the cut", n, krylov.passes());
        }
        a[np + 1] = a[2 * np + 2] = a[0];
        lors::Krylov<double> copies(rows, 2, 64, seed, 1);
        while (copies.passes() < 24) copies.expand();
        expect(copies.spectrum().rho[1] < 1e-6 && !copies.spectrum().cut(2), "a third copy", n, copies.passes());
        expect(copies.widen(), "widen", n, copies.passes());
    }
    expect(known > 100 && low > 30, "not trivial", known, low);
}

// Three experts, entries dropped at random, signs elected, weights normalised: entry by entry.
void check_ties_update(int64_t m, int64_t n, int threads, std::mt19937& random) {
    const Owned base(m, n, DType::kFloat16, random);
    std::vector<Owned> owned;
    std::vector<lors::TiesExpert> experts;
    const lors::Threshold everything{0.0f, 0, m * n}, nothing{std::numeric_limits<float>::infinity(), 0, 0};
    for (uint64_t t = 0; t < 3; ++t) {
        owned.emplace_back(m, n, DType::kBFloat16, random);
        const uint64_t limit = t == 2 ? lors::kAlways : lors::kAlways / 4 * (t + 1);
        experts.push_back({owned[t].matrix, {everything, nothing, 17 * t + 3, limit, 2.0f}, 0.5f + t});
    }
    std::vector<float> out(m * n, 1.0f);
    std::vector<lors::KeepStats> stats(3);
    lors::ties_update({out.data(), DType::kFloat32, m, n, n}, base.matrix, experts.data(), 3, {true, true, 0.5f, 1.0f},
                      0, stats.data(), threads);
    int64_t kept[3] = {};
    double wrong = 0;
    for (int64_t i = 0; i < m * n; ++i) {
        double values[3], total = 0, sum = 0, weights = 0;
        for (int64_t t = 0; t < 3; ++t) {
            const lors::TiesExpert& e = experts[t];
            const bool drawn = lors::random_bits(e.keep.key, i) < e.keep.limit;
            kept[t] += drawn;
            values[t] = drawn ? 2.0 * e.weight * (owned[t].at(i / n, i % n) - base.at(i / n, i % n)) : 0;
            total += values[t];
        }
        for (int64_t t = 0; t < 3; ++t) {
            if (values[t] == 0 || (values[t] > 0) != (total >= 0)) continue;
            sum += values[t];
            weights += experts[t].weight;
        }
        wrong = std::max(wrong, std::fabs(1 + 0.5 * (weights > 0 ? sum / weights : 0) - out[i]));
    }
    expect(wrong <= 1e-5, "ties_update", m, n);
    for (int64_t t = 0; t < 3; ++t)
        expect(stats[t].kept == kept[t] && !stats[t].non_finite, "ties_update counts", m, n);
}

}  // namespace

int main() {
    check_conversion<DType::kFloat16>("float16");
    check_conversion<DType::kBFloat16>("bfloat16");
    std::mt19937 random(7);
    const std::pair<int64_t, int64_t> shapes[] = {{1, 1},   {1, 50},   {50, 1},   {2, 3},    {15, 17},
                                                  {16, 16}, {33, 129}, {129, 33}, {300, 64}, {64, 300}};
    const DType types[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
    int step = 0;
    for (const auto& [m, n] : shapes) {
        for (int threads : {1, 3}) {
            check(m, n, types[step % 3], types[step / 3 % 3], threads, random), ++step;
            check_ties_update(m, n, threads, random);
            check_apply_update(m, n, types[step % 3], types[step / 3 % 3], threads, random);
        }
    }
    check_ties();
    for (int threads : {1, 3}) check_hard_spectra(threads);
    check_spectrum();
    check_leading_eigenvectors();
    std::vector<std::thread> callers;  // the pool serves one caller at a time; the others work alone
    std::vector<std::mt19937> generators(4, random);
    for (std::mt19937& generator : generators) {
        callers.emplace_back([&generator] { check(200, 90, DType::kFloat32, DType::kFloat32, 2, generator); });
    }
    for (std::thread& caller : callers) caller.join();
    std::printf("native tests (%s): %d failures\n", lors::kIsa, failures.load());
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
