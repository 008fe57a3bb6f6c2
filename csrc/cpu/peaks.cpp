// What this processor does at most: the numbers that a kernel's time is divided by. Loops that do nothing else.
#include "peaks.h"

#include <algorithm>
#include <chrono>
#include <functional>
#include <vector>

#include "../common/parallel.h"
#include "buffer.h"
#include "simd.h"

namespace lors {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kChains = 12;  // independent sums: latency times the number of units, and registers enough
constexpr int kSteps = 4096;

// Work per second of `threads` workers that call `step` (which returns its work) again and again for `seconds`.
double rate(int threads, double seconds, const std::function<double(int worker)>& step) {
    std::vector<double> done(static_cast<size_t>(threads) * 8);  // a cache line each
    const auto begun = Clock::now(),
               end = begun + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    parallel_for(threads, threads, [&](int64_t, int worker) {
        while (Clock::now() < end) done[static_cast<size_t>(worker) * 8] += step(worker);
    });
    const double elapsed = std::chrono::duration<double>(Clock::now() - begun).count();
    double total = 0;
    for (double each : done) total += each;
    return total / elapsed;
}

template <class V>
void keep(V& value) {  // the compiler may not know what becomes of it
#if defined(__x86_64__)
    asm volatile("" : "+x"(value));
#elif defined(__aarch64__)
    asm volatile("" : "+w"(value));
#else
    asm volatile("" : "+m"(value));
#endif
}

double multiply_step(int) {
    Vec<float> sums[kChains] = {}, a = splat(0.5f), b = splat(1.0f);
    keep(a);
    keep(b);
    for (auto& sum : sums) keep(sum);  // a compiler that knows them equal computes one for all
    for (int i = 0; i < kSteps; ++i) {
        for (auto& sum : sums) sum = multiply_add(sum, a, b);
    }
    for (auto& sum : sums) keep(sum);
    return 2.0 * kChains * kSteps * kLanes<float>;
}

#if defined(__AVX512F__)
__attribute__((target("avx512bf16"))) double bfloat16_step(int) {
    __m512 sums[kChains] = {};
    __m512i ones = _mm512_set1_epi16(0x3f80);  // 1.0
    keep(ones);
    for (auto& sum : sums) keep(sum);
    const auto pairs = reinterpret_cast<__m512bh>(ones);
    for (int i = 0; i < kSteps; ++i) {
        for (auto& sum : sums) sum = _mm512_dpbf16_ps(sum, pairs, pairs);
    }
    for (auto& sum : sums) keep(sum);
    return 4.0 * kChains * kSteps * 16;
}
#endif

constexpr int kReads = 8;  // sums of a reading, as many as hide the latency of an addition

// One reading of data[0 : count], count a multiple of kReads vectors.
void read_all(const float* data, int64_t count) {
    constexpr int64_t L = kLanes<float>;
    Vec<float> sums[kReads] = {};
    for (int64_t i = 0; i < count; i += kReads * L) {
        for (int c = 0; c < kReads; ++c) sums[c] += load(data + i + c * L);
    }
    for (auto& sum : sums) keep(sum);
}

}  // namespace

double multiply_rate(int threads, double seconds) {
    return rate(threads, seconds, multiply_step);
}

double bfloat16_rate(int threads, double seconds) {
#if defined(__AVX512F__)
    if (__builtin_cpu_supports("avx512bf16")) return rate(threads, seconds, bfloat16_step);
#endif
    (void)threads, (void)seconds;
    return 0;
}

double read_rate(int64_t bytes, int threads, double seconds) {
    // A step reads about kStep floats, a part of the data or the whole several times, and looks at the clock after it.
    constexpr int64_t kStep = 1 << 18;
    const int64_t each = std::max<int64_t>(1, bytes / threads / 1024) * 1024 / 4, part = std::min(each, kStep);
    Buffer<float> data(threads * each);
    std::fill(data.data(), data.data() + threads * each, 0.0f);
    std::vector<int64_t> places(static_cast<size_t>(threads) * 8);
    return rate(threads, seconds, [&](int worker) {
        int64_t &place = places[static_cast<size_t>(worker) * 8], count = 0;
        while (count < kStep) {
            const int64_t n = std::min(part, each - place);
            read_all(data.data() + worker * each + place, n);
            place = place + n < each ? place + n : 0;
            count += n;
        }
        return 4.0 * static_cast<double>(count);
    });
}

}  // namespace lors
