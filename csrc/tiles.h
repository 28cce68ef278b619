// The tile that a thread block computes. Pure functions without CUDA headers, so that any C++ compiler can test them.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define JAGUAR_BOTH __host__ __device__
#else
#define JAGUAR_BOTH
#endif

namespace jaguar {

// Tiles of so many neighbouring rows run at about the same time: they share columns of B in the L2 cache.
constexpr uint32_t GROUP_ROWS = 8;

struct Tile {
    int32_t batch, row, column;
};

JAGUAR_BOTH constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

JAGUAR_BOTH constexpr int64_t triangle_size(int64_t rows) { return rows * (rows + 1) / 2; }

constexpr int64_t MAX_GRID = 0x7FFFFFFF;

// Any number above MAX_GRID means too many: the true one may not even fit 64 bits.
JAGUAR_BOTH constexpr int64_t tile_count(int64_t batch, int64_t rows, int64_t columns, bool triangle) {
    const int64_t each = triangle ? triangle_size(rows) : rows * columns;
    return each > MAX_GRID ? each : batch * each;
}

// From here on 32 bits: a grid has at most MAX_GRID tiles, and a row of them at most 2^30 / 128.

// The row r with triangle_size(r) <= index < triangle_size(r + 1), bit by bit: floating point would need a correction.
JAGUAR_BOTH constexpr uint32_t triangle_row(uint32_t index) {
    uint32_t row = 0;
    for (uint32_t bit = 1u << 15; bit; bit >>= 1) {
        const uint32_t next = row | bit;
        if (next * (next + 1) / 2 <= index) row = next;
    }
    return row;
}

// The batch is outermost; then bands of GROUP_ROWS rows; within a band column after column.
JAGUAR_BOTH constexpr Tile full_tile(uint32_t index, uint32_t rows, uint32_t columns) {
    const uint32_t batch = index / (rows * columns), rest = index % (rows * columns);
    const uint32_t first = rest / (GROUP_ROWS * columns) * GROUP_ROWS;
    const uint32_t height = rows - first < GROUP_ROWS ? rows - first : GROUP_ROWS;
    const uint32_t inside = rest - first * columns;
    return {int32_t(batch), int32_t(first + inside % height), int32_t(inside / height)};
}

// The same with column <= row: a band is a rectangle left of the diagonal and a small triangle on it.
JAGUAR_BOTH constexpr Tile triangle_tile(uint32_t index, uint32_t rows) {
    const uint32_t size = uint32_t(triangle_size(rows)), batch = index / size, rest = index % size;
    const uint32_t first = triangle_row(rest) / GROUP_ROWS * GROUP_ROWS;
    const uint32_t height = rows - first < GROUP_ROWS ? rows - first : GROUP_ROWS;
    uint32_t inside = rest - first * (first + 1) / 2;
    if (inside < first * height)
        return {int32_t(batch), int32_t(first + inside % height), int32_t(inside / height)};
    inside -= first * height;
    uint32_t column = 0;
    for (; inside >= height - column; ++column) inside -= height - column;
    return {int32_t(batch), int32_t(first + column + inside), int32_t(first + column)};
}

JAGUAR_BOTH constexpr Tile tile_at(uint32_t index, uint32_t rows, uint32_t columns, bool triangle) {
    return triangle ? triangle_tile(index, rows) : full_tile(index, rows, columns);
}

// Whether 128x256 tiles, one block an SM, should beat 128x128 tiles, two blocks an SM. A model, in ninths of the time
// that one SM needs for 128x128 at full rate: the narrow tile reads more shared memory per product (rate 0.9), and
// alone on its SM it hides nothing behind a neighbour (rate 0.75).
constexpr bool wide_is_faster(int64_t batch, int64_t m, int64_t n, int64_t sms) {
    const int64_t rows = batch * ceil_div(m, 128);
    const int64_t wide = ceil_div(rows * ceil_div(n, 256), sms) * 18;
    const int64_t narrow_tiles = rows * ceil_div(n, 128), rest = narrow_tiles % (2 * sms);
    const int64_t narrow = narrow_tiles / (2 * sms) * 20 + (rest == 0 ? 0 : rest <= sms ? 12 : 20);
    return wide < narrow;
}

}  // namespace jaguar
