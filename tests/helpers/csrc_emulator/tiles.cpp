#include "tiles.h"

// The tiles of a grid in order, three numbers each.
extern "C" void tiles_list(int64_t first, int64_t count, int rows, int columns, int triangle, int32_t* out) {
    for (int64_t i = first; i < first + count; ++i, out += 3) {
        const jaguar::Tile tile = jaguar::tile_at(uint32_t(i), uint32_t(rows), uint32_t(columns), triangle != 0);
        out[0] = tile.batch, out[1] = tile.row, out[2] = tile.column;
    }
}

extern "C" int64_t tiles_count(int64_t batch, int64_t rows, int64_t columns, int triangle) {
    return jaguar::tile_count(batch, rows, columns, triangle != 0);
}

extern "C" int tiles_wide(int64_t batch, int64_t m, int64_t n, int64_t sms) {
    return jaguar::wide_is_faster(batch, m, n, sms);
}
