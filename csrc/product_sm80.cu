// The product with mma.sync and cp.async: 128x128 tiles, eight warps of 32x64, four stages of depth 32.
#include "epilogue.cuh"
#include "launch.h"
#include "tiles.h"

namespace jaguar {
namespace {

constexpr int TILE = 128, DEPTH = 32, STAGES = 4, THREADS = 256;
constexpr int OPERAND = TILE * DEPTH;  // elements of one operand in one stage
constexpr int SHARED_BYTES = STAGES * 2 * OPERAND * 2;
static_assert(SHARED_BYTES >= THREADS / EPILOGUE_THREADS * BLOCK_BYTES, "the epilogue reuses the stages");

// Offsets of 16-byte vectors, permuted so that eight rows of an 8x8 matrix lie in eight different banks.
__device__ __forceinline__ int k_contiguous(int row, int vector) {
    return row * DEPTH + ((vector ^ ((row >> 1) & 3)) << 3);
}

__device__ __forceinline__ int n_contiguous(int k, int vector) { return k * TILE + ((vector ^ (k & 7)) << 3); }

struct Operand {
    const uint16_t* base;
    int64_t stride;
    int rows, columns;  // rows of memory and elements in each
};

// ROWS x COLUMNS of an operand from (row0, column0) on; what lies outside of it becomes zero.
template <int ROWS, int COLUMNS, typename Offset>
__device__ __forceinline__ void load_tile(const Operand& x, int row0, int column0, uint32_t to, Offset offset) {
    constexpr int VECTORS = COLUMNS / 8;
#pragma unroll
    for (int i = 0; i < ROWS * VECTORS / THREADS; ++i) {
        const int index = i * THREADS + threadIdx.x;
        const int row = index / VECTORS, vector = index % VECTORS, column = column0 + vector * 8;
        const int exists = row0 + row < x.rows ? min(max(x.columns - column, 0), 8) : 0;
        const uint16_t* from = exists ? x.base + (row0 + row) * x.stride + column : x.base;
        copy16_async(to + offset(row, vector) * 2, from, exists * 2);
    }
}

template <bool B_TRANSPOSED>
__device__ __forceinline__ void load_stage(const Operand& a, const Operand& b, int row0, int column0, int depth0,
                                           uint32_t stage) {
    load_tile<TILE, DEPTH>(a, row0, depth0, stage, k_contiguous);
    if (B_TRANSPOSED)
        load_tile<TILE, DEPTH>(b, column0, depth0, stage + OPERAND * 2, k_contiguous);
    else
        load_tile<DEPTH, TILE>(b, depth0, column0, stage + OPERAND * 2, n_contiguous);
}

// One stage of this warp's 32x64 part.
template <bool B_TRANSPOSED>
__device__ __forceinline__ void multiply_stage(float (&acc)[2][8][4], uint32_t stage, int row, int column, int lane) {
#pragma unroll
    for (int k = 0; k < DEPTH / 8; k += 2) {
        uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i)
            load_matrices(a[i], stage + k_contiguous(row + 16 * i + (lane & 15), k + (lane >> 4)) * 2);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            uint32_t b[4];
            const uint32_t from = stage + OPERAND * 2;
            if (B_TRANSPOSED) {
                const int n = column + 16 * j + (lane & 7) + (lane >> 4) * 8;
                load_matrices(b, from + k_contiguous(n, k + ((lane >> 3) & 1)) * 2);
            } else {
                const int vector = column / 8 + 2 * j + (lane >> 4);
                load_matrices_transposed(b, from + n_contiguous(k * 8 + (lane & 15), vector) * 2);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                mma(acc[i][2 * j], a[i], b[0], b[1]);
                mma(acc[i][2 * j + 1], a[i], b[2], b[3]);
            }
        }
    }
}

template <bool B_TRANSPOSED>
__global__ void __launch_bounds__(THREADS, 2) product_kernel(const jaguar_product_args p) {
    const Tile tile = tile_at(blockIdx.x, ceil_div(p.m, TILE), ceil_div(p.n, TILE), p.triangle);
    const int row0 = tile.row * TILE, column0 = tile.column * TILE;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = warp / 4, row = group * 64 + (warp >> 1 & 1) * 32, column = (warp & 1) * 64;
    const uint32_t shared = shared_address(shared_memory());

    const Operand a = {reinterpret_cast<const uint16_t*>(p.a) + tile.batch * p.a_batch, p.a_row, p.m, p.k};
    const Operand b = {reinterpret_cast<const uint16_t*>(p.b) + tile.batch * p.b_batch, p.b_row,
                       B_TRANSPOSED ? p.n : p.k, B_TRANSPOSED ? p.k : p.n};
    const auto load = [&](int step) {
        if (step * DEPTH < p.k)
            load_stage<B_TRANSPOSED>(a, b, row0, column0, step * DEPTH, shared + step % STAGES * 4 * OPERAND);
        copy_commit();  // also an empty group: the number of groups tells which stage is complete
    };

    float acc[2][8][4] = {};
    const int steps = int(ceil_div(p.k, DEPTH));
    for (int step = 0; step < STAGES - 1; ++step) load(step);
    for (int step = 0; step < steps; ++step) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        load(step + STAGES - 1);  // into the stage that every warp left before the barrier
        multiply_stage<B_TRANSPOSED>(acc, shared + step % STAGES * 4 * OPERAND, row, column, lane);
    }
    copy_wait<0>();
    __syncthreads();

    uint16_t* block = reinterpret_cast<uint16_t*>(shared_memory() + group * BLOCK_BYTES);
    for (int part = 0; part < 2; ++part) {
        epilogue_block(p, tile.batch, row0 + group * 64, column0 + part * 64, block, group, threadIdx.x % 128,
                       [&](auto put) {
                           if (column != part * 64) return;
#pragma unroll
                           for (int i = 0; i < 2; ++i)
#pragma unroll
                               for (int j = 0; j < 8; ++j) {
                                   const int r = row % 64 + 16 * i + lane / 4, c = 8 * j + lane % 4 * 2;
                                   put(r, c, acc[i][j][0], acc[i][j][1]);
                                   put(r + 8, c, acc[i][j][2], acc[i][j][3]);
                               }
                       });
    }
}

}  // namespace

int product_sm80(const jaguar_product_args& p, uint64_t stream) {
    const int64_t tiles = tile_count(p.batch, ceil_div(p.m, TILE), ceil_div(p.n, TILE), p.triangle);
    if (tiles > MAX_GRID) return JAGUAR_BAD_SHAPE;
    const auto kernel = p.b_transposed ? product_kernel<true> : product_kernel<false>;
    return launch(kernel, dim3(unsigned(tiles)), THREADS, SHARED_BYTES, stream, p);
}

}  // namespace jaguar
