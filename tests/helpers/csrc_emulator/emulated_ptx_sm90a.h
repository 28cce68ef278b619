// csrc/ptx_sm90a.cuh on the emulator: mbarrier, TMA with the 128-byte swizzle, wgmma with its descriptors.
#pragma once
#include "cuda.h"
#include "emulated_ptx.h"

namespace jaguar {

struct EmulatedBarrier {
    int16_t pending, arrivals;
    int32_t bytes : 31;
    uint32_t phase : 1;
};
static_assert(sizeof(EmulatedBarrier) == 8, "an mbarrier has 64 bits");

inline EmulatedBarrier& emulated_barrier(uint32_t address) {
    return *reinterpret_cast<EmulatedBarrier*>(emulator::shared(address, 8, 8));
}

inline void emulated_complete(EmulatedBarrier& barrier) {
    if (barrier.pending < 0) emulator::fail("more arrivals at an mbarrier than it was made for");
    if (barrier.pending || barrier.bytes) return;
    barrier.pending = barrier.arrivals;
    barrier.phase ^= 1;
    emulator::progress();
}

inline void barrier_init(uint32_t address, int arrivals) {
    EmulatedBarrier& barrier = emulated_barrier(address);
    barrier.pending = barrier.arrivals = int16_t(arrivals);
    barrier.bytes = 0;
    barrier.phase = 0;
}

inline void barrier_init_fence() {}

inline void barrier_arrive(uint32_t address) {
    EmulatedBarrier& barrier = emulated_barrier(address);
    --barrier.pending;
    emulated_complete(barrier);
}

inline void barrier_arrive_expect(uint32_t address, uint32_t bytes) {
    emulated_barrier(address).bytes += int32_t(bytes);
    barrier_arrive(address);
}

// Waits for the end of the phase of this parity: of a new barrier, phase 0 has not ended and "phase -1" has.
inline void barrier_wait(uint32_t address, uint32_t parity) {
    while (emulated_barrier(address).phase == parity) emulator::yield();
}

inline void tma_prefetch(const CUtensorMap*) {}

// Address bits 4-6 are exchanged with their sum modulo 2 with bits 7-9.
inline uint32_t swizzle_128(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

inline void tma_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x, int y, int z) {
    if (to % 1024) emulator::fail("a swizzled TMA box must start at a multiple of 1024 bytes");
    const CUtensorMap m = *map;
    const auto copy = [=] {
        const int start[3] = {x, y, z};
        uint32_t address = to;
        int64_t at[3];
        for (at[2] = start[2]; at[2] < start[2] + m.box[2]; ++at[2])
            for (at[1] = start[1]; at[1] < start[1] + m.box[1]; ++at[1])
                for (at[0] = start[0]; at[0] < start[0] + m.box[0]; ++at[0], address += 2) {
                    bool inside = true;
                    for (int i = 0; i < 3; ++i) inside = inside && at[i] >= 0 && at[i] < m.sizes[i];
                    const unsigned char* from = m.address + at[0] * 2 + at[1] * m.strides[0] + at[2] * m.strides[1];
                    unsigned char* target = emulator::shared(swizzle_128(address), 2, 2);
                    target[0] = inside ? from[0] : 0;
                    target[1] = inside ? from[1] : 0;
                }
        EmulatedBarrier& b = emulated_barrier(barrier);
        b.bytes -= int32_t(address - to);
        emulated_complete(b);
    };
    if (emulator::order == emulator::LATE_COPIES)
        emulator::block->copies.push_back(copy);
    else
        copy();
}

inline void wgmma_fence() {
    emulator::meet_warpgroup("wgmma.fence", nullptr, [](void**) {});
}

inline void wgmma_commit() {
    emulator::meet_warpgroup("wgmma.commit_group", nullptr, [](void**) {
        emulator::Warpgroup& group = emulator::block->warpgroups[emulator::thread / emulator::WARPGROUP];
        group.committed.push_back(std::move(group.open));
        group.open.clear();
    });
}

template <int COUNT>
void wgmma_results(float (&)[COUNT]) {}

template <int PENDING>
void wgmma_wait() {
    auto& committed = emulator::block->warpgroups[emulator::thread / emulator::WARPGROUP].committed;
    while (int(committed.size()) > PENDING) {
        for (const auto& product : committed.front()) product();
        committed.erase(committed.begin());
    }
}

// Canonical layouts with the 128-byte swizzle. k contiguous: eight rows of 128 bytes, the next eight at `stride`. n
// contiguous: 64 values of n in 128 bytes, the next k below, the next eight k at `stride`, the next 64 n at `leading`.
struct EmulatedOperand {
    uint32_t start, leading, stride;

    explicit EmulatedOperand(uint64_t d)
        : start(uint32_t(d & 0x3FFF) << 4),
          leading(uint32_t(d >> 16 & 0x3FFF) << 4),
          stride(uint32_t(d >> 32 & 0x3FFF) << 4) {
        if (d >> 62 != 1) emulator::fail("a wgmma descriptor without the 128-byte swizzle");
        if (d >> 49 & 7) emulator::fail("a wgmma descriptor with a base offset");
    }

    float at(int outer, int k, bool k_contiguous) const {
        const uint32_t address =
            k_contiguous ? start + uint32_t(outer / 8) * stride + uint32_t(outer % 8) * 128 + uint32_t(k) * 2
                         : start + uint32_t(outer / 64) * leading + uint32_t(outer % 64) * 2 + uint32_t(k % 8) * 128 +
                               uint32_t(k / 8) * stride;
        uint16_t bits;
        std::memcpy(&bits, emulator::shared(swizzle_128(address), 2, 2), 2);
        return emulator::half_to_float(bits);
    }
};

template <int N>
void emulated_wgmma(float* const* d, uint64_t from_a, uint64_t from_b, bool n_contiguous, bool accumulate) {
    const EmulatedOperand of_a(from_a), of_b(from_b);
    static double a[64][16], b[16][N];
    for (int k = 0; k < 16; ++k) {
        for (int row = 0; row < 64; ++row) a[row][k] = of_a.at(row, k, true);
        for (int column = 0; column < N; ++column) b[k][column] = of_b.at(column, k, !n_contiguous);
    }
    for (int row = 0; row < 64; ++row) {
        double sums[N] = {};
        for (int k = 0; k < 16; ++k)
            for (int column = 0; column < N; ++column) sums[column] += a[row][k] * b[k][column];
        for (int column = 0; column < N; ++column) {
            const int thread = row / 16 * 32 + row % 8 * 4 + column % 8 / 2;
            float& to = d[thread][column / 8 * 4 + row % 16 / 8 * 2 + column % 2];
            to = float((accumulate ? to : 0.0f) + sums[column]);
        }
    }
}

template <bool N_CONTIGUOUS, int COUNT>
void wgmma(float (&d)[COUNT], uint64_t a, uint64_t b, bool accumulate) {
    struct Thread {
        float* d;
        uint64_t a, b;
        bool accumulate;
    } mine = {d, a, b, accumulate};
    emulator::meet_warpgroup("wgmma", &mine, [](void** threads) {
        const Thread first = *static_cast<Thread*>(threads[0]);
        std::vector<float*> accumulators;
        for (int i = 0; i < emulator::WARPGROUP; ++i) {
            const Thread& other = *static_cast<Thread*>(threads[i]);
            if (other.a != first.a || other.b != first.b || other.accumulate != first.accumulate)
                emulator::fail("threads of a warpgroup give wgmma different descriptors");
            accumulators.push_back(other.d);
        }
        const auto product = [=] {
            emulated_wgmma<COUNT * 2>(accumulators.data(), first.a, first.b, N_CONTIGUOUS, first.accumulate);
        };
        if (emulator::order == emulator::LATE_PRODUCTS)
            emulator::block->warpgroups[emulator::thread / emulator::WARPGROUP].open.push_back(product);
        else
            product();
    });
}

}  // namespace jaguar
