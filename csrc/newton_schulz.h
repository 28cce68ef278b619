// C ABI of the Newton-Schulz kernels: device addresses and streams as integers, no torch headers, so that plain nvcc
// compiles it on a machine whose torch has no CUDA. The schedule of products is backends/polar/schedule.py; a call here
// is one launch (prepare: three), allocates nothing and never waits for the device.
//
// Every function returns a cudaError_t as int; JAGUAR_* codes below 0 are refusals made before anything is launched.
#pragma once
#include <cstdint>

#define JAGUAR_ABI_VERSION 2

enum jaguar_format : int32_t { JAGUAR_FP16 = 0, JAGUAR_BF16 = 1, JAGUAR_FP32 = 2 };

enum jaguar_refusal : int32_t {
    JAGUAR_OK = 0,
    JAGUAR_BAD_SHAPE = -1,      // a size is not positive, or too large for the grid
    JAGUAR_BAD_ALIGNMENT = -2,  // an address is no multiple of 16 bytes, or a row stride none of 8 elements
    JAGUAR_NO_KERNEL = -3,      // the device is older than sm_80, or a matrix too large for `jaguar_small`
};

// D = alpha A B + beta C for every matrix of a batch; fp16 operands, fp32 accumulation, one rounding at the end.
// Strides are in elements. C may be D (each element is read before it is written, by the thread that writes it), A and
// B may not. With `triangle` D must be symmetric (m == n): tiles on and below the diagonal are computed and mirrored.
struct jaguar_product_args {
    int32_t batch, m, n, k;
    uint64_t a;  // (m, k), k contiguous
    int64_t a_batch, a_row;
    uint64_t b;
    int64_t b_batch, b_row;
    int32_t b_transposed;  // 1: stored as (n, k), k contiguous; 0: stored as (k, n), n contiguous
    uint64_t c;            // (m, n), n contiguous, fp16; 0: none
    int64_t c_batch, c_row;
    uint64_t d;
    int64_t d_batch, d_row;
    int32_t d_transposed;  // 1: stored as (n, m), m contiguous; excludes triangle
    int32_t d_format;      // JAGUAR_FP16 or JAGUAR_BF16
    float alpha, beta;
    int32_t triangle;
};

// The most matrices of one `jaguar_prepare`: their addresses travel inside the kernel's arguments.
#define JAGUAR_MAX_BATCH 64
// Parts that the reductions of `jaguar_prepare` cut a matrix into: `statistics` holds fp32 [batch][2][JAGUAR_PARTS].
#define JAGUAR_PARTS 64

// X_k = fp16(scale G_k / ||G_k||_F), of G_k^T where `transposed`: X has shape (batch, rows, cols) and G_k is contiguous,
// (rows, cols) or, transposed, (cols, rows). Norms are made in fp32 from values divided by a power of two near the largest magnitude. A
// zero matrix stays zero; one with a NaN or an infinity becomes NaN everywhere. No atomics on floats: deterministic.
struct jaguar_prepare_args {
    int32_t batch, rows, cols, transposed;
    int32_t g_format;
    uint64_t g[JAGUAR_MAX_BATCH];
    uint64_t x;
    int64_t x_batch, x_row;
    uint64_t statistics;
    float scale;
};

// One row of the table of `jaguar_small`, int64 in device memory: G's element (i, j), i < n <= 64 on the short side and
// j < m on the long side, is at in[i * stride_n + j * stride_m], and O's at out[the same]. Exactly one stride is 1.
struct jaguar_small_item {
    int64_t in, out, n, m, stride_n, stride_m;
};

#define JAGUAR_SMALL 64
#define JAGUAR_MAX_STEPS 32

// O_k = Newton-Schulz of G_k for every row of the table, in one launch: Gram form, R and Q in fp32 on chip.
struct jaguar_small_args {
    uint64_t items;
    int32_t count, largest;  // largest: the largest n of the table
    int32_t g_format, o_format;
    int32_t steps;
    float scale;  // G is first divided by its norm and multiplied by this
    float ridge;  // added to the eigenvalues of R: steep schemes blow up those that rounding put below 0
    float a[JAGUAR_MAX_STEPS], b[JAGUAR_MAX_STEPS], c[JAGUAR_MAX_STEPS];
};

extern "C" {
int jaguar_product(const jaguar_product_args* args, uint64_t stream);
int jaguar_prepare(const jaguar_prepare_args* args, uint64_t stream);
int jaguar_small(const jaguar_small_args* args, uint64_t stream);
const char* jaguar_error(int code);
int jaguar_abi_version();
int jaguar_driver_version();  // the latest CUDA that the driver knows: 13010 is 13.1; 0: there is no driver
}
