// Tensor maps for the TMA unit. The driver's encoder is looked up at run time: the library links no libcuda, so that it
// loads on machines without a driver.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace jaguar {

// fp16 matrices of `rows` rows of `columns` elements, strides in elements.
struct Matrix {
    uint64_t address;
    int64_t columns, rows, batch, row_stride, batch_stride;
};

using Encoder = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                             const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                             CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

inline Encoder find_encoder() {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encoder>(entry) : nullptr;
}

// Boxes of box_rows rows of 64 elements, swizzled by 128 bytes; elements outside of the matrix are loaded as zero.
inline bool encode(CUtensorMap* map, const Matrix& x, uint32_t box_columns, uint32_t box_rows) {
    static const Encoder encoder = find_encoder();
    if (!encoder) return false;
    const int64_t batch_stride = x.batch > 1 ? x.batch_stride : x.row_stride * x.rows;
    const cuuint64_t sizes[3] = {cuuint64_t(x.columns), cuuint64_t(x.rows), cuuint64_t(x.batch)};
    const cuuint64_t strides[2] = {cuuint64_t(x.row_stride) * 2, cuuint64_t(batch_stride) * 2};
    const cuuint32_t box[3] = {box_columns, box_rows, 1}, steps[3] = {1, 1, 1};
    return encoder(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3, reinterpret_cast<void*>(x.address), sizes, strides, box,
                   steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace jaguar
