// From fp32 accumulators to D: alpha acc + beta C, in fp32 with one rounding, and the stores of a 64x64 block.
#pragma once
#include "staging.cuh"

namespace jaguar {

constexpr int EPILOGUE_THREADS = 128;  // each group of four warps has its own staging block and barrier

// `fragment(put)` calls put(row, column, v0, v1) for the calling thread's accumulators of the block at (row0, column0).
// Of a triangle, blocks above the diagonal are left out: they are the mirror images of others.
template <typename Fragment>
__device__ __forceinline__ void epilogue_block(const jaguar_product_args& p, int batch, int row0, int column0,
                                               uint16_t* block, int group, int thread, Fragment fragment) {
    const int rows = min(p.m - row0, BLOCK), columns = min(p.n - column0, BLOCK);
    if (rows <= 0 || columns <= 0 || (p.triangle && column0 > row0)) return;
    if (p.c) {
        const uint16_t* c = reinterpret_cast<const uint16_t*>(p.c) + batch * p.c_batch + row0 * p.c_row + column0;
        load_rows(block, c, p.c_row, rows, columns, thread, EPILOGUE_THREADS);
        group_barrier(1 + group, EPILOGUE_THREADS);
    }
    fragment([&](int row, int column, float v0, float v1) {
        uint32_t* pair = reinterpret_cast<uint32_t*>(block + staged(row, column));
        v0 = __fmul_rn(p.alpha, v0);
        v1 = __fmul_rn(p.alpha, v1);
        if (p.c) {
            v0 = __fmaf_rn(p.beta, half_value(uint16_t(*pair & 0xFFFF)), v0);
            v1 = __fmaf_rn(p.beta, half_value(uint16_t(*pair >> 16)), v1);
        }
        *pair = short_bits(v0, p.d_format) | uint32_t(short_bits(v1, p.d_format)) << 16;
    });
    group_barrier(1 + group, EPILOGUE_THREADS);
    uint16_t* d = reinterpret_cast<uint16_t*>(p.d) + batch * p.d_batch;
    uint16_t* direct = d + row0 * p.d_row + column0;
    uint16_t* transposed = d + column0 * p.d_row + row0;
    if (p.triangle && row0 == column0) {
        store_mirrored(block, direct, p.d_row, rows, thread, EPILOGUE_THREADS);
    } else {
        if (!p.d_transposed) store_rows(block, direct, p.d_row, rows, columns, thread, EPILOGUE_THREADS);
        if (p.d_transposed || p.triangle)
            store_columns(block, transposed, p.d_row, rows, columns, thread, EPILOGUE_THREADS);
    }
    group_barrier(1 + group, EPILOGUE_THREADS);
}

}  // namespace jaguar
