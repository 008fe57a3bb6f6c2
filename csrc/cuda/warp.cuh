// Sums over a warp of a few numbers at once.
#pragma once

namespace lors {

// v[0, N) of all lanes -> the total of v[lane % N], N a power of two; the list is halved with every step, so that few
// shuffles do what N times five would
template <int N>
__device__ __forceinline__ float warp_sums(float (&v)[N]) {
#pragma unroll
    for (int half = N / 2; half > 0; half /= 2) {
        const bool upper = (threadIdx.x & half) != 0;
#pragma unroll
        for (int j = 0; j < half; ++j) {
            const float send = upper ? v[j] : v[j + half], keep = upper ? v[j + half] : v[j];
            v[j] = keep + __shfl_xor_sync(~0u, send, half);
        }
    }
    float total = v[0];
#pragma unroll
    for (int step = N; step < 32; step *= 2) total += __shfl_xor_sync(~0u, total, step);
    return total;
}

}  // namespace lors
