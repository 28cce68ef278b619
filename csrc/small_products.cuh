// The parts of jaguar_small: reading X, its Gram matrix, the iteration in fp32, and Q X.
#pragma once
#include "reduce.cuh"

namespace jaguar {

constexpr int SMALL_THREADS = 256;

// Shared memory for short sides up to N. Pitches shift each row by 16 bytes: reads down a column meet all banks.
template <int N>
struct Shared {
    static constexpr int CHUNK = 16384 / N;  // columns of X held at once: 32 KB
    static constexpr int X_PITCH = CHUNK + 8, PITCH = N + 4, Q_PITCH = N + 8;
    static constexpr int MATRIX = N * PITCH;
    static constexpr int BYTES = 4 * MATRIX * 4 + N * X_PITCH * 2 + SMALL_THREADS / 32 * 4;

    float *r, *z, *q, *t;
    uint16_t* x;
    uint32_t* scratch;
    uint16_t *q_high, *q_low;  // in place of R and Z, which are no longer needed by then

    __device__ __forceinline__ explicit Shared(unsigned char* memory) {
        r = reinterpret_cast<float*>(memory);
        z = r + MATRIX;
        q = z + MATRIX;
        t = q + MATRIX;
        x = reinterpret_cast<uint16_t*>(t + MATRIX);
        scratch = reinterpret_cast<uint32_t*>(x + N * X_PITCH);
        q_high = reinterpret_cast<uint16_t*>(r);
        q_low = reinterpret_cast<uint16_t*>(z);
    }
};

// Calls f(values, i, j, along_m) for all vectors of eight of `width` columns from column0 on, j counted from there; the
// vectors lie along the contiguous direction and have zeros where the matrix has ended.
template <int N, typename F>
__device__ __forceinline__ void read_chunk(const jaguar_small_item& item, int format, int64_t column0, int width, F f) {
    const bool along_m = item.stride_m == 1;
    const int64_t pitch_bytes = (along_m ? item.stride_n : item.stride_m) * format_bytes(format);
    const bool aligned = item.in % 16 == 0 && pitch_bytes % 16 == 0;
    float v[8];
    if (along_m) {
        for (int i = threadIdx.x / 32; i < N; i += SMALL_THREADS / 32)
            for (int j = threadIdx.x % 32 * 8; j < width; j += 32 * 8) {
                const int count = i < item.n ? int(min(item.m - column0 - j, int64_t(8))) : 0;
                load_eight(v, item.in, i * item.stride_n + column0 + j, count, format, aligned);
                f(v, i, j, true);
            }
        return;
    }
    for (int vector = threadIdx.x; vector < width * (N / 8); vector += SMALL_THREADS) {
        const int i = vector % (N / 8) * 8, j = vector / (N / 8);
        const int count = column0 + j < item.m ? int(min(item.n - i, int64_t(8))) : 0;
        load_eight(v, item.in, (column0 + j) * item.stride_m + i, count, format, aligned);
        f(v, i, j, false);
    }
}

template <int N>
__device__ __forceinline__ void load_chunk(const Shared<N>& s, const jaguar_small_item& item, int format,
                                           int64_t column0, int width, const Unit& unit) {
    read_chunk<N>(item, format, column0, width, [&](const float(&v)[8], int i, int j, bool along_m) {
        uint16_t x[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) x[e] = half_bits(unit(v[e]));
        if (along_m) {
            *reinterpret_cast<uint4*>(s.x + i * s.X_PITCH + j) = pack_eight(x);
            return;
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) s.x[(i + e) * s.X_PITCH + j] = x[e];
    });
}

// The warps share out slices of 16 columns; for N = 64 each slice goes to two warps of 32 rows each.
template <int N>
struct Gram {
    static constexpr int ROWS = N < 32 ? N : 32, ROW_GROUPS = N / ROWS;
    static constexpr int SLICES = SMALL_THREADS / 32 / ROW_GROUPS;
};

template <int N>
using GramAccumulators = float[Gram<N>::ROWS / 16][N / 8][4];

template <int N>
__device__ __forceinline__ void gram_chunk(GramAccumulators<N>& acc, const Shared<N>& s, int width) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row0 = warp % Gram<N>::ROW_GROUPS * Gram<N>::ROWS;
    const uint32_t x = shared_address(s.x);
    for (int k = warp / Gram<N>::ROW_GROUPS * 16; k < width; k += Gram<N>::SLICES * 16) {
        uint32_t a[Gram<N>::ROWS / 16][4];
#pragma unroll
        for (int i = 0; i < Gram<N>::ROWS / 16; ++i)
            load_matrices(a[i], x + ((row0 + i * 16 + (lane & 15)) * s.X_PITCH + k + (lane >> 4) * 8) * 2);
#pragma unroll
        for (int j = 0; j < N / 16; ++j) {
            uint32_t b[4];
            const int row = j * 16 + (lane & 7) + (lane >> 4) * 8;
            load_matrices(b, x + (row * s.X_PITCH + k + ((lane >> 3) & 1) * 8) * 2);
#pragma unroll
            for (int i = 0; i < Gram<N>::ROWS / 16; ++i) {
                mma(acc[i][2 * j], a[i], b[0], b[1]);
                mma(acc[i][2 * j + 1], a[i], b[2], b[3]);
            }
        }
    }
}

// R = the sum over the warps, one after the other: no atomics, hence always the same bits. Returns the trace.
template <int N>
__device__ __forceinline__ float gram_finish(const GramAccumulators<N>& acc, const Shared<N>& s) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row0 = warp % Gram<N>::ROW_GROUPS * Gram<N>::ROWS + lane / 4, column0 = lane % 4 * 2;
    for (int slice = 0; slice < Gram<N>::SLICES; ++slice) {
        if (warp / Gram<N>::ROW_GROUPS == slice) {
#pragma unroll
            for (int i = 0; i < Gram<N>::ROWS / 16; ++i)
#pragma unroll
                for (int j = 0; j < N / 8; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        float* to = s.r + (row0 + i * 16 + (e >> 1) * 8) * s.PITCH + column0 + j * 8 + (e & 1);
                        *to = slice ? __fadd_rn(*to, acc[i][j][e]) : acc[i][j][e];
                    }
        }
        __syncthreads();
    }
    float diagonal = 0.0f;
    for (int i = lane; i < N; i += 32) diagonal = __fadd_rn(diagonal, s.r[i * s.PITCH + i]);
    const float trace = warp_sum(diagonal);
    __syncthreads();
    return trace;
}

template <int N>
__device__ __forceinline__ void scale_and_shift(float* matrix, float factor, float shift) {
    for (int e = threadIdx.x; e < N * N; e += SMALL_THREADS) {
        float& value = matrix[e / N * Shared<N>::PITCH + e % N];
        value = __fadd_rn(__fmul_rn(value, factor), e / N == e % N ? shift : 0.0f);
    }
    __syncthreads();
}

// D = alpha A B + beta C for symmetric matrices that commute: rows of B are read in place of columns, and the result's
// lower triangle is written twice, so that rounding never makes it unsymmetric. D is none of the others.
template <int N>
__device__ __forceinline__ void multiply(float* d, float alpha, const float* a, const float* b, float beta,
                                         const float* c) {
    constexpr int EDGE = N / 16, PITCH = Shared<N>::PITCH;  // a thread's elements: EDGE x EDGE, 16 apart
    const int row = threadIdx.x / 16, column = threadIdx.x % 16;
    float acc[EDGE][EDGE] = {};
#pragma unroll 4
    for (int k = 0; k < N; k += 4) {
        float4 x[EDGE], y[EDGE];
#pragma unroll
        for (int i = 0; i < EDGE; ++i) {
            x[i] = *reinterpret_cast<const float4*>(a + (row + 16 * i) * PITCH + k);
            y[i] = *reinterpret_cast<const float4*>(b + (column + 16 * i) * PITCH + k);
        }
#pragma unroll
        for (int i = 0; i < EDGE; ++i)
#pragma unroll
            for (int j = 0; j < EDGE; ++j) {
                acc[i][j] = __fmaf_rn(x[i].x, y[j].x, acc[i][j]);
                acc[i][j] = __fmaf_rn(x[i].y, y[j].y, acc[i][j]);
                acc[i][j] = __fmaf_rn(x[i].z, y[j].z, acc[i][j]);
                acc[i][j] = __fmaf_rn(x[i].w, y[j].w, acc[i][j]);
            }
    }
#pragma unroll
    for (int i = 0; i < EDGE; ++i)
#pragma unroll
        for (int j = 0; j < EDGE; ++j) {
            const int r = row + 16 * i, s = column + 16 * j;
            if (r < s) continue;
            const float value = __fmaf_rn(alpha, acc[i][j], __fmul_rn(beta, c[r * PITCH + s]));
            d[r * PITCH + s] = value;
            d[s * PITCH + r] = value;
        }
    __syncthreads();
}

// Z = b R + c R R;  Q <- a Q + Q Z, from Q = I;  R <- (a I + Z) R (a I + Z).
template <int N>
struct Iteration {
    float *r, *z, *q, *t;

    __device__ __forceinline__ explicit Iteration(const Shared<N>& s) : r(s.r), z(s.z), q(s.q), t(s.t) {}

    __device__ __forceinline__ void step(float a, float b, float c, int step, int steps) {
        constexpr int PITCH = Shared<N>::PITCH;
        if (c != 0.0f) {
            multiply<N>(z, c, r, r, b, r);
        } else {
            for (int e = threadIdx.x; e < N * PITCH; e += SMALL_THREADS)
                if (e % PITCH < N) z[e] = __fmul_rn(b, r[e]);
            __syncthreads();
        }
        if (step == 0) {
            for (int e = threadIdx.x; e < N * N; e += SMALL_THREADS)
                q[e / N * PITCH + e % N] = __fadd_rn(z[e / N * PITCH + e % N], e / N == e % N ? a : 0.0f);
            __syncthreads();
        } else {
            multiply<N>(t, 1.0f, q, z, a, q);
            float* old = q;
            q = t;
            t = old;
        }
        if (step + 1 == steps) return;
        multiply<N>(t, 1.0f, r, z, a, r);
        multiply<N>(r, 1.0f, t, z, a, t);
    }
};

// Q times the power of two that brings its largest magnitude into [1, 2), as a sum of two fp16 matrices: 22 bits where
// one has 11. Returns the exponent that was taken out. Beyond n the diagonal of Q is the product of all a: the rows of X
// there are zero, but as the largest it would cost the others their precision.
template <int N>
__device__ __forceinline__ int split_q(const Shared<N>& s, const float* q, int64_t n) {
    const auto value_at = [&](int e) { return e / N < n && e % N < n ? q[e / N * s.PITCH + e % N] : 0.0f; };
    uint32_t largest = 0;
    for (int e = threadIdx.x; e < N * N; e += SMALL_THREADS) largest = max(largest, magnitude(value_at(e)));
    const Unit unit(block_maximum<SMALL_THREADS>(largest, s.scratch));
    for (int e = threadIdx.x; e < N * N; e += SMALL_THREADS) {
        const float value = unit(value_at(e));
        const uint16_t high = half_bits(value);
        s.q_high[e / N * s.Q_PITCH + e % N] = high;
        s.q_low[e / N * s.Q_PITCH + e % N] = half_bits(value - half_value(high));
    }
    __syncthreads();
    return unit.exponent;
}

// acc += Q X, or (X^T Q)^T, for 16 columns of X; Q is symmetric, so its rows serve as columns.
template <int N, bool ALONG_M>
__device__ __forceinline__ void apply_slice(float (&acc)[N / 16][2][4], const Shared<N>& s, int column, int lane) {
    const uint32_t parts[2] = {shared_address(s.q_high), shared_address(s.q_low)}, x = shared_address(s.x);
    const int low = lane & 15, high = lane >> 4, pair = (lane & 7) + high * 8, middle = (lane >> 3) & 1;
#pragma unroll
    for (int k = 0; k < N; k += 16) {
        uint32_t of_x[4];
        const int row = k + (ALONG_M ? low : pair), vector = ALONG_M ? high : middle;
        load_matrices_transposed(of_x, x + (row * s.X_PITCH + column + vector * 8) * 2);
#pragma unroll
        for (int part = 0; part < 2; ++part)
#pragma unroll
            for (int tile = 0; tile < N / 16; ++tile) {
                uint32_t of_q[4];
                const int q_row = tile * 16 + (ALONG_M ? low : pair), q_vector = ALONG_M ? high : middle;
                load_matrices(of_q, parts[part] + (q_row * s.Q_PITCH + k + q_vector * 8) * 2);
                if (ALONG_M) {
                    mma(acc[tile][0], of_q, of_x[0], of_x[1]);
                    mma(acc[tile][1], of_q, of_x[2], of_x[3]);
                } else {
                    mma(acc[tile][0], of_x, of_q[0], of_q[1]);
                    mma(acc[tile][1], of_x, of_q[2], of_q[3]);
                }
            }
    }
}

// Two neighbours in one store where that is aligned.
__device__ __forceinline__ void store_pair(uint64_t base, int64_t index, int format, float v0, float v1, bool both) {
    const int bytes = format_bytes(format);
    const uint64_t address = base + uint64_t(index) * bytes;
    if (!both || address % (2 * bytes)) {
        store_value(base, index, format, v0);
        if (both) store_value(base, index + 1, format, v1);
    } else if (format == JAGUAR_FP32) {
        *reinterpret_cast<float2*>(address) = make_float2(v0, v1);
    } else {
        *reinterpret_cast<uint32_t*>(address) = short_bits(v0, format) | uint32_t(short_bits(v1, format)) << 16;
    }
}

}  // namespace jaguar
