// Launching with every error reported, and the choice of a kernel's instantiation.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>

#include "../common/views.h"
#include "ops.h"

namespace lors {

inline std::string describe(const char* kernel, const Group& group) {
    char text[160];
    std::snprintf(text, sizeof text, "%s [%lld matrices x %lld experts, %lld x %lld]", kernel,
                  static_cast<long long>(group.matrices), static_cast<long long>(group.experts),
                  static_cast<long long>(group.m), static_cast<long long>(group.n));
    return text;
}

inline void check(cudaError_t code, const char* kernel, const Group& group) {
    if (code == cudaSuccess) return;
    static_cast<void>(cudaGetLastError());  // reported here, and not by the next call as well
    std::string why = cudaGetErrorString(code);
    if (code == cudaErrorNoKernelImageForDevice || code == cudaErrorUnsupportedPtxVersion) {
        why += "; this build has " LORS_CUDA_ARCHS ", rebuild with LORS_CUDA_ARCHS set for this device";
    }
    throw CudaError(describe(kernel, group) + ": " + std::string(cudaGetErrorName(code)) + ": " + why);
}

// The caller's device is the current one again when this goes: what a library selects is nobody else's business.
class Selected {
  public:
    explicit Selected(int before) : before_(before) {}
    Selected(const Selected&) = delete;
    Selected& operator=(const Selected&) = delete;
    ~Selected() { static_cast<void>(cudaSetDevice(before_)); }

  private:
    int before_;
};

// Selects the device, and refuses to add work behind an error nobody has seen: it would be reported in the wrong place.
[[nodiscard]] inline Selected begin(const Launch& launch, const char* kernel, const Group& group) {
    const cudaError_t earlier = cudaGetLastError();
    if (earlier != cudaSuccess) {
        throw CudaError(describe(kernel, group) + ": not started: an earlier kernel on this device failed with " +
                        cudaGetErrorName(earlier) + ": " + cudaGetErrorString(earlier));
    }
    int before = 0;
    check(cudaGetDevice(&before), kernel, group);
    check(cudaSetDevice(launch.device), kernel, group);
    return Selected(before);
}

// Puts a kernel on the stream. An error of the launch itself (sizes, an architecture that is not in the binary) is
// thrown.
template <class... P, class... A>
void start(const Launch& launch, const char* name, const Group& group, dim3 grid, int threads, int64_t shared,
           void (*kernel)(P...), const A&... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = launch.stream;
    check(cudaLaunchKernelEx(&config, kernel, arguments...), name, group);
}

inline unsigned blocks(int64_t count, const char* kernel, const Group& group) {
    if (count >= (int64_t{1} << 31)) throw CudaError(describe(kernel, group) + ": more than 2^31 blocks");
    return static_cast<unsigned>(count);
}

// Same dtype on both sides and 16-byte rows: vector loads, compiled per dtype. Everything else: one element at a time.
enum class Kind { kFloat32, kFloat16, kBFloat16, kAny };

inline Kind kind_of(const Group& group) {
    if (!group.aligned || group.base_dtype != group.tuned_dtype || group.n % 8) return Kind::kAny;
    return static_cast<Kind>(group.tuned_dtype);
}

// Calls f with an integral constant of the kind.
template <Kind K>
struct KindTag {
    static constexpr Kind kind = K;
};
template <class F>
void with_kind(Kind kind, const F& f) {
    switch (kind) {
        case Kind::kFloat32: return f(KindTag<Kind::kFloat32>{});
        case Kind::kFloat16: return f(KindTag<Kind::kFloat16>{});
        case Kind::kBFloat16: return f(KindTag<Kind::kBFloat16>{});
        default: return f(KindTag<Kind::kAny>{});
    }
}

// Bytes of shared memory that a block of the device may ask for.
inline int64_t shared_memory_of(int device) {
    int bytes = 0;
    const Group none{nullptr, 0, 0, false, 0, 0, 0, 0};
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory", none);
    return bytes;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

}  // namespace lors
