// Shared memory is declared by name, so that a build without a GPU can put an allocation of its own in its place.
#pragma once

#include <cstdint>

// A condition that hardly any input meets. `python -m benchmarks counts` compiles once without what stands behind it.
#ifdef LORS_WITHOUT_RARE
#define LORS_RARELY(condition) (false && (condition))
#else
#define LORS_RARELY(condition) __builtin_expect(condition, 0)
#endif

#ifndef LORS_SHARED
#define LORS_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#define LORS_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]

namespace lors {

// 16 bytes of global memory, or zeros: one load under a predicate, where a branch would double the code that follows.
__device__ __forceinline__ uint4 load16(uintptr_t at, bool there) {
    uint4 v;
    asm("{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %5, 0;\n\t"
        "mov.b32 %0, 0;\n\tmov.b32 %1, 0;\n\tmov.b32 %2, 0;\n\tmov.b32 %3, 0;\n\t"
        "@p ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n\t}"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "l"(at), "r"(static_cast<unsigned>(there)));
    return v;
}

// 1 where |value| is above the bound or no number, else 0: a number, where a predicate would have to be kept.
__device__ __forceinline__ float exceeds(float value, float bound) {
    float result;
    asm("{\n\t.reg .f32 size;\n\tabs.f32 size, %1;\n\tset.gtu.f32.f32 %0, size, %2;\n\t}"
        : "=f"(result)
        : "f"(value), "f"(bound));
    return result;
}

// A pointer that is read from where the compiler does not see that it is one into global memory.
__device__ __forceinline__ const float* global(const float* at) {
    return static_cast<const float*>(__cvta_global_to_generic(__cvta_generic_to_global(at)));
}

// Counters in shared memory, addressed there and not through generic pointers: nothing is converted per count, and
// nothing is returned.
struct SharedCounters {
    unsigned first;
    __device__ __forceinline__ explicit SharedCounters(uint32_t* at)
        : first(static_cast<unsigned>(__cvta_generic_to_shared(at))) {}
    __device__ __forceinline__ void count(uint32_t index) const {
        asm volatile("red.shared.add.u32 [%0], 1;" : : "r"(first + 4 * index) : "memory");
    }
};

}  // namespace lors
#endif
