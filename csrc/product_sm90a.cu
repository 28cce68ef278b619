// The product on Hopper: one warp fills a ring of stages by TMA, two warpgroups of 64 rows each empty it by wgmma.
#include "epilogue.cuh"
#include "launch.h"
#include "ptx_sm90a.cuh"
#include "tensor_map.h"
#include "tiles.h"

namespace jaguar {
namespace {

constexpr int TILE_M = 128, DEPTH = 64, CONSUMER_WARPS = 8, THREADS = 32 * (CONSUMER_WARPS + 1);
constexpr int ROW_BYTES = DEPTH * 2;  // 64 values of 16 bits: exactly one period of the 128-byte swizzle
constexpr int A_BYTES = TILE_M * ROW_BYTES;
constexpr int B_BLOCK_BYTES = DEPTH * ROW_BYTES;  // 64 k by 64 n, n contiguous

template <int TILE_N>
struct Plan {
    // 128 columns: 113 KB and 96 registers, so that two blocks share an SM and one multiplies while the other stores.
    // 256 columns: one block an SM, which stays and loads its next tile while it stores this one.
    static constexpr bool PERSISTENT = TILE_N == 256;
    static constexpr int BLOCKS_PER_SM = PERSISTENT ? 1 : 2;
    static constexpr int STAGES = TILE_N == 128 ? 3 : 4;
    static constexpr int STAGE_BYTES = A_BYTES + TILE_N * ROW_BYTES;
    static constexpr int BLOCKS = STAGES * STAGE_BYTES;  // offset of the two staging blocks
    static constexpr int BARRIERS = BLOCKS + 2 * BLOCK_BYTES;
    static constexpr int SHARED_BYTES = BARRIERS + STAGES * 16;
    // An SM has 228 KB, given out in pieces of 128 bytes, and keeps 1 KB for itself with every block.
    static_assert(BLOCKS_PER_SM * ((SHARED_BYTES + 127) / 128 * 128 + 1024) <= 228 * 1024, "the blocks of an SM");
};

// wgmma descriptor of a tile with the 128-byte swizzle. `leading` counts only where n is contiguous: from one 64
// columns to the next 64. `stride`: from one eight rows (k contiguous) or eight k (n contiguous) to the next.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
    constexpr uint64_t SWIZZLE_128 = uint64_t(1) << 62;
    return SWIZZLE_128 | uint64_t(stride >> 4) << 32 | uint64_t(leading >> 4) << 16 | (address & 0x3FFFF) >> 4;
}

// Position in the ring of stages; the parity of a stage's barriers flips with each round.
template <int STAGES>
struct Ring {
    int stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// Computed by the host: as arguments these numbers cost the kernel no registers.
struct Work {
    CUtensorMap a, b;
    int32_t a_batched, b_batched;  // 0: one operand for the whole batch
    uint32_t rows, columns, tiles;
};

template <int TILE_N, bool B_TRANSPOSED>
__device__ __forceinline__ void produce(const jaguar_product_args& p, const Work& work, uint32_t shared) {
    using P = Plan<TILE_N>;
    const uint32_t full = shared + P::BARRIERS, empty = full + P::STAGES * 8;
    tma_prefetch(&work.a);
    tma_prefetch(&work.b);
    Ring<P::STAGES> ring;
    uint32_t index = blockIdx.x;
    do {
        const Tile tile = tile_at(index, work.rows, work.columns, p.triangle);
        const int row0 = tile.row * TILE_M, column0 = tile.column * TILE_N;
        const int a_batch = tile.batch * work.a_batched, b_batch = tile.batch * work.b_batched;
        for (int k = 0; k < p.k; k += DEPTH, ring.advance()) {
            barrier_wait(empty + ring.stage * 8, ring.parity ^ 1);
            const uint32_t barrier = full + ring.stage * 8;
            const uint32_t a = shared + ring.stage * P::STAGE_BYTES, b = a + A_BYTES;
            barrier_arrive_expect(barrier, P::STAGE_BYTES);
            tma_load(a, &work.a, barrier, k, row0, a_batch);
            if (B_TRANSPOSED) {
                tma_load(b, &work.b, barrier, k, column0, b_batch);
            } else {
#pragma unroll
                for (int i = 0; i < TILE_N / 64; ++i)
                    tma_load(b + i * B_BLOCK_BYTES, &work.b, barrier, column0 + i * 64, k, b_batch);
            }
        }
    } while (P::PERSISTENT && (index += gridDim.x) < work.tiles);
}

template <int TILE_N, bool B_TRANSPOSED>
__device__ __forceinline__ void multiply_stage(float (&acc)[TILE_N / 2], uint32_t a, uint32_t b, bool accumulate) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
        const uint64_t from_a = descriptor(a + k * 2, 16, 8 * ROW_BYTES);
        const uint64_t from_b = B_TRANSPOSED ? descriptor(b + k * 2, 16, 8 * ROW_BYTES)
                                             : descriptor(b + k * ROW_BYTES, B_BLOCK_BYTES, 8 * ROW_BYTES);
        wgmma<!B_TRANSPOSED>(acc, from_a, from_b, accumulate || k > 0);
    }
    wgmma_commit();
}

template <int TILE_N, bool B_TRANSPOSED>
__device__ __forceinline__ void consume(const jaguar_product_args& p, const Work& work, unsigned char* memory) {
    using P = Plan<TILE_N>;
    const uint32_t shared = shared_address(memory), full = shared + P::BARRIERS, empty = full + P::STAGES * 8;
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % 32;
    uint16_t* block = reinterpret_cast<uint16_t*>(memory + P::BLOCKS + group * BLOCK_BYTES);
    Ring<P::STAGES> ring;
    uint32_t index = blockIdx.x;
    do {
        float acc[TILE_N / 2];
        int previous = 0;
        for (int k = 0; k < p.k; k += DEPTH, ring.advance()) {
            barrier_wait(full + ring.stage * 8, ring.parity);
            const uint32_t a = shared + ring.stage * P::STAGE_BYTES;
            multiply_stage<TILE_N, B_TRANSPOSED>(acc, a + group * 64 * ROW_BYTES, a + A_BYTES, k > 0);
            wgmma_wait<1>();  // the products of the stage before are done; those of this one keep running
            if (k > 0 && lane == 0) barrier_arrive(empty + previous * 8);
            previous = ring.stage;
        }
        wgmma_wait<0>();
        wgmma_results(acc);
        if (lane == 0) barrier_arrive(empty + previous * 8);
        const Tile tile = tile_at(index, work.rows, work.columns, p.triangle);
#pragma unroll
        for (int part = 0; part < TILE_N / 64; ++part) {
            epilogue_block(p, tile.batch, tile.row * TILE_M + group * 64, tile.column * TILE_N + part * 64, block, group,
                           thread, [&](auto put) {
                               const int row = thread / 32 * 16 + lane / 4;
#pragma unroll
                               for (int j = 0; j < 8; ++j) {
                                   const float* pair = acc + part * 32 + j * 4;
                                   const int column = 8 * j + lane % 4 * 2;
                                   put(row, column, pair[0], pair[1]);
                                   put(row + 8, column, pair[2], pair[3]);
                               }
                           });
        }
    } while (P::PERSISTENT && (index += gridDim.x) < work.tiles);
}

template <int TILE_N, bool B_TRANSPOSED>
__global__ void __launch_bounds__(THREADS, Plan<TILE_N>::BLOCKS_PER_SM)
    product_kernel(const jaguar_product_args p, const __grid_constant__ Work work) {
    using P = Plan<TILE_N>;
    unsigned char* memory = shared_memory();
    const uint32_t shared = shared_address(memory), full = shared + P::BARRIERS;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < P::STAGES; ++stage) {
            barrier_init(full + stage * 8, 1);
            barrier_init(full + (P::STAGES + stage) * 8, CONSUMER_WARPS);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 32 * CONSUMER_WARPS)
        consume<TILE_N, B_TRANSPOSED>(p, work, memory);
    else if (threadIdx.x == 32 * CONSUMER_WARPS)
        produce<TILE_N, B_TRANSPOSED>(p, work, shared);
}

template <int TILE_N, bool B_TRANSPOSED>
int launch_tiles(const jaguar_product_args& p, uint64_t stream) {
    using P = Plan<TILE_N>;
    const int64_t rows = ceil_div(p.m, TILE_M), columns = ceil_div(p.n, TILE_N);
    const int64_t tiles = tile_count(p.batch, rows, columns, p.triangle);
    if (tiles > MAX_GRID) return JAGUAR_BAD_SHAPE;
    Work work = {};
    work.rows = uint32_t(rows), work.columns = uint32_t(columns), work.tiles = uint32_t(tiles);
    work.a_batched = p.batch > 1 && p.a_batch != 0;
    work.b_batched = p.batch > 1 && p.b_batch != 0;
    const Matrix a = {p.a, p.k, p.m, work.a_batched ? p.batch : 1, p.a_row, p.a_batch};
    const Matrix b = {p.b, B_TRANSPOSED ? p.k : p.n, B_TRANSPOSED ? p.n : p.k, work.b_batched ? p.batch : 1, p.b_row,
                      p.b_batch};
    if (!encode(&work.a, a, DEPTH, TILE_M) || !encode(&work.b, b, DEPTH, B_TRANSPOSED ? TILE_N : DEPTH))
        return JAGUAR_NO_KERNEL;
    const int64_t resident = device_attribute<cudaDevAttrMultiProcessorCount>();
    const int64_t grid = P::PERSISTENT && tiles > resident ? resident : tiles;
    return launch(product_kernel<TILE_N, B_TRANSPOSED>, dim3(unsigned(grid)), THREADS, P::SHARED_BYTES, stream, p, work);
}

}  // namespace

int product_sm90a(const jaguar_product_args& p, uint64_t stream) {
    const int sms = device_attribute<cudaDevAttrMultiProcessorCount>();
    if (!p.triangle && wide_is_faster(p.batch, p.m, p.n, sms))
        return p.b_transposed ? launch_tiles<256, true>(p, stream) : launch_tiles<256, false>(p, stream);
    return p.b_transposed ? launch_tiles<128, true>(p, stream) : launch_tiles<128, false>(p, stream);
}

}  // namespace jaguar
