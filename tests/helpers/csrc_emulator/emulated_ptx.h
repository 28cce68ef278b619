// csrc/ptx.cuh on the emulator, after the PTX ISA: which element each lane holds is written out here.
#pragma once
#include "cuda_runtime.h"

namespace jaguar {

inline unsigned char* shared_memory() { return emulator::shared_base(); }

inline uint32_t shared_address(const void* pointer) {
    return uint32_t(static_cast<const unsigned char*>(pointer) - emulator::shared_base());
}

inline void store16(void* to, uint4 v) {
    if (reinterpret_cast<uintptr_t>(to) % 16) emulator::fail("misaligned 16-byte store");
    std::memcpy(to, &v, 16);
}

inline void copy16_async(uint32_t to, const void* from, int bytes) {
    if (reinterpret_cast<uintptr_t>(from) % 16) emulator::fail("misaligned cp.async");
    if (bytes < 0 || bytes > 16) emulator::fail("cp.async of more than 16 bytes");
    unsigned char* target = emulator::shared(to, 16, 16);
    const auto copy = [=] {
        std::memset(target, 0, 16);
        std::memcpy(target, from, size_t(bytes));
    };
    auto& groups = emulator::block->groups[emulator::thread];
    if (groups.empty()) groups.emplace_back();
    if (emulator::order == emulator::LATE_COPIES)
        groups.back().push_back(copy);
    else
        copy();
}

inline void copy_commit() {
    auto& groups = emulator::block->groups[emulator::thread];
    if (groups.empty()) groups.emplace_back();
    groups.emplace_back();
}

template <int PENDING>
void copy_wait() {
    auto& groups = emulator::block->groups[emulator::thread];
    while (int(groups.size()) > PENDING + 1) {
        for (const auto& copy : groups.front()) copy();
        groups.erase(groups.begin());
    }
}

// Lane l gives the address of row l % 8 of matrix l / 8 and gets, of each matrix, the elements 2 (l % 4) and the next of
// row l / 4; transposed, of column l / 4.
inline void load_matrices(uint32_t (&r)[4], uint32_t address, bool transposed) {
    struct Lane {
        uint32_t address;
        uint32_t* r;
    } mine = {address, r};
    emulator::meet_warp(transposed ? "ldmatrix.trans" : "ldmatrix", &mine, [=](void** lanes) {
        const uint16_t* rows[32];
        for (int l = 0; l < 32; ++l)
            rows[l] = reinterpret_cast<const uint16_t*>(
                emulator::shared(static_cast<Lane*>(lanes[l])->address, 16, 16));
        for (int l = 0; l < 32; ++l)
            for (int i = 0; i < 4; ++i) {
                const int outer = l / 4, inner = l % 4 * 2;
                const uint16_t low = transposed ? rows[i * 8 + inner][outer] : rows[i * 8 + outer][inner];
                const uint16_t high = transposed ? rows[i * 8 + inner + 1][outer] : rows[i * 8 + outer][inner + 1];
                static_cast<Lane*>(lanes[l])->r[i] = low | uint32_t(high) << 16;
            }
    });
}

inline void load_matrices(uint32_t (&r)[4], uint32_t address) { load_matrices(r, address, false); }

inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) { load_matrices(r, address, true); }

// Products of fp16 are exact in fp32; the sum of one instruction is made in double and rounded once.
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Lane {
        float* d;
        const uint32_t* a;
        uint32_t b[2];
    } mine = {d, a, {b0, b1}};
    emulator::meet_warp("mma", &mine, [](void** lanes) {
        double a[16][16], b[8][16];
        for (int l = 0; l < 32; ++l) {
            const Lane& lane = *static_cast<Lane*>(lanes[l]);
            const int row = l / 4, column = l % 4 * 2;
            for (int i = 0; i < 4; ++i)
                for (int e = 0; e < 2; ++e)
                    a[row + (i & 1) * 8][column + (i >> 1) * 8 + e] =
                        emulator::half_to_float(uint16_t(lane.a[i] >> 16 * e));
            for (int i = 0; i < 2; ++i)
                for (int e = 0; e < 2; ++e)
                    b[row][column + i * 8 + e] = emulator::half_to_float(uint16_t(lane.b[i] >> 16 * e));
        }
        for (int l = 0; l < 32; ++l)
            for (int i = 0; i < 4; ++i) {
                const int row = l / 4 + (i >> 1) * 8, column = l % 4 * 2 + (i & 1);
                float& d = static_cast<Lane*>(lanes[l])->d[i];
                double sum = 0;
                for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
                d = float(d + sum);
            }
    });
}

inline uint32_t shuffle_xor(uint32_t value, int mask) {
    struct Lane {
        uint32_t in, out;
    } mine = {value, 0};
    emulator::meet_warp("shfl", &mine, [=](void** lanes) {
        for (int l = 0; l < 32; ++l)
            static_cast<Lane*>(lanes[l])->out = static_cast<Lane*>(lanes[l ^ mask])->in;
    });
    return mine.out;
}

inline void group_barrier(int barrier, int threads) {
    emulator::Meeting& meeting = emulator::block->barriers[barrier];
    emulator::meet(meeting, threads, meeting.arrived, "bar.sync", nullptr, [](void**) {});
}

}  // namespace jaguar
