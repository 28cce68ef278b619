// Tensor maps of the emulator: what cuTensorMapEncodeTiled checks and stores.
#pragma once
#include "cuda_runtime.h"

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

struct alignas(64) CUtensorMap {
    const unsigned char* address;
    int64_t sizes[3], strides[2];
    int32_t box[3];
};

inline CUresult emulated_encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    bool ok = rank == 3 && reinterpret_cast<uintptr_t>(address) % 16 == 0 && box[0] * 2 <= 128;
    for (int i = 0; i < 3; ++i)
        ok = ok && sizes[i] > 0 && sizes[i] <= uint64_t(1) << 32 && box[i] > 0 && box[i] <= 256 && steps[i] == 1;
    for (int i = 0; i < 2; ++i) ok = ok && strides[i] % 16 == 0 && strides[i] < uint64_t(1) << 40;
    if (!ok) return CUDA_ERROR_INVALID_VALUE;
    map->address = static_cast<const unsigned char*>(address);
    for (int i = 0; i < 3; ++i) map->sizes[i] = int64_t(sizes[i]), map->box[i] = int32_t(box[i]);
    for (int i = 0; i < 2; ++i) map->strides[i] = int64_t(strides[i]);
    return CUDA_SUCCESS;
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
enum { cudaEnableDefault };

inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** entry, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* found) {
    *entry = reinterpret_cast<void*>(emulated_encode);
    *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
