#include "emulator.h"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <ucontext.h>
#include <utility>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

Order order = LATE_PRODUCTS;
Block* block = nullptr;
int thread = 0;

namespace {

constexpr size_t STACK = 128 * 1024, SHARED_LIMIT = 227 * 1024, GUARD = 4096;
constexpr unsigned char UNWRITTEN = 0xFF, GUARD_PATTERN = 0xA5;

// The first switch to a fiber goes through ucontext, which makes system calls; the later ones through setjmp.
struct Fiber {
    ucontext_t start;
    jmp_buf context;
    bool started, done;
    std::unique_ptr<char[]> stack;
};

Fiber fibers[MAX_THREADS];
jmp_buf scheduler;
const std::function<void()>* body = nullptr;
int threads = 0, alive = 0, stalled = 0;
size_t shared_bytes = 0;
alignas(1024) unsigned char memory[SHARED_LIMIT + GUARD];

[[noreturn]] void enter(int next) {
    thread = next;
    threadIdx = dim3(unsigned(next));
    Fiber& fiber = fibers[next];
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    setcontext(&fiber.start);
    std::abort();
}

int alive_after(int last, int first, int count) {
    for (int i = 1; i <= count; ++i) {
        const int next = first + (last - first + i) % count;
        if (!fibers[next].done) return next;
    }
    return -1;
}

// The next thread in turn. With LATE_COPIES a warp runs as far ahead of the others as it can: only when each of its
// threads has waited does the next warp run.
int next_alive() {
    if (order != LATE_COPIES) return alive_after(thread, 0, threads);
    const int warp = thread / WARP * WARP;
    const int near = stalled % WARP ? alive_after(thread, warp, WARP) : -1;
    return near >= 0 ? near : alive_after(warp + WARP - 1, 0, threads);
}

void fiber_main() {
    (*body)();
    fibers[thread].done = true;
    progress();
    if (--alive == 0) _longjmp(scheduler, 1);
    enter(next_alive());
}

__attribute__((noinline)) int run_block() {
    alive = threads;
    stalled = 0;
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        if (!fiber.stack) fiber.stack.reset(new char[STACK]);
        fiber.started = fiber.done = false;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = STACK;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, fiber_main, 0);
    }
    const int result = _setjmp(scheduler);
    if (result == 0) enter(0);
    return result;  // 1: all threads are done; 2: failed
}

bool guard_intact() {
    for (size_t i = shared_bytes; i < sizeof memory; ++i)
        if (memory[i] != GUARD_PATTERN) return false;
    return true;
}

}  // namespace

void fail(const char* message) {
    std::fprintf(stderr, "emulator: %s (block %u %u, thread %d)\n", message, blockIdx.x, blockIdx.y, thread);
    if (!block) std::abort();
    _longjmp(scheduler, 2);
}

void progress() { stalled = 0; }

void yield() {
    if (++stalled > 4 * threads && !block->copies.empty()) {  // all wait: now a late copy must come
        const auto copy = block->copies.front();
        block->copies.erase(block->copies.begin());
        copy();
        progress();
    }
    if (stalled > 16 * threads) fail("all threads wait for ever");
    const int next = next_alive();
    if (next == thread) return;
    if (!_setjmp(fibers[thread].context)) enter(next);
}

unsigned char* shared_base() { return memory; }

unsigned char* shared(uint32_t address, int bytes, int alignment) {
    if (address % alignment) fail("misaligned access to shared memory");
    if (address + size_t(bytes) > shared_bytes) fail("access behind the end of shared memory");
    return memory + address;
}

int launch(unsigned grid_x, unsigned grid_y, int block_threads, size_t bytes, const std::function<void()>& kernel) {
    if (bytes > SHARED_LIMIT || block_threads > MAX_THREADS || block_threads % WARP) return cudaErrorInvalidValue;
    threads = block_threads;
    shared_bytes = bytes;
    body = &kernel;
    gridDim = dim3(grid_x, grid_y);
    blockDim = dim3(unsigned(block_threads));
    const unsigned count = grid_x * grid_y;
    for (unsigned i = 0; i < count; ++i) {
        const unsigned index = order == LATE_COPIES ? count - 1 - i : i;
        blockIdx = dim3(index % grid_x, index / grid_x);
        std::memset(memory, UNWRITTEN, bytes);
        std::memset(memory + bytes, GUARD_PATTERN, sizeof memory - bytes);
        const auto state = std::make_unique<Block>();
        block = state.get();
        const int result = run_block();
        block = nullptr;
        if (result != 1) return cudaErrorLaunchFailure;
        if (!guard_intact()) {
            std::fprintf(stderr, "emulator: written behind the end of shared memory\n");
            return cudaErrorLaunchFailure;
        }
    }
    return cudaSuccess;
}

float half_to_float(uint16_t bits) {
    static const std::unique_ptr<float[]> table = [] {
        std::unique_ptr<float[]> values(new float[65536]);
        for (int i = 0; i < 65536; ++i) {
            const int exponent = i >> 10 & 31, fraction = i & 1023;
            float value = exponent == 0    ? __builtin_ldexpf(float(fraction), -24)
                          : exponent < 31 ? __builtin_ldexpf(float(fraction + 1024), exponent - 25)
                          : fraction       ? __builtin_nanf("")
                                           : __builtin_inff();
            values[i] = i >> 15 ? -value : value;
        }
        return values;
    }();
    return table[bits];
}

uint16_t float_to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = bits >> 16 & 0x8000;
    const float size = __builtin_fabsf(value);
    if (size != size) return 0x7FFF;
    if (size >= 65520.0f) return sign | 0x7C00;
    if (size < 6.103515625e-05f) return sign | uint16_t(__builtin_nearbyintf(size * 16777216.0f));
    bits &= 0x7FFFFFFF;
    bits += 0xFFF + (bits >> 13 & 1);
    return sign | uint16_t((bits - (112u << 23)) >> 13);
}

}  // namespace emulator

namespace {

// By index: an Ampere, a Hopper, a Hopper so small that wide tiles pay and one block takes them all, a Turing.
struct Device {
    int major, minor, sms;
};
constexpr Device DEVICES[] = {{8, 0, 108}, {9, 0, 132}, {9, 0, 1}, {7, 5, 40}};
int device = 0;

std::map<std::pair<const void*, int>, int> attributes;

}  // namespace

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    attributes[{kernel, attribute}] = value;
    return cudaSuccess;
}

bool emulator::may_use(const void* kernel, size_t shared) {
    if (shared <= 48 * 1024) return true;
    return attributes[{kernel, cudaFuncAttributeMaxDynamicSharedMemorySize}] >= int(shared) &&
           attributes[{kernel, cudaFuncAttributePreferredSharedMemoryCarveout}] == cudaSharedmemCarveoutMaxShared;
}

cudaError_t cudaGetDevice(int* value) {
    *value = device;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
    const Device& d = DEVICES[index];
    *value = attribute == cudaDevAttrComputeCapabilityMajor   ? d.major
             : attribute == cudaDevAttrComputeCapabilityMinor ? d.minor
                                                              : d.sms;
    return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "launch failure"; }

extern "C" void emulator_use(int index, int order) {
    device = index;
    emulator::order = static_cast<emulator::Order>(order);
}

extern "C" uint16_t emulator_half(float value) { return emulator::float_to_half(value); }
