// A GPU on one CPU thread, for tests: the threads of a block are fibers that run in turn, one block after the other.
//
// Memory operations that hardware may perform at any time within limits are performed at one of the two limits:
// LATE_PRODUCTS: copies when they are issued, wgmma when it is waited for: shows stages refilled while still in use.
// LATE_COPIES: copies when they are waited for, wgmma when issued: shows stages read before they are full. There blocks
// run backwards, and warps far ahead of each other.
// Shared memory starts as NaN, and a pattern behind its end is checked after each block.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

namespace emulator {

enum Order { LATE_PRODUCTS, LATE_COPIES };

constexpr int MAX_THREADS = 1024, WARP = 32, WARPGROUP = 128;

// A point where a number of threads wait for each other; the last one to come does the work for all.
struct Meeting {
    const char* what = nullptr;
    int arrived = 0;
    uint64_t generation = 0;
    void* arguments[MAX_THREADS];
};

struct Warpgroup {
    Meeting meeting;
    std::vector<std::function<void()>> open;                     // wgmma not yet committed
    std::vector<std::vector<std::function<void()>>> committed;  // groups that still run
};

struct Block {
    Meeting all, barriers[16], warps[MAX_THREADS / WARP];
    Warpgroup warpgroups[MAX_THREADS / WARPGROUP];
    std::vector<std::function<void()>> copies;                            // TMA, not yet performed
    std::vector<std::vector<std::function<void()>>> groups[MAX_THREADS];  // cp.async; the last group is open
};

extern Order order;
extern Block* block;
extern int thread;  // index of the running thread in its block

[[noreturn]] void fail(const char* message);
void yield();     // lets the other threads run; fails where all wait for ever
void progress();  // tells that something happened that a waiting thread may be waiting for
int launch(unsigned grid_x, unsigned grid_y, int threads, size_t shared, const std::function<void()>& kernel);

// `bytes` of shared memory at an address as PTX counts them, checked against what the launch asked for.
unsigned char* shared(uint32_t address, int bytes, int alignment);
unsigned char* shared_base();

template <typename Work>
void meet(Meeting& meeting, int size, int slot, const char* what, void* argument, Work work) {
    if (meeting.arrived == 0) meeting.what = what;
    if (meeting.what != what) fail("threads that must execute one instruction together execute different ones");
    meeting.arguments[slot] = argument;
    if (++meeting.arrived == size) {
        work(meeting.arguments);
        meeting.arrived = 0;
        ++meeting.generation;
        progress();
        return;
    }
    const uint64_t generation = meeting.generation;
    while (meeting.generation == generation) yield();
}

template <typename Work>
void meet_warp(const char* what, void* argument, Work work) {
    meet(block->warps[thread / WARP], WARP, thread % WARP, what, argument, work);
}

template <typename Work>
void meet_warpgroup(const char* what, void* argument, Work work) {
    meet(block->warpgroups[thread / WARPGROUP].meeting, WARPGROUP, thread % WARPGROUP, what, argument, work);
}

// IEEE binary16, to nearest even.
float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);

}  // namespace emulator
