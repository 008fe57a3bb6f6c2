// Radix select over the bits of |delta - L|.
//
// A pass recomputes the residual a row at a time in L1 and counts one digit of its key. The first digit (exponent and
// three mantissa bits) leaves a few percent of the entries of a real delta; their number is then known, so they are
// collected into a buffer of exactly that size and finished there. If too many share the digit (constant or few-valued
// input) the remaining digits are counted in two more passes instead. No size is guessed, so no input can overflow one.
#include <algorithm>
#include <atomic>
#include <vector>

#include "../lors/ordered_key.h"
#include "../lors/parallel.h"
#include "ops.h"
#include "residual.h"

namespace lors {
namespace {

constexpr int64_t kTaskRows = 64;
constexpr float kInfinity = __builtin_inff();

class Selector {
  public:
    Selector(const Matrix& base, const Matrix& tuned, const LowRank& low_rank, int threads)
        : residual_(base, tuned, low_rank),
          stride_(padded(tuned.cols)),
          tasks_((tuned.rows + kTaskRows - 1) / kTaskRows),
          workers_(static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tasks_)))),
          scratch_(workers_ * 4 * stride_) {}

    // counts[digit] over the keys whose bits above the digit equal `prefix`.
    std::vector<int64_t> histogram(int pass, uint32_t prefix) {
        const int shift = kRadixShift[pass], bits = kRadixBits[pass];
        const uint32_t mask = (1u << bits) - 1;
        // Two tables per worker: neighbours often share a digit, and two counters hide the latency of one.
        std::vector<uint32_t> tables(static_cast<size_t>(workers_) * 2 * kRadixBuckets);
        std::vector<int64_t> counts(kRadixBuckets);
        each_row([&](int64_t, const uint32_t* keys, int worker) {
            uint32_t* even = tables.data() + static_cast<size_t>(worker) * 2 * kRadixBuckets;
            uint32_t* odd = even + kRadixBuckets;
            const int64_t n = residual_.cols();
            if (pass == 0) {
                int64_t j = 0;
                for (; j + 2 <= n; j += 2) {
                    ++even[keys[j] >> shift];
                    ++odd[keys[j + 1] >> shift];
                }
                if (j < n) ++even[keys[j] >> shift];
            } else {
                for (int64_t j = 0; j < n; ++j) {
                    if (keys[j] >> (shift + bits) == prefix) ++even[(keys[j] >> shift) & mask];
                }
            }
        });
        for (size_t t = 0; t < tables.size(); ++t) counts[t % kRadixBuckets] += tables[t];
        return counts;
    }

    // All keys in [low, high]; `expected` is how many there are.
    std::vector<uint32_t> collect(uint32_t low, uint32_t high, int64_t expected) {
        std::vector<uint32_t> found(static_cast<size_t>(expected));
        std::vector<uint32_t> row_hits(static_cast<size_t>(workers_) * (stride_ + kPad));
        std::atomic<int64_t> size{0};
        each_row([&](int64_t, const uint32_t* keys, int worker) {
            uint32_t* hits = row_hits.data() + static_cast<size_t>(worker) * (stride_ + kPad);
            int64_t count = 0, j = 0;
            for (; j + kLanes<float> <= residual_.cols(); j += kLanes<float>) {
                VecU32 v;
                std::memcpy(&v, keys + j, sizeof v);
                count = append_between(v, low, high, hits, count);
            }
            for (; j < residual_.cols(); ++j) {
                hits[count] = keys[j];
                count += keys[j] - low <= high - low;
            }
            std::copy(hits, hits + count, found.data() + size.fetch_add(count));
        });
        return found;
    }

    // Row-major index just behind the `ties`-th entry whose key is `key`.
    int64_t cut_after(uint32_t key, int64_t ties) {
        float* buffer = scratch_.data();
        for (int64_t i = 0; i < residual_.rows(); ++i) {
            const uint32_t* keys = row_keys(i, buffer);
            for (int64_t j = 0; j < residual_.cols(); ++j) {
                if (keys[j] == key && --ties == 0) return i * residual_.cols() + j + 1;
            }
        }
        return 0;
    }

  private:
    const uint32_t* row_keys(int64_t i, float* buffer) const {
        float* residual = buffer + 2 * stride_;
        uint32_t* keys = reinterpret_cast<uint32_t*>(buffer + 3 * stride_);
        residual_.row(i, buffer, buffer + stride_, residual);
        for (int64_t j = 0; j < stride_; ++j) keys[j] = magnitude_key(residual[j]);
        return keys;
    }

    template <class Row>
    void each_row(const Row& row) {
        parallel_for(tasks_, workers_, [&](int64_t task, int worker) {
            float* buffer = scratch_.data() + worker * 4 * stride_;
            const int64_t end = std::min(residual_.rows(), (task + 1) * kTaskRows);
            for (int64_t i = task * kTaskRows; i < end; ++i) row(i, row_keys(i, buffer), worker);
        });
    }

    Residual residual_;
    int64_t stride_, tasks_;
    int workers_;
    Buffer<float> scratch_;  // per worker: delta, low, residual, keys of one row
};

// The digit that holds the k-th largest; k becomes its rank inside that digit.
uint32_t descend(const std::vector<int64_t>& counts, int64_t& k) {
    uint32_t digit = kRadixBuckets - 1;
    while (counts[digit] < k) k -= counts[digit--];
    return digit;
}

}  // namespace

Selection residual_threshold(const Matrix& base, const Matrix& tuned, const LowRank& low_rank, int64_t k, int threads) {
    const int64_t size = tuned.rows * tuned.cols;
    Selector selector(base, tuned, low_rank, threads);
    std::vector<int64_t> counts = selector.histogram(0, 0);
    int64_t non_finite = 0;
    for (uint32_t digit = kNonFiniteKey >> kRadixShift[0]; digit < kRadixBuckets; ++digit) non_finite += counts[digit];
    if (k == 0 || non_finite) return {{kInfinity, 0, 0}, non_finite};

    int64_t rank = k;  // of the wanted key among those still in play
    uint32_t key = descend(counts, rank) << kRadixShift[0];
    int64_t equal;
    const int64_t candidates = counts[key >> kRadixShift[0]];
    if (candidates <= std::max<int64_t>(4096, size / 4)) {
        const uint32_t high = key + (1u << kRadixShift[0]) - 1;
        std::vector<uint32_t> found = selector.collect(key, high, candidates);
        std::nth_element(found.begin(), found.begin() + (rank - 1), found.end(), std::greater<uint32_t>());
        key = found[static_cast<size_t>(rank - 1)];
        rank -= std::count_if(found.begin(), found.end(), [key](uint32_t other) { return other > key; });
        equal = std::count(found.begin(), found.end(), key);
    } else {
        for (int pass = 1; pass < 3; ++pass) {
            counts = selector.histogram(pass, key >> (kRadixShift[pass] + kRadixBits[pass]));
            key |= descend(counts, rank) << kRadixShift[pass];
        }
        equal = counts[key & ((1u << kRadixBits[2]) - 1)];
    }
    return {{key_to_magnitude(key), rank, equal == rank ? size : selector.cut_after(key, rank)}, 0};
}

}  // namespace lors
