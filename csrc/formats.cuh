// Loads and stores of fp16, bf16 and fp32 values, and scaling by powers of two.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "newton_schulz.h"
#include "ptx.cuh"

namespace jaguar {

constexpr uint32_t INFINITY_BITS = 0x7F800000u;

__device__ __forceinline__ uint16_t half_bits(float value) { return __half_as_ushort(__float2half_rn(value)); }

__device__ __forceinline__ float half_value(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

__device__ __forceinline__ uint16_t short_bits(float value, int format) {
    return format == JAGUAR_FP16 ? half_bits(value) : __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

__device__ __forceinline__ float short_value(uint16_t bits, int format) {
    return format == JAGUAR_FP16 ? half_value(bits) : __uint_as_float(uint32_t(bits) << 16);
}

__device__ __forceinline__ int format_bytes(int format) { return format == JAGUAR_FP32 ? 4 : 2; }

// The element at `index` of an array of this format.
__device__ __forceinline__ float load_value(uint64_t base, int64_t index, int format) {
    if (format == JAGUAR_FP32) return reinterpret_cast<const float*>(base)[index];
    return short_value(reinterpret_cast<const uint16_t*>(base)[index], format);
}

__device__ __forceinline__ void store_value(uint64_t base, int64_t index, int format, float value) {
    if (format == JAGUAR_FP32)
        reinterpret_cast<float*>(base)[index] = value;
    else
        reinterpret_cast<uint16_t*>(base)[index] = short_bits(value, format);
}

// Eight elements from `index` on, of which only `count` exist (the others are zero); `aligned`: the first of eight has
// an address that is a multiple of 16 bytes.
__device__ __forceinline__ void load_eight(float (&v)[8], uint64_t base, int64_t index, int count, int format,
                                           bool aligned) {
    if (!aligned || count < 8) {
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = i < count ? load_value(base, index + i, format) : 0.0f;
        return;
    }
    if (format == JAGUAR_FP32) {
        const float4* from = reinterpret_cast<const float4*>(base + uint64_t(index) * 4);
        const float4 low = from[0], high = from[1];
        v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
        v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
        return;
    }
    const uint4 from = *reinterpret_cast<const uint4*>(base + uint64_t(index) * 2);
    const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        v[2 * i] = short_value(uint16_t(words[i] & 0xFFFF), format);
        v[2 * i + 1] = short_value(uint16_t(words[i] >> 16), format);
    }
}

__device__ __forceinline__ uint4 pack_eight(const uint16_t (&v)[8]) {
    return make_uint4(v[0] | uint32_t(v[1]) << 16, v[2] | uint32_t(v[3]) << 16, v[4] | uint32_t(v[5]) << 16,
                      v[6] | uint32_t(v[7]) << 16);
}

// Magnitudes as integers order like the numbers, and NaN is the largest: no comparison loses it.
__device__ __forceinline__ uint32_t magnitude(float value) { return __float_as_uint(value) & 0x7FFFFFFFu; }

__device__ __forceinline__ float power_of_two(int exponent) { return __uint_as_float(uint32_t(exponent + 127) << 23); }

// Multiplication by the power of two that brings a largest magnitude into [1, 2): exact, hence better than a division,
// and in two factors, since the reciprocal of a subnormal number may be no fp32 number.
struct Unit {
    float first, second;
    int exponent;

    __device__ __forceinline__ explicit Unit(uint32_t largest) {
        const int field = int(largest >> 23);
        exponent = field ? field - 127 : -118 - __clz(int(largest));  // subnormal: bit 22 stands for 2^-127
        const int half = exponent / 2;
        first = power_of_two(-half);
        second = power_of_two(half - exponent);
    }

    __device__ __forceinline__ float operator()(float value) const { return value * first * second; }
};

}  // namespace jaguar
