// jaguar_product: refuses what no kernel can do, then chooses by the device.
#include "launch.h"

namespace {

constexpr int32_t MAX_SIZE = 1 << 30;  // sizes rounded up to whole tiles are still int32

bool vectors(uint64_t address, int64_t batch, int64_t row) {
    return address % 16 == 0 && batch % 8 == 0 && row % 8 == 0;
}

bool size_ok(int32_t size) { return size > 0 && size <= MAX_SIZE; }

int refusal(const jaguar_product_args& p) {
    if (!size_ok(p.batch) || !size_ok(p.m) || !size_ok(p.n) || !size_ok(p.k) || !p.a || !p.b || !p.d)
        return JAGUAR_BAD_SHAPE;
    if (p.triangle && (p.m != p.n || p.d_transposed)) return JAGUAR_BAD_SHAPE;
    if (p.d_transposed && p.c == p.d) return JAGUAR_BAD_SHAPE;
    if (p.d_format != JAGUAR_FP16 && p.d_format != JAGUAR_BF16) return JAGUAR_BAD_SHAPE;
    if (!vectors(p.a, p.a_batch, p.a_row) || !vectors(p.b, p.b_batch, p.b_row) || !vectors(p.d, p.d_batch, p.d_row))
        return JAGUAR_BAD_ALIGNMENT;
    if (p.c && !vectors(p.c, p.c_batch, p.c_row)) return JAGUAR_BAD_ALIGNMENT;
    return JAGUAR_OK;
}

}  // namespace

JAGUAR_EXPORT int jaguar_product(const jaguar_product_args* args, uint64_t stream) {
    jaguar_product_args p = *args;
    if (p.beta == 0.0f) p.c = 0;  // as in BLAS: what is multiplied by nothing is not read
    if (const int code = refusal(p)) return code;
    if (const int code = jaguar::unsupported()) return code;
    if (jaguar::capability() == 90) {
        const int code = jaguar::product_sm90a(p, stream);
        if (code != JAGUAR_NO_KERNEL) return code;
    }
    return jaguar::product_sm80(p, stream);
}
