// 64x64 blocks of 16-bit values in shared memory, from which rows and columns both leave as 16-byte vectors.
#pragma once
#include "formats.cuh"

namespace jaguar {

constexpr int BLOCK = 64;                      // edge of a block
constexpr int BLOCK_BYTES = BLOCK * BLOCK * 2;
constexpr int BLOCK_VECTORS = BLOCK * BLOCK / 8;

// Position of an element. The vectors of a row are permuted by its number, in two digits: then neither the rows of a
// fragment nor the column that a transposed store gathers meet in one memory bank.
__device__ __forceinline__ int staged(int row, int column) {
    return row * BLOCK + ((((column >> 3) ^ row ^ (row >> 3)) & 7) << 3) + (column & 7);
}

// A vector of eight, or what of it exists (none where `exists` <= 0).
__device__ __forceinline__ void store_eight(uint16_t* to, const uint16_t (&v)[8], int exists) {
    if (exists >= 8) {
        store16(to, pack_eight(v));
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (i < exists) to[i] = v[i];
}

// The part of a block that exists, to memory, by `threads` threads; `to` is the address of its element (0, 0).
__device__ __forceinline__ void store_rows(const uint16_t* block, uint16_t* to, int64_t stride, int rows, int columns,
                                           int thread, int threads) {
#pragma unroll 1
    for (int vector = thread; vector < BLOCK_VECTORS; vector += threads) {
        const int row = vector >> 3, column = (vector & 7) * 8;
        if (row >= rows) break;
        if (column + 8 <= columns) {
            store16(to + row * stride + column, *reinterpret_cast<const uint4*>(block + staged(row, column)));
        } else {
            for (int i = column; i < columns; ++i) to[row * stride + i] = block[staged(row, i)];
        }
    }
}

__device__ __forceinline__ void store_columns(const uint16_t* block, uint16_t* to, int64_t stride, int rows,
                                              int columns, int thread, int threads) {
#pragma unroll 1
    for (int vector = thread; vector < BLOCK_VECTORS; vector += threads) {
        const int column = vector >> 3, row = (vector & 7) * 8;
        if (column >= columns) break;
        uint16_t v[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = block[staged(row + i, column)];
        store_eight(to + column * stride + row, v, rows - row);
    }
}

// The lower triangle of a square block and its mirror image.
__device__ __forceinline__ void store_mirrored(const uint16_t* block, uint16_t* to, int64_t stride, int rows,
                                               int thread, int threads) {
#pragma unroll 1
    for (int vector = thread; vector < BLOCK_VECTORS; vector += threads) {
        const int row = vector >> 3, column = (vector & 7) * 8;
        if (row >= rows) break;
        uint16_t v[8];
#pragma unroll
        for (int i = 0; i < 8; ++i)
            v[i] = block[row >= column + i ? staged(row, column + i) : staged(column + i, row)];
        store_eight(to + row * stride + column, v, rows - column);
    }
}

__device__ __forceinline__ void load_rows(uint16_t* block, const uint16_t* from, int64_t stride, int rows, int columns,
                                          int thread, int threads) {
#pragma unroll 1
    for (int vector = thread; vector < BLOCK_VECTORS; vector += threads) {
        const int row = vector >> 3, column = (vector & 7) * 8;
        if (row >= rows) break;
        if (column + 8 <= columns) {
            *reinterpret_cast<uint4*>(block + staged(row, column)) =
                *reinterpret_cast<const uint4*>(from + row * stride + column);
        } else {
            for (int i = column; i < columns; ++i) block[staged(row, i)] = from[row * stride + i];
        }
    }
}

}  // namespace jaguar
