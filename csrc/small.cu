// jaguar_small: one thread block a matrix. G is read three times (largest magnitude, Gram matrix, result; the second and
// third time from the L2 cache), in chunks of columns; the iteration on the n x n matrices stays in shared memory, fp32.
#include "launch.h"
#include "small_products.cuh"

namespace jaguar {
namespace {

constexpr uint32_t NAN_BITS = 0x7FC00000u;

// O = Q X for one chunk: slices of 16 columns for each warp. Where n is contiguous the transposed product, O^T = X^T Q,
// so that the two accumulators of a pair are neighbours in memory either way.
template <int N, bool ALONG_M>
__device__ __forceinline__ void apply(const Shared<N>& s, const jaguar_small_item& item, int format, int64_t column0,
                                      int width, float factor) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int column = warp * 16; column < width; column += SMALL_THREADS / 32 * 16) {
        float acc[N / 16][2][4] = {};
        apply_slice<N, ALONG_M>(acc, s, column, lane);
#pragma unroll
        for (int tile = 0; tile < N / 16; ++tile)
#pragma unroll
            for (int half = 0; half < 4; ++half) {  // row of the fragment (second bit) and tile of eight (first bit)
                const float* pair = &acc[tile][half & 1][half & 2];
                const int row = (ALONG_M ? tile * 16 : 0) + lane / 4 + (half & 2) * 4;
                const int next = (ALONG_M ? 0 : tile * 16) + (half & 1) * 8 + lane % 4 * 2;
                const int64_t i = ALONG_M ? row : next, j = column0 + column + (ALONG_M ? next : row);
                if (i >= item.n || j >= item.m) continue;
                const bool both = ALONG_M ? j + 1 < item.m : i + 1 < item.n;
                store_pair(item.out, i * item.stride_n + j * item.stride_m, format, pair[0] * factor, pair[1] * factor,
                           both);
            }
    }
}

__device__ __forceinline__ void fill(const jaguar_small_item& item, int format, float value) {
    const bool along_m = item.stride_m == 1;
    const int64_t inner = along_m ? item.m : item.n, outer = along_m ? item.n : item.m;
    const int64_t stride = along_m ? item.stride_n : item.stride_m;
    for (int64_t o = threadIdx.x / 32; o < outer; o += SMALL_THREADS / 32)
        for (int64_t i = threadIdx.x % 32; i < inner; i += 32) store_value(item.out, o * stride + i, format, value);
}

template <int N>
__global__ void __launch_bounds__(SMALL_THREADS, 2) small_kernel(const __grid_constant__ jaguar_small_args p) {
    const Shared<N> s(shared_memory());
    const jaguar_small_item item = reinterpret_cast<const jaguar_small_item*>(p.items)[blockIdx.x];
    const int64_t last = (item.m - 1) / s.CHUNK * s.CHUNK;
    const auto width_at = [&](int64_t column) { return int(min((item.m - column + 15) / 16 * 16, int64_t(s.CHUNK))); };

    uint32_t largest = 0;
    for (int64_t column = 0; column < item.m; column += s.CHUNK)
        read_chunk<N>(item, p.g_format, column, width_at(column), [&](const float(&v)[8], int, int, bool) {
#pragma unroll
            for (int e = 0; e < 8; ++e) largest = max(largest, magnitude(v[e]));
        });
    largest = block_maximum<SMALL_THREADS>(largest, s.scratch);
    if (largest == 0) return fill(item, p.o_format, 0.0f);
    if (largest >= INFINITY_BITS) return fill(item, p.o_format, __uint_as_float(NAN_BITS));

    const Unit unit(largest);
    GramAccumulators<N> gram = {};
    for (int64_t column = 0; column < item.m; column += s.CHUNK) {
        __syncthreads();
        load_chunk<N>(s, item, p.g_format, column, width_at(column), unit);
        __syncthreads();
        gram_chunk<N>(gram, s, width_at(column));
    }
    const float trace = gram_finish<N>(gram, s);
    scale_and_shift<N>(s.r, __fdiv_rn(__fmul_rn(p.scale, p.scale), trace), p.ridge);

    Iteration<N> iteration(s);
    for (int step = 0; step < p.steps; ++step) iteration.step(p.a[step], p.b[step], p.c[step], step, p.steps);
    const int exponent = split_q<N>(s, iteration.q, item.n);
    const float factor =
        __fmul_rn(__fdiv_rn(p.scale, __fsqrt_rn(trace)), power_of_two(min(max(exponent, -126), 128)));

    for (int64_t column = last; column >= 0; column -= s.CHUNK) {  // backwards: the last chunk is still there
        if (column != last) {
            __syncthreads();
            load_chunk<N>(s, item, p.g_format, column, width_at(column), unit);
            __syncthreads();
        }
        if (item.stride_m == 1)
            apply<N, true>(s, item, p.o_format, column, width_at(column), factor);
        else
            apply<N, false>(s, item, p.o_format, column, width_at(column), factor);
    }
}

template <int N>
int launch_small(const jaguar_small_args& p, uint64_t stream) {
    return launch(small_kernel<N>, dim3(unsigned(p.count)), SMALL_THREADS, Shared<N>::BYTES, stream, p);
}

bool format_ok(int32_t format) { return format >= JAGUAR_FP16 && format <= JAGUAR_FP32; }

}  // namespace
}  // namespace jaguar

JAGUAR_EXPORT int jaguar_small(const jaguar_small_args* args, uint64_t stream) {
    using namespace jaguar;
    const jaguar_small_args& p = *args;
    if (p.count < 1 || p.largest < 1 || p.steps < 1 || p.steps > JAGUAR_MAX_STEPS || !p.items ||
        !format_ok(p.g_format) || !format_ok(p.o_format))
        return JAGUAR_BAD_SHAPE;
    if (p.largest > JAGUAR_SMALL) return JAGUAR_NO_KERNEL;
    if (const int code = unsupported()) return code;
    if (p.largest <= 16) return launch_small<16>(p, stream);
    if (p.largest <= 32) return launch_small<32>(p, stream);
    return launch_small<64>(p, stream);
}
