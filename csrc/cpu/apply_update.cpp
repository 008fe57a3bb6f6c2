// The end of a merge in one pass: base and update are read once, out is written once, and the largest value is known.
#include <algorithm>
#include <vector>

#include "../lors/ordered_key.h"
#include "../lors/parallel.h"
#include "buffer.h"
#include "ops.h"
#include "rows.h"

namespace lors {
namespace {

constexpr int64_t kTaskRows = 16;
constexpr int64_t kStrip = 1024;  // columns at a time: two rows of float32 stay in L1

typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));

void read_or_zero(const Matrix& m, int64_t i, int64_t j, int64_t n, float* row) {
    if (m.data) {
        read_row(m, i, j, n, row);
    } else {
        std::fill(row, row + n, 0.0f);
    }
    std::fill(row + n, row + padded(n), 0.0f);
}

// row[j] = scale * row[j] + update[j] for j in [0, padded(n)); returns the largest magnitude as a key. NaN has the
// largest of all.
uint32_t add(float* row, const float* update, int64_t n, double scale) {
    const float nearest = static_cast<float>(scale);  // float32 may lack bits of the scale: two numbers hold them
    const Vec<float> factor = splat(nearest), rest = splat(static_cast<float>(scale - double{nearest}));
    Mask largest = {};
    for (int64_t j = 0; j < padded(n); j += kLanes<float>) {
        const Vec<float> base = load(row + j);
        const Vec<float> sum = multiply_add(factor, base, multiply_add(rest, base, load(update + j)));
        store(row + j, sum);
        const Mask key = reinterpret_cast<Mask>(sum) & static_cast<int32_t>(kMagnitudeMask), larger = key > largest;
        largest = (key & larger) | (largest & ~larger);
    }
    int32_t key = 0;
    for (int lane = 0; lane < kLanes<float>; ++lane) key = std::max(key, largest[lane]);
    return static_cast<uint32_t>(key);
}

}  // namespace

float apply_update(const Matrix& out, const Matrix& base, const Matrix& update, double scale, int threads) {
    const int64_t tasks = (out.rows + kTaskRows - 1) / kTaskRows, strip = padded(std::min(kStrip, out.cols));
    const int workers = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tasks)));
    Buffer<float> scratch(workers * 2 * strip);
    std::vector<uint32_t> largest(static_cast<size_t>(tasks));
    parallel_for(tasks, workers, [&](int64_t task, int worker) {
        float *row = scratch.data() + worker * 2 * strip, *added = row + strip;
        uint32_t key = 0;
        const int64_t end = std::min(out.rows, (task + 1) * kTaskRows);
        for (int64_t i = task * kTaskRows; i < end; ++i) {
            for (int64_t j = 0; j < out.cols; j += kStrip) {
                const int64_t n = std::min(kStrip, out.cols - j);
                read_or_zero(base, i, j, n, row);
                read_or_zero(update, i, j, n, added);
                key = std::max(key, add(row, added, n, scale));
                write_row(out, i, j, n, row);
            }
        }
        largest[static_cast<size_t>(task)] = key;
    });
    return key_to_magnitude(*std::max_element(largest.begin(), largest.end()));
}

}  // namespace lors
