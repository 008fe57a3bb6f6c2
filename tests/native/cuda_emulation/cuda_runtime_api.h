// The part of the CUDA runtime that csrc calls: two devices, numbers 0 and 1, with an H200's launch limits.
#pragma once

#include <cstdlib>

#include "emulation.h"

#define CUDART_VERSION 0

typedef struct CUstream_st* cudaStream_t;

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorUnsupportedPtxVersion = 222,
    cudaErrorIllegalAddress = 700,
};

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    void* attrs;
    unsigned numAttrs;
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace emulation {
inline size_t dynamic_limit = 48 << 10;  // of the next launch; more has to be asked for

inline cudaError_t last = cudaSuccess;  // what cudaGetLastError returns once

inline cudaError_t failed(cudaError_t code) {
    return last = code;
}

// Errors to order: CUDA_EMULATION_ERROR is what every launch fails with, CUDA_EMULATION_EARLIER what was left behind.
inline cudaError_t ordered(const char* variable) {
    const char* code = std::getenv(variable);
    return code ? static_cast<cudaError_t>(std::atoi(code)) : cudaSuccess;
}
}  // namespace emulation

inline const char* cudaGetErrorName(cudaError_t code) {
    switch (code) {
        case cudaSuccess: return "cudaSuccess";
        case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
        case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
        case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
        case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
        default: return "cudaErrorInvalidValue";
    }
}
inline const char* cudaGetErrorString(cudaError_t code) {
    return code == cudaErrorInvalidDevice ? "invalid device ordinal" : "emulated";
}
inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = emulation::kDevices;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= emulation::kDevices) return emulation::failed(cudaErrorInvalidDevice);
    emulation::device = device;
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = emulation::device;
    return cudaSuccess;
}
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
    if (device < 0 || device >= emulation::kDevices) return emulation::failed(cudaErrorInvalidDevice);
    const char* bytes = std::getenv("CUDA_EMULATION_SHARED");
    *value = bytes ? std::atoi(bytes) : 227 << 10;
    return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
    if (const cudaError_t code = emulation::ordered("CUDA_EMULATION_EARLIER"); code != cudaSuccess) return code;
    const cudaError_t code = emulation::last;
    emulation::last = cudaSuccess;
    return code;
}
template <class F>
cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int bytes) {
    if (bytes > (227 << 10)) return emulation::failed(cudaErrorInvalidValue);
    emulation::dynamic_limit = static_cast<size_t>(bytes) > (48u << 10) ? static_cast<size_t>(bytes) : 48u << 10;
    return cudaSuccess;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
    const dim3 &grid = config->gridDim, &block = config->blockDim;
    const size_t limit = emulation::dynamic_limit;
    emulation::dynamic_limit = 48 << 10;
    if (const cudaError_t code = emulation::ordered("CUDA_EMULATION_ERROR"); code != cudaSuccess)
        return emulation::failed(code);
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || !block.x ||
        block.x * block.y * block.z > 1024 || config->dynamicSmemBytes > limit) {
        return emulation::failed(cudaErrorInvalidConfiguration);
    }
    ++emulation::launches[emulation::device];
    emulation::run(grid, block, config->dynamicSmemBytes, [&] { kernel(static_cast<P>(arguments)...); });
    return cudaSuccess;
}
