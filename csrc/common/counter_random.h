// Random numbers without a state: number i of a stream is a function of the stream's key and of i alone.
//
// The result cannot depend on who draws first: not on threads, chunks, the order of tensors or experts, or the device.
// SplitMix64 (Steele, Lea, Flood 2014) is a counter passed through a mixing function, so it can be entered anywhere.
// The upper 32 bits are used: an entry is kept with probability p when they are below limit = floor(p * 2^32), an
// integer comparison that has no rounding to differ in.
#pragma once

#include <cstdint>

#include "ordered_key.h"

namespace lors {

constexpr uint64_t kAlways = uint64_t{1} << 32;  // the limit of probability 1

LORS_HOST_DEVICE uint64_t random_word(uint64_t key, uint64_t index) {
    uint64_t z = key + (index + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

LORS_HOST_DEVICE uint32_t random_bits(uint64_t key, uint64_t index) {
    return static_cast<uint32_t>(random_word(key, index) >> 32);
}

// The numbers of a stream one after another, uniform in [-1, 1).
class Random {
  public:
    explicit Random(uint64_t key) : key_(key) {}
    double next() { return static_cast<double>(static_cast<int64_t>(random_word(key_, index_++))) * 0x1p-63; }

  private:
    uint64_t key_, index_ = 0;
};

}  // namespace lors
