// jaguar_prepare: largest magnitude, sum of squares, conversion; each matrix in JAGUAR_PARTS parts for the first two.
#include "launch.h"
#include "reduce.cuh"
#include "staging.cuh"
#include "tiles.h"

namespace jaguar {
namespace {

constexpr int REDUCE_THREADS = 512, CONVERT_THREADS = 256;
constexpr uint32_t NAN_BITS = 0x7FC00000u;

// Calls f with the values of this thread in this block's part of the matrix.
template <typename F>
__device__ __forceinline__ void visit_part(const jaguar_prepare_args& p, F f) {
    const int64_t count = int64_t(p.rows) * p.cols;
    const int64_t each = ceil_div(ceil_div(count, 8), JAGUAR_PARTS);
    const int64_t end = min((blockIdx.x + 1) * each * 8, count);
#pragma unroll 4
    for (int64_t i = (blockIdx.x * each + threadIdx.x) * 8; i < end; i += REDUCE_THREADS * 8) {
        float v[8];
        load_eight(v, p.g[blockIdx.y], i, int(min(end - i, int64_t(8))), p.g_format, true);
#pragma unroll
        for (int e = 0; e < 8; ++e) f(v[e]);
    }
}

__device__ __forceinline__ float* statistics(const jaguar_prepare_args& p, int which) {
    return reinterpret_cast<float*>(p.statistics) + (int64_t(blockIdx.y) * 2 + which) * JAGUAR_PARTS;
}

__device__ __forceinline__ uint32_t largest_of_parts(const jaguar_prepare_args& p) {
    const uint32_t* parts = reinterpret_cast<const uint32_t*>(statistics(p, 0));
    const int lane = threadIdx.x % 32;
    return warp_maximum(max(parts[lane], parts[lane + 32]));
}
static_assert(JAGUAR_PARTS == 64, "two parts for each lane of a warp");

__global__ void __launch_bounds__(REDUCE_THREADS, 2) maximum_kernel(const __grid_constant__ jaguar_prepare_args p) {
    uint32_t largest = 0;
    visit_part(p, [&](float value) { largest = max(largest, magnitude(value)); });
    largest = block_maximum<REDUCE_THREADS>(largest, reinterpret_cast<uint32_t*>(shared_memory()));
    if (threadIdx.x == 0) statistics(p, 0)[blockIdx.x] = __uint_as_float(largest);
}

__global__ void __launch_bounds__(REDUCE_THREADS, 2) squares_kernel(const __grid_constant__ jaguar_prepare_args p) {
    const Unit unit(largest_of_parts(p));
    float sum = 0.0f;
    visit_part(p, [&](float value) {
        const float x = unit(value);
        sum = __fmaf_rn(x, x, sum);
    });
    sum = block_sum<REDUCE_THREADS>(sum, reinterpret_cast<uint32_t*>(shared_memory()));
    if (threadIdx.x == 0) statistics(p, 1)[blockIdx.x] = sum;
}

// One 64x64 block of G, through shared memory, so that rows are read and rows are written.
__global__ void __launch_bounds__(CONVERT_THREADS, 4) convert_kernel(const __grid_constant__ jaguar_prepare_args p) {
    const uint32_t largest = largest_of_parts(p);
    const float* parts = statistics(p, 1);
    const int lane = threadIdx.x % 32;
    const float sum = warp_sum(__fadd_rn(parts[lane], parts[lane + 32]));
    const Unit unit(largest);
    float factor = __fdiv_rn(p.scale, __fsqrt_rn(sum));
    if (largest == 0) factor = 0.0f;
    if (largest >= INFINITY_BITS) factor = __uint_as_float(NAN_BITS);  // makes even the zeros NaN

    const int g_rows = p.transposed ? p.cols : p.rows, g_columns = p.transposed ? p.rows : p.cols;
    const uint32_t across = uint32_t(ceil_div(g_columns, BLOCK));
    const int row0 = int(blockIdx.x / across) * BLOCK, column0 = int(blockIdx.x % across) * BLOCK;
    const int rows = min(g_rows - row0, BLOCK), columns = min(g_columns - column0, BLOCK);
    uint16_t* block = reinterpret_cast<uint16_t*>(shared_memory());
    for (int vector = threadIdx.x; vector < BLOCK_VECTORS; vector += CONVERT_THREADS) {
        const int row = vector >> 3, column = (vector & 7) * 8;
        const int64_t index = int64_t(row0 + row) * g_columns + column0 + column;
        float v[8];
        load_eight(v, p.g[blockIdx.y], index, row < rows ? columns - column : 0, p.g_format, g_columns % 8 == 0);
        uint16_t x[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) x[e] = half_bits(__fmul_rn(unit(v[e]), factor));
        *reinterpret_cast<uint4*>(block + staged(row, column)) = pack_eight(x);
    }
    __syncthreads();
    uint16_t* x = reinterpret_cast<uint16_t*>(p.x) + blockIdx.y * p.x_batch;
    if (p.transposed)
        store_columns(block, x + column0 * p.x_row + row0, p.x_row, rows, columns, threadIdx.x, CONVERT_THREADS);
    else
        store_rows(block, x + row0 * p.x_row + column0, p.x_row, rows, columns, threadIdx.x, CONVERT_THREADS);
}

int refusal(const jaguar_prepare_args& p) {
    constexpr int32_t MAX_SIZE = 1 << 30;
    if (p.batch < 1 || p.batch > JAGUAR_MAX_BATCH || p.rows < 1 || p.cols < 1 || p.rows > MAX_SIZE ||
        p.cols > MAX_SIZE || p.g_format < JAGUAR_FP16 || p.g_format > JAGUAR_FP32 || !p.x || !p.statistics)
        return JAGUAR_BAD_SHAPE;
    if (p.x % 16 || p.statistics % 16 || p.x_batch % 8 || p.x_row % 8) return JAGUAR_BAD_ALIGNMENT;
    for (int i = 0; i < p.batch; ++i) {
        if (!p.g[i]) return JAGUAR_BAD_SHAPE;
        if (p.g[i] % 16) return JAGUAR_BAD_ALIGNMENT;
    }
    return JAGUAR_OK;
}

}  // namespace
}  // namespace jaguar

JAGUAR_EXPORT int jaguar_prepare(const jaguar_prepare_args* args, uint64_t stream) {
    using namespace jaguar;
    const jaguar_prepare_args& p = *args;
    if (const int code = refusal(p)) return code;
    const int64_t blocks = ceil_div(p.rows, BLOCK) * ceil_div(p.cols, BLOCK);
    if (blocks > MAX_GRID) return JAGUAR_BAD_SHAPE;
    if (const int code = unsupported()) return code;
    const dim3 parts(JAGUAR_PARTS, unsigned(p.batch));
    const size_t words = REDUCE_THREADS / 32 * sizeof(uint32_t);
    if (const int code = launch(maximum_kernel, parts, REDUCE_THREADS, words, stream, p)) return code;
    if (const int code = launch(squares_kernel, parts, REDUCE_THREADS, words, stream, p)) return code;
    return launch(convert_kernel, dim3(unsigned(blocks), unsigned(p.batch)), CONVERT_THREADS, BLOCK_BYTES, stream, p);
}
