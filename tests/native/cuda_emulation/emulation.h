// CUDA kernels on the CPU, for tests: enough of CUDA's runtime and language that g++ compiles csrc/cuda as C++.
//
// A block's threads are fibers of one operating system thread, run in an order drawn at random, each until it waits at
// a barrier or a warp operation: what is read without a barrier in between is read too early on some seeds. Shared
// memory and the targets of asynchronous copies hold NaN until they are written, a copy arrives only when it is waited
// for, and every shared array is an allocation of its own, so that AddressSanitizer sees its bounds.
//
// CUDA_EMULATION_SEED chooses the order. CUDA_EMULATION_SKIP="file.cu:line" leaves out the barrier or the wait that
// stands there, which tests use to see that it is missed.
//
// Not shown: the order of memory operations between two barriers on a device, bank conflicts, occupancy, time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulation {

constexpr unsigned kWarp = 32;

struct Position {
    dim3 thread, block, threads, blocks;
};
extern Position here;  // of the fiber that runs

constexpr int kDevices = 2;
extern thread_local int device;      // the current one
extern uint64_t launches[kDevices];  // on each; read by tests through emulation_device() and emulation_launches()

// Runs `body` once per thread of the grid; throws std::runtime_error for what a device would hang on or answer with
// anything.
void run(dim3 blocks, dim3 threads, size_t dynamic_bytes, const std::function<void()>& body);

void barrier(const char* file, int line);
bool barrier_or(bool value, const char* file, int line);  // whether any thread came with true

// Leaves `value` where the lanes of the warp find it and waits for all of them; returns the 32 values.
const uint64_t* exchange(unsigned mask, uint64_t value, int line);

// The block's shared memory: by the line that declares it, poisoned, and released when the block ends.
void* shared(int line, size_t bytes);
void* dynamic_shared();
template <class T>
T& shared_as(int line) {
    return *static_cast<T*>(shared(line, sizeof(T)));
}

void copy_later(void* to, const void* from, size_t bytes, size_t zeros);
void commit_copies();
void wait_copies(size_t groups_left, const char* file, int line);

template <class T>
T shuffle(unsigned mask, T value, int line, int source) {
    static_assert(sizeof(T) <= 8);
    uint64_t raw = 0;
    memcpy(&raw, &value, sizeof(T));
    const uint64_t* all = exchange(mask, raw, line);
    if (source >= 0 && source < static_cast<int>(kWarp)) memcpy(&value, &all[source], sizeof(T));
    return value;
}
inline int lane() {
    return static_cast<int>(here.thread.x % kWarp);
}

}  // namespace emulation

// --- the language

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes)
#define LORS_SHARED(type, name, ...) auto& name = emulation::shared_as<type __VA_ARGS__>(__LINE__)
#define LORS_DYNAMIC_SHARED(name) char* const name = static_cast<char*>(emulation::dynamic_shared())
#define threadIdx (emulation::here.thread)
#define blockIdx (emulation::here.block)

#define __syncthreads() emulation::barrier(__FILE__, __LINE__)
#define __syncthreads_or(value) emulation::barrier_or(value, __FILE__, __LINE__)
#define __syncwarp() static_cast<void>(emulation::exchange(~0u, 0, __LINE__))
inline bool emulated_any(unsigned mask, bool value, int line) {
    const uint64_t* all = emulation::exchange(mask, value, line);
    bool any = false;
    for (unsigned lane = 0; lane < emulation::kWarp; ++lane) any = any || all[lane];
    return any;
}
inline unsigned emulated_sum(unsigned mask, unsigned value, int line) {
    const uint64_t* all = emulation::exchange(mask, value, line);
    uint64_t sum = 0;
    for (unsigned lane = 0; lane < emulation::kWarp; ++lane) sum += all[lane];
    return static_cast<unsigned>(sum);
}
inline unsigned emulated_max(unsigned mask, unsigned value, int line) {
    const uint64_t* all = emulation::exchange(mask, value, line);
    uint64_t most = 0;
    for (unsigned lane = 0; lane < emulation::kWarp; ++lane) most = all[lane] > most ? all[lane] : most;
    return static_cast<unsigned>(most);
}
#define __reduce_max_sync(mask, value) emulated_max(mask, value, __LINE__)
#define __reduce_add_sync(mask, value) emulated_sum(mask, value, __LINE__)
#define __any_sync(mask, value) emulated_any(mask, value, __LINE__)
#define __shfl_sync(mask, v, from) emulation::shuffle(mask, v, __LINE__, from)
#define __shfl_xor_sync(mask, v, bits) emulation::shuffle(mask, v, __LINE__, emulation::lane() ^ (bits))
#define __shfl_down_sync(mask, v, by) emulation::shuffle(mask, v, __LINE__, emulation::lane() + static_cast<int>(by))
#define __shfl_up_sync(mask, v, by) emulation::shuffle(mask, v, __LINE__, emulation::lane() - static_cast<int>(by))

// Fibers give way only at barriers, so a plain update is atomic.
template <class T>
T atomicAdd(T* at, T value) {
    const T old = *at;
    *at = old + value;
    return old;
}
template <class T>
T atomicMin(T* at, T value) {
    const T old = *at;
    *at = old < value ? old : value;
    return old;
}
template <class T>
T atomicMax(T* at, T value) {
    const T old = *at;
    *at = old > value ? old : value;
    return old;
}

inline double rsqrt(double x) {
    return 1 / __builtin_sqrt(x);
}
inline int __popc(unsigned bits) {
    return __builtin_popcount(bits);
}
// Compiled without contraction: each is one rounding.
inline float __fadd_rn(float a, float b) {
    return a + b;
}
inline float __fsub_rn(float a, float b) {
    return a - b;
}
inline float __fmul_rn(float a, float b) {
    return a * b;
}
inline float __fdiv_rn(float a, float b) {
    return a / b;
}
inline float __fmaf_rn(float a, float b, float c) {
    return __builtin_fmaf(a, b, c);
}
inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}

namespace lors {  // csrc/cuda/shared.cuh
inline uint4 load16(uintptr_t at, bool there) {
    return there ? *reinterpret_cast<const uint4*>(at) : make_uint4(0, 0, 0, 0);
}
inline float exceeds(float value, float bound) {
    return !(__builtin_fabsf(value) <= bound) ? 1.0f : 0.0f;
}
inline const float* global(const float* at) {
    return at;
}
struct SharedCounters {
    uint32_t* first;
    explicit SharedCounters(uint32_t* at) : first(at) {}
    void count(uint32_t index) const { ++first[index]; }
};
}  // namespace lors
