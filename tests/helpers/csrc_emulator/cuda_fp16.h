#pragma once
#include "cuda_runtime.h"

struct __half {
    uint16_t bits;
};
inline __half __float2half_rn(float value) { return {emulator::float_to_half(value)}; }
inline float __half2float(__half value) { return emulator::half_to_float(value.bits); }
inline uint16_t __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
