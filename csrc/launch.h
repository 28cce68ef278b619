// Common parts of the launchers: attributes of the current device, asked for once, and a typed launch.
#pragma once
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "newton_schulz.h"

#define JAGUAR_EXPORT extern "C" __attribute__((visibility("default")))

namespace jaguar {

constexpr int CACHED_DEVICES = 64;

template <cudaDeviceAttr ATTRIBUTE>
int device_attribute() {
    static std::atomic<int> known[CACHED_DEVICES];  // the value + 1; 0: not yet asked
    int device = 0, value = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    if (device < CACHED_DEVICES) value = known[device].load(std::memory_order_relaxed);
    if (value) return value - 1;
    if (cudaDeviceGetAttribute(&value, ATTRIBUTE, device) != cudaSuccess) return 0;
    if (device < CACHED_DEVICES) known[device].store(value + 1, std::memory_order_relaxed);
    return value;
}

inline int capability() {
    return 10 * device_attribute<cudaDevAttrComputeCapabilityMajor>() +
           device_attribute<cudaDevAttrComputeCapabilityMinor>();
}

template <typename... P>
int launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared, uint64_t stream, const P&... arguments) {
    if (shared > 48 * 1024) {
        const void* function = reinterpret_cast<const void*>(kernel);
        cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
        // Kernels that use this much count on as many blocks on an SM as fit into all of its memory, not into a share
        // that the driver would pick.
        if (error == cudaSuccess)
            error = cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                         cudaSharedmemCarveoutMaxShared);
        if (error != cudaSuccess) return int(error);
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    return int(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// No kernel of this extension runs on the current device; the device's own error if there is one (no driver, no GPU).
inline int unsupported() {
    int device = 0;
    const cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return int(error);
    return capability() < 80 ? int(JAGUAR_NO_KERNEL) : int(JAGUAR_OK);
}

int product_sm80(const jaguar_product_args& args, uint64_t stream);

// JAGUAR_NO_KERNEL where the TMA unit cannot describe the operands.
int product_sm90a(const jaguar_product_args& args, uint64_t stream);

}  // namespace jaguar
