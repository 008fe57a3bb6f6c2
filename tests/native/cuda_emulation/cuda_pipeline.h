// Asynchronous copies into shared memory: they arrive when they are waited for, and not before.
#pragma once

#include "cuda_runtime_api.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
    emulation::copy_later(to, from, bytes, zeros);
}
inline void __pipeline_commit() {
    emulation::commit_copies();
}
#define __pipeline_wait_prior(groups_left) emulation::wait_copies(groups_left, __FILE__, __LINE__)
