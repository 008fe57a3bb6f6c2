// delta in memory as truncated_svd reads it.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/ordered_key.h"
#include "gram.h"

namespace lors {

// delta, transposed when wide, in memory and in the range where squares neither overflow nor vanish. Packing once, as a
// matrix product packs its operands, lets the passes read 4 bytes per entry from cache instead of base and tuned again;
// a delta that already lies in memory so, on a vector's boundary (every load across one costs two), is used where it
// is.
struct Packed {
    Buffer<float> copy;
    const float* rows;  // [m, padded(n)] = delta * scale
    double scale;       // a power of two, so that scaling is exact
    double energy;      // sum of squares of `rows`
    int64_t non_finite;
};

// The largest magnitude key and the sum of squares of some entries.
struct Survey {
    uint32_t largest = 0;
    double energy = 0;
};

inline Survey survey(const float* rows, int64_t count, int64_t np) {
    Survey found;
    VecU32 largest = {};
    for (int64_t i = 0; i < count; ++i) {
        Vec<float> squares = {};
        for (int64_t j = 0; j < np; j += kLanes<float>) {
            const Vec<float> v = load(rows + i * np + j);
            const VecU32 key = reinterpret_cast<VecU32>(v) & kMagnitudeMask;
            largest = key > largest ? key : largest;
            squares += v * v;
        }
        for (int lane = 0; lane < kLanes<float>; ++lane) found.energy += static_cast<double>(squares[lane]);
    }
    for (int lane = 0; lane < kLanes<float>; ++lane) found.largest = std::max<uint32_t>(found.largest, largest[lane]);
    return found;
}

inline Packed pack(const Delta& delta, bool wide, int threads) {
    const int64_t m = wide ? delta.cols() : delta.rows(), n = wide ? delta.rows() : delta.cols(), np = padded(n);
    const int64_t chunks = (m + kChunkRows - 1) / kChunkRows;
    const bool stored = !wide && delta.stored() && delta.contiguous() &&
                        reinterpret_cast<uintptr_t>(delta.stored_row(0)) % kVectorBytes == 0;
    Packed packed{Buffer<float>(stored ? 0 : m * np), nullptr, 1, 0, 0};
    packed.rows = stored ? delta.stored_row(0) : packed.copy.data();
    // body(first row, rows) -> Survey; the sums are added in order
    const auto each_chunk = [&](const auto& body) {
        std::vector<Survey> parts(static_cast<size_t>(chunks));
        parallel_for(chunks, threads, [&](int64_t chunk, int) {
            const int64_t first = chunk * kChunkRows;
            parts[static_cast<size_t>(chunk)] = body(first, std::min(m - first, kChunkRows));
        });
        Survey all;
        for (const Survey& part : parts) {
            all.largest = std::max(all.largest, part.largest);
            all.energy += part.energy;
        }
        return all;
    };
    Survey all = each_chunk([&](int64_t first, int64_t count) {
        float* rows = packed.copy.data() + first * np;
        if (wide) {
            DeltaColumns{delta}.fetch(first, count, rows);
        } else if (!stored) {
            DeltaRows{delta}.fetch(first, count, rows);
        }
        return survey(packed.rows + first * np, count, np);
    });
    if (all.largest >= kNonFiniteKey) {
        for (int64_t j = 0; j < m * np; ++j) packed.non_finite += magnitude_key(packed.rows[j]) >= kNonFiniteKey;
        return packed;
    }
    const int exponent = all.largest ? std::ilogb(key_to_magnitude(all.largest)) : 0;
    if (exponent < -40 || exponent > 20) {
        packed.scale = std::ldexp(1.0, -exponent);
        if (stored) packed.copy.allocate(m * np);
        all = each_chunk([&](int64_t first, int64_t count) {
            for (int64_t j = first * np; j < (first + count) * np; ++j) {
                packed.copy[j] = static_cast<float>(packed.rows[j] * packed.scale);
            }
            return survey(packed.copy.data() + first * np, count, np);
        });
        packed.rows = packed.copy.data();
    }
    packed.energy = all.energy;
    return packed;
}

// The sum of squares of A in float64; the one that `pack` forms is of float32.
inline double energy64(const PackedRows& a) {
    const int64_t np = padded(a.cols());
    double energy = 0;
    for (int64_t i = 0; i < a.rows(); ++i) {
        double sums[kPad] = {};
        for (int64_t j = 0; j < np; j += kPad) {
            for (int64_t l = 0; l < kPad; ++l) {
                const double entry = static_cast<double>(a.data[i * np + j + l]);
                sums[l] += entry * entry;
            }
        }
        double row = 0;
        for (double sum : sums) row += sum;
        energy += row;
    }
    return energy;
}

}  // namespace lors
