// Shared memory is declared by name, so that a build without a GPU can put an allocation of its own in its place.
#pragma once

#include <cstdint>

// A condition that hardly any input meets. `python -m benchmarks counts` compiles once without what stands behind it.
#ifdef LORS_WITHOUT_RARE
#define LORS_RARELY(condition) false
#else
#define LORS_RARELY(condition) __builtin_expect(condition, 0)
#endif

#ifndef LORS_SHARED
#define LORS_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#define LORS_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]

namespace lors {

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
