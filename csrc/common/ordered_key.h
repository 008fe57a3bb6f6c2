// Magnitudes as integers: for finite floats |a| < |b| exactly when key(a) < key(b).
//
// Clearing the sign bit of an IEEE 754 float leaves exponent and mantissa as one unsigned number that grows with the
// magnitude. -0.0 and 0.0 share key 0; infinities and NaNs are the keys from kNonFiniteKey upwards, so one comparison
// finds them. The radix passes of residual_threshold read this number from the top.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define LORS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LORS_HOST_DEVICE inline
#endif

namespace lors {

constexpr uint32_t kMagnitudeMask = 0x7fffffffu;
constexpr uint32_t kNonFiniteKey = 0x7f800000u;
constexpr float kLargest = 3.402823466e+38f;  // finite

LORS_HOST_DEVICE uint32_t magnitude_key(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & kMagnitudeMask;
}

LORS_HOST_DEVICE float key_to_magnitude(uint32_t key) {
    float value;
    memcpy(&value, &key, sizeof value);
    return value;
}

// Radix digits of a key, most significant first: 8 exponent and 3 mantissa bits, then 10, then 10.
constexpr int kRadixShift[3] = {20, 10, 0};
constexpr int kRadixBits[3] = {11, 10, 10};
constexpr int kRadixBuckets = 1 << 11;

}  // namespace lors
