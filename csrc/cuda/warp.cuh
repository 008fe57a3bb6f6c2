// Sums over a warp of eight numbers at once.
#pragma once

namespace lors {

constexpr int kSums = 8;

// v[0, 8) of all lanes -> the total of v[lane % 8]; the list is halved with every step, so 9 shuffles do what 40 would
__device__ __forceinline__ float warp_sums(float (&v)[kSums]) {
#pragma unroll
    for (int half = kSums / 2; half > 0; half /= 2) {
        const bool upper = (threadIdx.x & half) != 0;
#pragma unroll
        for (int j = 0; j < half; ++j) {
            const float send = upper ? v[j] : v[j + half], keep = upper ? v[j + half] : v[j];
            v[j] = keep + __shfl_xor_sync(~0u, send, half);
        }
    }
    float total = v[0];
    total += __shfl_xor_sync(~0u, total, 8);
    return total + __shfl_xor_sync(~0u, total, 16);
}

}  // namespace lors
