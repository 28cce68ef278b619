// Reductions over a warp and over a thread block, in one fixed order: every thread gets the same bits, every time.
#pragma once
#include "formats.cuh"

namespace jaguar {

__device__ __forceinline__ uint32_t warp_maximum(uint32_t value) {
#pragma unroll
    for (int mask = 16; mask; mask >>= 1) value = max(value, shuffle_xor(value, mask));
    return value;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int mask = 16; mask; mask >>= 1)
        value = __fadd_rn(value, __uint_as_float(shuffle_xor(__float_as_uint(value), mask)));
    return value;
}

// `scratch`: one word of shared memory a warp. It may be used again after the next barrier.
template <int THREADS>
__device__ __forceinline__ uint32_t block_maximum(uint32_t value, uint32_t* scratch) {
    value = warp_maximum(value);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    for (int warp = 0; warp < THREADS / 32; ++warp) value = max(value, scratch[warp]);
    return value;
}

template <int THREADS>
__device__ __forceinline__ float block_sum(float value, uint32_t* scratch) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = __float_as_uint(value);
    __syncthreads();
    float sum = 0.0f;
    for (int warp = 0; warp < THREADS / 32; ++warp) sum = __fadd_rn(sum, __uint_as_float(scratch[warp]));
    return sum;
}

}  // namespace jaguar
