// What Python hands over, as the types of cpu/ops.h, and results as tuples. Arguments arrive checked (lors_kernels) as
// addresses and sizes; the interpreter lock is released while C++ works.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/eigh_single.h"
#include "cpu/ops.h"
#include "cpu/peaks.h"
#include "cpu/simd.h"

namespace py = pybind11;

namespace bindings {

using lors::Matrix;
// (address, dtype, rows, cols, row stride); address 0 is a matrix of zeros
using MatrixTuple = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>;
// (left address, right address, rank)
using LowRankTuple = std::tuple<uintptr_t, uintptr_t, int64_t>;
using ThresholdTuple = std::tuple<float, int64_t, int64_t>;
// (low, high, key, limit, factor)
using KeepTuple = std::tuple<ThresholdTuple, ThresholdTuple, uint64_t, uint64_t, float>;
// (elect, normalize, scale, divisor)
using ConsensusTuple = std::tuple<bool, bool, float, float>;

inline Matrix matrix(const MatrixTuple& t) {
    return {reinterpret_cast<const void*>(std::get<0>(t)), static_cast<lors::DType>(std::get<1>(t)), std::get<2>(t),
            std::get<3>(t), std::get<4>(t)};
}

inline lors::LowRank low_rank(const LowRankTuple& t) {
    return {reinterpret_cast<const float*>(std::get<0>(t)), reinterpret_cast<const float*>(std::get<1>(t)),
            std::get<2>(t)};
}

inline lors::Threshold threshold(const ThresholdTuple& t) {
    return {std::get<0>(t), std::get<1>(t), std::get<2>(t)};
}

inline lors::Keep keep(const KeepTuple& t) {
    return {threshold(std::get<0>(t)), threshold(std::get<1>(t)), std::get<2>(t), std::get<3>(t), std::get<4>(t)};
}

inline float* floats(uintptr_t address) {
    return reinterpret_cast<float*>(address);
}

// One of everything per expert, and at least one.
inline void check_count(const char* name, size_t got, size_t experts) {
    if (got == experts && experts > 0) return;
    throw std::invalid_argument(std::string(name) + ": expected one per expert, got " + std::to_string(got) + " for " +
                                std::to_string(experts));
}

inline void gram_apply(const MatrixTuple& base, const MatrixTuple& tuned, bool transposed, uintptr_t x, int64_t width,
                       uintptr_t z, int threads) {
    py::gil_scoped_release release;
    lors::gram_apply(matrix(base), matrix(tuned), transposed, floats(x), width, floats(z), threads);
}

inline auto residual_threshold(const MatrixTuple& base, const MatrixTuple& tuned, const LowRankTuple& factors,
                               int64_t k, int threads) {
    py::gil_scoped_release release;
    const lors::Selection s = lors::residual_threshold(matrix(base), matrix(tuned), low_rank(factors), k, threads);
    return std::make_tuple(s.threshold.value, s.threshold.ties, s.threshold.cut, s.non_finite);
}

inline auto merge_update(const MatrixTuple& out, const MatrixTuple& base, const std::vector<MatrixTuple>& tuned,
                         const std::vector<LowRankTuple>& factors, const std::vector<ThresholdTuple>& thresholds,
                         const std::vector<float>& weights, int threads) {
    check_count("factors", factors.size(), tuned.size());
    check_count("thresholds", thresholds.size(), tuned.size());
    check_count("weights", weights.size(), tuned.size());
    std::vector<lors::UpdateStats> stats(tuned.size());
    {
        py::gil_scoped_release release;
        std::vector<lors::Expert> experts;
        for (size_t t = 0; t < tuned.size(); ++t) {
            experts.push_back({matrix(tuned[t]), low_rank(factors[t]), threshold(thresholds[t]), weights[t]});
        }
        lors::merge_update(matrix(out), matrix(base), experts.data(), static_cast<int64_t>(experts.size()),
                           stats.data(), threads);
    }
    py::list result;
    for (const lors::UpdateStats& s : stats) {
        result.append(py::make_tuple(s.delta_energy, s.residual_energy, s.kept_energy, s.kept, s.non_finite));
    }
    return result;
}

inline float apply_update(const MatrixTuple& out, const MatrixTuple& base, const MatrixTuple& update, double scale,
                          int threads) {
    py::gil_scoped_release release;
    return lors::apply_update(matrix(out), matrix(base), matrix(update), scale, threads);
}

inline auto ties_update(const MatrixTuple& out, const MatrixTuple& base, const std::vector<MatrixTuple>& tuned,
                        const std::vector<KeepTuple>& keeps, const std::vector<float>& weights,
                        const ConsensusTuple& rule, int64_t start, int threads) {
    check_count("keeps", keeps.size(), tuned.size());
    check_count("weights", weights.size(), tuned.size());
    std::vector<lors::KeepStats> stats(tuned.size());
    {
        py::gil_scoped_release release;
        std::vector<lors::TiesExpert> experts;
        for (size_t t = 0; t < tuned.size(); ++t) experts.push_back({matrix(tuned[t]), keep(keeps[t]), weights[t]});
        lors::ties_update(matrix(out), matrix(base), experts.data(), static_cast<int64_t>(experts.size()),
                          {std::get<0>(rule), std::get<1>(rule), std::get<2>(rule), std::get<3>(rule)}, start,
                          stats.data(), threads);
    }
    py::list result;
    for (const lors::KeepStats& s : stats) {
        result.append(py::make_tuple(s.delta_energy, s.kept_energy, s.delta_sum, s.kept_sum, s.kept, s.non_finite));
    }
    return result;
}

inline auto truncated_svd(const MatrixTuple& base, const MatrixTuple& tuned, int64_t rank, uint64_t seed,
                          uintptr_t left, uintptr_t right, uintptr_t sigma, int threads) {
    py::gil_scoped_release release;
    const lors::SvdResult r = lors::truncated_svd(matrix(base), matrix(tuned), rank, seed, floats(left), floats(right),
                                                  floats(sigma), threads);
    return std::make_tuple(static_cast<int>(r.method), r.passes, r.residual, r.unique, r.energy, r.non_finite,
                           r.overflows);
}

inline int64_t sparse_part(const MatrixTuple& base, const MatrixTuple& tuned, const LowRankTuple& factors,
                           const ThresholdTuple& threshold, uintptr_t mask, uintptr_t values, int64_t capacity) {
    py::gil_scoped_release release;
    const auto& [value, ties, cut] = threshold;
    return lors::sparse_part(matrix(base), matrix(tuned), low_rank(factors), {value, ties, cut},
                             reinterpret_cast<uint8_t*>(mask), floats(values), capacity);
}

// sparse: (mask address, values address, dtype, count, scale)
inline auto sparse_update(const MatrixTuple& out, const LowRankTuple& factors,
                          const std::tuple<uintptr_t, uintptr_t, int, int64_t, float>& sparse, float weight) {
    py::gil_scoped_release release;
    const auto& [mask, values, dtype, count, scale] = sparse;
    const Matrix m = matrix(out);
    const lors::SparseStats s =
        lors::sparse_update(floats(std::get<0>(out)), m, low_rank(factors),
                            {reinterpret_cast<const uint8_t*>(mask), m.rows * m.cols,
                             reinterpret_cast<const void*>(values), static_cast<lors::DType>(dtype), count, scale},
                            weight);
    return std::make_tuple(s.energy, s.used, s.non_finite);
}

inline void eigh_single(uintptr_t a, int64_t n, int64_t count, uintptr_t values, uintptr_t vectors) {
    py::gil_scoped_release unlocked;
    lors::eigh_single(floats(a), n, count, reinterpret_cast<double*>(values), floats(vectors));
}

}  // namespace bindings
