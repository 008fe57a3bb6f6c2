// The end of a merge in one pass: base and update are read once, out is written once, and the largest value is known.
#include <algorithm>
#include <vector>

#include "../common/ordered_key.h"
#include "../common/parallel.h"
#include "buffer.h"
#include "ops.h"
#include "rows.h"

namespace lors {
namespace {

constexpr int64_t kTaskRows = 16;
constexpr int64_t kStrip = 1024;  // columns at a time, whose conversions stay in L1

typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));

// m[i, j : j + n] as float32: where it lies, or converted into `strip`.
const float* row_of(const Matrix& m, int64_t i, int64_t j, int64_t n, float* strip) {
    if (!m.data) {
        std::fill(strip, strip + n, 0.0f);
        return strip;
    }
    if (m.dtype == DType::kFloat32) return static_cast<const float*>(m.at(i, j));
    read_row(m, i, j, n, strip);
    return strip;
}

// scale * base + update, rounded once: what float32 has not got of the scale is added beside it, and where a product
// alone would be rounded the sum is formed in float64.
struct Sum {
    typedef double Doubles __attribute__((vector_size(2 * kVectorBytes)));
    Vec<float> scale, rest;
    double exact;

    explicit Sum(double s)
        : scale(splat(static_cast<float>(s))),
          rest(splat(static_cast<float>(s - double{static_cast<float>(s)}))),
          exact(s) {}

    Vec<float> operator()(const float* base, const float* update) const {
        const Vec<float> b = load(base), u = load(update);
        if constexpr (kFused) return multiply_add(scale, b, multiply_add(rest, b, u));
        const Doubles sum = exact * __builtin_convertvector(b, Doubles) + __builtin_convertvector(u, Doubles);
        return __builtin_convertvector(sum, Vec<float>);
    }
};

// The largest magnitude by its key; NaN's is larger than any number's.
void note(Mask& largest, Vec<float> values) {
    const Mask key = reinterpret_cast<Mask>(values) & static_cast<int32_t>(kMagnitudeMask);
    largest = key > largest ? key : largest;
}

// to[j] = sum of base[j] and update[j] for j in [0, n).
void add_row(const Sum& sum, const float* base, const float* update, int64_t n, float* to, Mask& largest) {
    constexpr int64_t L = kLanes<float>;
    const Sum add = sum;  // values, which `to` cannot point into
    Mask most = largest;
    int64_t j = 0;
    for (; j + L <= n; j += L) {
        const Vec<float> values = add(base + j, update + j);
        store(to + j, values);
        note(most, values);
    }
    if (j < n) {
        float b[L] = {}, u[L] = {};
        std::copy(base + j, base + n, b);
        std::copy(update + j, update + n, u);
        const Vec<float> values = add(b, u);
        store(b, values);
        note(most, values);
        std::copy(b, b + (n - j), to + j);
    }
    largest = most;
}

}  // namespace

float apply_update(const Matrix& out, const Matrix& base, const Matrix& update, double scale, int threads) {
    const int64_t tasks = (out.rows + kTaskRows - 1) / kTaskRows, strip = std::min(kStrip, out.cols);
    const int workers = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tasks)));
    const Sum sum(scale);
    Buffer<float> scratch(workers * 3 * strip);
    std::vector<uint32_t> largest(static_cast<size_t>(tasks));
    parallel_for(tasks, workers, [&](int64_t task, int worker) {
        float *first = scratch.data() + worker * 3 * strip, *second = first + strip, *sums = second + strip;
        Mask most = {};
        const int64_t end = std::min(out.rows, (task + 1) * kTaskRows);
        for (int64_t i = task * kTaskRows; i < end; ++i) {
            for (int64_t j = 0; j < out.cols; j += kStrip) {
                const int64_t n = std::min(kStrip, out.cols - j);
                const bool direct = out.dtype == DType::kFloat32;
                float* to = direct ? static_cast<float*>(const_cast<void*>(out.at(i, j))) : sums;
                add_row(sum, row_of(base, i, j, n, first), row_of(update, i, j, n, second), n, to, most);
                if (!direct) write_row(out, i, j, n, sums);
            }
        }
        int32_t key = 0;
        for (int lane = 0; lane < kLanes<float>; ++lane) key = std::max(key, most[lane]);
        largest[static_cast<size_t>(task)] = static_cast<uint32_t>(key);
    });
    return key_to_magnitude(*std::max_element(largest.begin(), largest.end()));
}

}  // namespace lors
