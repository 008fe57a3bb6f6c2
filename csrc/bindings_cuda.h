// What Python hands over, as the types of cuda/ops.h. Arguments arrive checked (lors_kernels/backends/cuda.py) as
// device addresses and sizes; the interpreter lock is released while kernels are launched.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "cuda/ops.h"

namespace py = pybind11;

namespace bindings {

using lors::GramPlan;
using lors::Group;
using lors::Launch;
// (device, stream)
using LaunchTuple = std::tuple<int, uintptr_t>;
// (table, base dtype, tuned dtype, aligned, matrices, experts, m, n)
using GroupTuple = std::tuple<uintptr_t, int, int, bool, int64_t, int64_t, int64_t, int64_t>;
// (rows, chunks, per thread, shared bytes)
using PlanTuple = std::tuple<int64_t, int64_t, int, int64_t, bool>;
// (left, right transposed, rank)
using FactorsTuple = std::tuple<uintptr_t, uintptr_t, int64_t>;

template <class T>
inline T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

inline Launch launch(const LaunchTuple& t) {
    return {std::get<0>(t), at<CUstream_st>(std::get<1>(t))};
}

inline Group group(const GroupTuple& t) {
    const auto& [table, base, tuned, aligned, matrices, experts, m, n] = t;
    return {at<const int64_t>(table), base, tuned, aligned, matrices, experts, m, n};
}

inline PlanTuple plan_gram(int64_t pairs, int64_t outer, int64_t inner, int item_size, bool vectors, int processors,
                           int64_t room) {
    const GramPlan p = lors::plan_gram(pairs, outer, inner, item_size, vectors, processors, room);
    return {p.rows, p.chunks, p.per_thread, p.shared, p.tensor};
}

inline void gram_apply(const LaunchTuple& l, const GroupTuple& g, bool transposed, const PlanTuple& plan, uintptr_t x,
                       int64_t b, uintptr_t y, uintptr_t partial, uintptr_t account) {
    const auto& [rows, chunks, per_thread, shared, tensor] = plan;
    lors::gram_apply(launch(l), group(g), transposed, {rows, chunks, per_thread, shared, tensor}, at<const float>(x), b,
                     at<float>(y), at<float>(partial), at<float>(account));
}

// (k, pieces, capacity, bracket, found, candidates, settled, key, wanted, equal, non_finite)
using SearchTuple = std::tuple<int64_t, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t,
                               uintptr_t, uintptr_t, uintptr_t>;

inline void residual_threshold(const LaunchTuple& l, const GroupTuple& g, const FactorsTuple& f, const SearchTuple& s,
                               int passes, uintptr_t counts, uintptr_t ties, uintptr_t cut) {
    const auto& [left, right_t, rank] = f;
    const auto& [k, pieces, capacity, bracket, found, candidates, settled, key, wanted, equal, non_finite] = s;
    const lors::ThresholdSearch search{k,
                                       pieces,
                                       capacity,
                                       at<float>(bracket),
                                       at<unsigned long long>(found),
                                       at<uint32_t>(candidates),
                                       at<int32_t>(settled),
                                       at<int32_t>(key),
                                       at<int64_t>(wanted),
                                       at<int64_t>(equal),
                                       at<int64_t>(non_finite)};
    lors::residual_threshold(launch(l), group(g), at<const float>(left), at<const float>(right_t), rank, search, passes,
                             at<int64_t>(counts), at<int64_t>(ties), at<int64_t>(cut));
}

inline void merge_update(const LaunchTuple& l, const GroupTuple& g, uintptr_t out_table, int out_dtype,
                         bool out_aligned, const FactorsTuple& f, uintptr_t value, uintptr_t cut, uintptr_t weight,
                         uintptr_t energy, uintptr_t counts) {
    const auto& [left, right_t, rank] = f;
    lors::merge_update(launch(l), group(g), at<const int64_t>(out_table), out_dtype, out_aligned, at<const float>(left),
                       at<const float>(right_t), rank, at<const float>(value), at<const int64_t>(cut),
                       at<const float>(weight), at<float>(energy), at<int32_t>(counts));
}

// (elect, normalize, scale, sum of all weights, start)
using SumTuple = std::tuple<bool, bool, float, float, int64_t>;

inline void ties_update(const LaunchTuple& l, const GroupTuple& g, uintptr_t out_table, int out_dtype, bool out_aligned,
                        uintptr_t numbers, uintptr_t integers, const SumTuple& sum, uintptr_t energy,
                        uintptr_t counts) {
    const auto& [elect, normalize, scale, all_weights, start] = sum;
    lors::ties_update(launch(l), group(g), at<const int64_t>(out_table), out_dtype, out_aligned,
                      {at<const float>(numbers), at<const int64_t>(integers)},
                      {elect, normalize, scale, all_weights, start}, at<float>(energy), at<int32_t>(counts));
}

inline void measure(const LaunchTuple& l, const GroupTuple& g, uintptr_t energy, uintptr_t counts) {
    lors::measure(launch(l), group(g), at<float>(energy), at<int32_t>(counts));
}

inline void eigh(const LaunchTuple& l, uintptr_t a, int64_t row_stride, int64_t stride, int64_t count, int64_t n,
                 uintptr_t theta, uintptr_t vectors, uintptr_t error) {
    lors::eigh(launch(l), at<const double>(a), row_stride, stride, count, n, at<double>(theta), at<double>(vectors),
               at<double>(error));
}

// (address, columns, entries from row to row, from pair to pair)
using BasisTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

inline void orthonormalise(const LaunchTuple& l, uintptr_t w, const BasisTuple& basis, int64_t pairs, int64_t n,
                           uintptr_t noise, uintptr_t scale, double level, uintptr_t q, uintptr_t below) {
    const auto& [columns_at, columns, row_stride, stride] = basis;
    lors::orthonormalise(launch(l), at<const float>(w), at<const float>(columns_at), row_stride, stride, pairs, n,
                         columns, at<const double>(noise), at<const double>(scale), level, at<float>(q),
                         at<double>(below));
}

inline void expand(const LaunchTuple& l, uintptr_t w, const BasisTuple& basis, int64_t pairs, int64_t n,
                   uintptr_t noise, double level, uintptr_t t, int64_t room, uintptr_t below) {
    const auto& [columns_at, columns, row_stride, stride] = basis;
    lors::expand(launch(l), at<const float>(w), at<float>(columns_at), row_stride, stride, pairs, n, columns,
                 at<const double>(noise), level, at<double>(t), room, at<double>(below));
}

inline std::tuple<int, std::string> device_count() {
    int count = 0;
    const cudaError_t code = cudaGetDeviceCount(&count);
    return {code == cudaSuccess ? count : 0, code == cudaSuccess ? "" : cudaGetErrorString(code)};
}

}  // namespace bindings
