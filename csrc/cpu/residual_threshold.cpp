// Radix select over the bits of |delta - L|, the residual recomputed a row at a time in L1 in every pass.
//
// A real delta needs one pass: the digits of a sample say between which two keys the k-th largest should lie;
// the pass counts what is above and collects what is between, a few percent, and the select is finished there. The
// counts prove whether the guess held. If it did not (a few rows of another scale, few distinct values), the digits of
// all keys are counted from the top, 11, 10 and 10 bits in three passes. No size is assumed, so no input can overflow
// one, and both ways end at the same key.
#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <utility>
#include <vector>

#include "../common/ordered_key.h"
#include "../common/parallel.h"
#include "ops.h"
#include "residual.h"

namespace lors {
namespace {

constexpr int64_t kTaskRows = 64;
constexpr int64_t kSample = 8192;               // entries; smaller matrices are not worth a sample
constexpr int64_t kPiece = 32, kPieces = 2048;  // what a sample consists of: entries of a row, and how many times
constexpr float kInfinity = __builtin_inff();

struct Keys {
    Buffer<uint32_t> list;
    int64_t count = 0;
};

// The k-th largest key, how many entries equal to it are kept, and how many there are.
struct Found {
    uint32_t key;
    int64_t ties, equal, non_finite;
};

// The k-th largest of keys that all lie in [low, high].
Found kth_between(const std::vector<Keys>& between, uint32_t low, uint32_t high, int64_t k) {
    int shift = 0;
    while ((high - low) >> shift >= kRadixBuckets) ++shift;
    std::vector<uint32_t> counts(kRadixBuckets), bucket;
    const auto each = [&](const auto& use) {
        for (const Keys& keys : between) {
            for (int64_t i = 0; i < keys.count; ++i) use(keys.list[i]);
        }
    };
    each([&](uint32_t key) { ++counts[(key - low) >> shift]; });
    uint32_t digit = kRadixBuckets - 1;
    while (counts[digit] < k) k -= counts[digit--];
    each([&](uint32_t key) {
        if ((key - low) >> shift == digit) bucket.push_back(key);
    });
    const auto place = bucket.begin() + (k - 1);
    std::nth_element(bucket.begin(), place, bucket.end(), std::greater<uint32_t>());
    // everything before `place` is at least the key, everything behind at most
    const uint32_t found = *place;
    const auto ties = std::count(bucket.begin(), place + 1, found);
    return {found, ties, ties + std::count(place + 1, bucket.end(), found), 0};
}

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

    // Two keys between which the k-th largest of all should lie, from the digits of a sample: pieces of many rows,
    // because rows differ in scale, and from all over them, because columns do.
    std::pair<uint32_t, uint32_t> guess(int64_t k) {
        constexpr int kShift = 17;  // 8 exponent and 6 mantissa bits: buckets 1.6 % wide
        const int64_t rows = residual_.rows(), cols = residual_.cols();
        const int64_t in_row = (cols + kPiece - 1) / kPiece, pieces = rows * in_row;
        int64_t step = std::max<int64_t>(1, pieces / kPieces);
        while (std::gcd(step, in_row) > 1) ++step;  // else the same columns of each row
        std::vector<uint32_t> counts(size_t{1} << (31 - kShift));
        int64_t seen = 0;
        for (int64_t piece = step / 2; piece < pieces; piece += step) {
            const int64_t from = piece % in_row * kPiece, to = std::min(cols, from + kPiece);
            float sampled[kPiece];
            residual_.each(piece / in_row, from, to, scratch_.data(),
                           [&](int64_t j, Vec<float>, Vec<float>, Vec<float> r) { store(sampled + (j - from), r); });
            for (int64_t j = 0; j < to - from; ++j) ++counts[magnitude_key(sampled[j]) >> kShift];
            seen += to - from;
        }
        const double share = static_cast<double>(k) / (static_cast<double>(rows) * cols);
        const double slack = 3 * std::sqrt(static_cast<double>(seen) * share * (1 - share)) + 0.001 * seen + 1;
        const double from = share * seen - slack, to = share * seen + slack;
        uint32_t high = static_cast<uint32_t>(counts.size()) - 1;
        double above = 0;
        while (high > 0 && above + counts[high] < from) above += counts[high--];
        uint32_t low = high;
        while (low > 0 && above + counts[low] < to) above += counts[low--];
        // not below 1: lanes past the last column look like zeros
        return {std::max(1u, low << kShift), (high << kShift) | ((1u << kShift) - 1)};
    }

    // One pass: how many keys are above `high`, and those in [low, high], of which more than `most` are given up. The
    // largest key says whether anything is not finite.
    struct Bracket {
        int64_t above = 0;
        uint32_t largest = 0;
        bool complete = true;
        std::vector<Keys> between;  // one list per worker
    };
    Bracket bracket(uint32_t low, uint32_t high, int64_t most) {
        const int64_t cols = residual_.cols(), block = std::min(residual_.block(), padded(cols));
        std::vector<Bracket> found(static_cast<size_t>(workers_));
        std::vector<Keys> between(static_cast<size_t>(workers_));
        parallel_for(tasks_, workers_, [&](int64_t task, int worker) {
            Keys& keys = between[static_cast<size_t>(worker)];
            Bracket& mine = found[static_cast<size_t>(worker)];
            if (!keys.list.size()) keys.list.allocate(most + block + kPad);
            const int64_t end = std::min(residual_.rows(), (task + 1) * kTaskRows);
            VecU32 above = {}, largest = {};
            for (int64_t from = 0; from < cols; from += block) {
                const int64_t to = std::min(cols, from + block);
                for (int64_t i = task * kTaskRows; i < end && mine.complete; ++i) {
                    uint32_t* list = keys.list.data();
                    int64_t count = keys.count;
                    residual_.each(i, from, to, scratch_.data() + worker * 4 * stride_,
                                   [&](int64_t, Vec<float>, Vec<float>, Vec<float> r) {
                                       const VecU32 v = reinterpret_cast<VecU32>(r) & kMagnitudeMask;
                                       largest = v > largest ? v : largest;
                                       above -= reinterpret_cast<VecU32>(v > high);
                                       count = append_between(v, low, high, list, count);
                                   });
                    keys.count = count;
                    mine.complete = count <= most;
                }
            }
            for (int lane = 0; lane < kLanes<float>; ++lane) {
                mine.above += above[lane];
                mine.largest = std::max<uint32_t>(mine.largest, largest[lane]);
            }
        });
        Bracket all;
        for (const Bracket& mine : found) {
            all.above += mine.above;
            all.largest = std::max(all.largest, mine.largest);
            all.complete &= mine.complete;
        }
        all.between = std::move(between);
        return all;
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

Found by_digits(Selector& selector, int64_t k) {
    std::vector<int64_t> counts = selector.histogram(0, 0);
    Found found{0, k, 0, 0};
    for (uint32_t digit = kNonFiniteKey >> kRadixShift[0]; digit < kRadixBuckets; ++digit) {
        found.non_finite += counts[digit];
    }
    if (k == 0 || found.non_finite) return found;
    found.key = descend(counts, found.ties) << kRadixShift[0];
    for (int pass = 1; pass < 3; ++pass) {
        counts = selector.histogram(pass, found.key >> (kRadixShift[pass] + kRadixBits[pass]));
        found.key |= descend(counts, found.ties) << kRadixShift[pass];
    }
    found.equal = counts[found.key & ((1u << kRadixBits[2]) - 1)];
    return found;
}

}  // namespace

Selection residual_threshold(const Matrix& base, const Matrix& tuned, const LowRank& low_rank, int64_t k, int threads) {
    const int64_t size = tuned.rows * tuned.cols;
    Selector selector(base, tuned, low_rank, threads);
    Found found{0, 0, 0, 0};
    bool finished = false;
    if (k > 0 && size >= kSample) {
        const auto [low, high] = selector.guess(k);
        const Selector::Bracket bracket = selector.bracket(low, high, size / 4);
        const int64_t rank = k - bracket.above;
        int64_t count = 0;
        for (const Keys& keys : bracket.between) count += keys.count;
        if (bracket.complete && bracket.largest < kNonFiniteKey && 0 < rank && rank <= count) {
            found = kth_between(bracket.between, low, high, rank);
            finished = true;
        }
    }
    if (!finished) found = by_digits(selector, k);
    if (k == 0 || found.non_finite) return {{kInfinity, 0, 0}, found.non_finite};
    const int64_t cut = found.equal == found.ties ? size : selector.cut_after(found.key, found.ties);
    return {{key_to_magnitude(found.key), found.ties, cut}, 0};
}

}  // namespace lors
