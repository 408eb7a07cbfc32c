// A CUDA device on the host, for tests: kernels are compiled by a plain C++ compiler and run block by block, each thread
// a fiber of one host thread. So what kernels compute, and how they are launched, is tested where no GPU is; speed,
// memory models and the device's own instructions are not.
//
// Fibers run in a new random order from one barrier to the next: a barrier that is missing shows as a wrong result. A
// barrier that not all threads reach is an error. Shared memory holds NaNs before each block.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <vector>

namespace megacore::emulator {

struct Dim {
    unsigned x = 1, y = 1, z = 1;
};

struct Barrier {
    unsigned arrived = 0, passed = 0;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Dim index;
    unsigned number = 0;
    Barrier* waits_at = nullptr;
    unsigned waits_for = 0;  // what `passed` must exceed
    bool done = false;
    unsigned shuffles = 0;
};

// One block at a time.
struct Device {
    static constexpr std::size_t kStack = 1 << 16;
    static constexpr unsigned kWarp = 32;

    std::mutex mutex;
    std::minstd_rand order{1};
    std::vector<Fiber> fibers;
    std::vector<Barrier> warps;
    Barrier block;
    std::vector<float> shared;
    std::vector<std::uint64_t> slots[2];
    Dim grid_dim, block_dim, block_index;
    Fiber* now = nullptr;
    ucontext_t scheduler;
    const std::function<void()>* body = nullptr;
};

inline Device& device() {
    static Device one;
    return one;
}

inline void wait(Barrier& barrier, unsigned members) {
    Device& d = device();
    if (++barrier.arrived == members) {
        barrier.arrived = 0;
        ++barrier.passed;
        return;
    }
    d.now->waits_at = &barrier;
    d.now->waits_for = barrier.passed;
    swapcontext(&d.now->context, &d.scheduler);
}

inline void sync_block() { wait(device().block, static_cast<unsigned>(device().fibers.size())); }

template <typename T>
T shuffle_xor(T value, unsigned mask) {
    static_assert(sizeof(T) <= 8);
    Device& d = device();
    const unsigned warp = d.now->number / Device::kWarp, size = static_cast<unsigned>(d.fibers.size());
    std::vector<std::uint64_t>& slots = d.slots[d.now->shuffles++ % 2];
    std::memcpy(&slots[d.now->number], &value, sizeof(T));
    wait(d.warps[warp], std::min(Device::kWarp, size - warp * Device::kWarp));
    std::memcpy(&value, &slots[d.now->number ^ mask], sizeof(T));
    return value;
}

inline void enter() {
    Device& d = device();
    (*d.body)();
    d.now->done = true;
    swapcontext(&d.now->context, &d.scheduler);
}

inline void prepare_block(std::size_t shared_bytes) {
    Device& d = device();
    d.shared.assign(shared_bytes / sizeof(float) + 1, std::nanf(""));
    for (auto& slots : d.slots) slots.assign(d.fibers.size(), ~std::uint64_t{0});
    d.warps.assign((d.fibers.size() + Device::kWarp - 1) / Device::kWarp, Barrier{});
    d.block = Barrier{};
    for (std::size_t i = 0; i < d.fibers.size(); ++i) {
        Fiber& fiber = d.fibers[i];
        fiber.number = static_cast<unsigned>(i);
        fiber.index = {fiber.number % d.block_dim.x, fiber.number / d.block_dim.x % d.block_dim.y,
                       fiber.number / (d.block_dim.x * d.block_dim.y)};
        fiber.done = false;
        fiber.waits_at = nullptr;
        fiber.shuffles = 0;
        if (!fiber.stack) fiber.stack.reset(new char[Device::kStack]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = Device::kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
}

inline void run_block() {
    Device& d = device();
    std::vector<Fiber*> turn;
    for (;;) {
        turn.clear();
        std::size_t done = 0;
        for (Fiber& fiber : d.fibers) {
            done += fiber.done;
            if (!fiber.done && (!fiber.waits_at || fiber.waits_at->passed != fiber.waits_for)) turn.push_back(&fiber);
        }
        if (done == d.fibers.size()) return;
        if (turn.empty()) throw std::runtime_error("emulated device: a barrier that not all threads reach");
        std::shuffle(turn.begin(), turn.end(), d.order);
        for (Fiber* fiber : turn) {
            fiber->waits_at = nullptr;
            d.now = fiber;
            swapcontext(&d.scheduler, &fiber->context);
        }
    }
}

inline void run(Dim grid, Dim block, std::size_t shared_bytes, const std::function<void()>& body) {
    Device& d = device();
    const std::lock_guard<std::mutex> lock(d.mutex);
    const std::size_t threads = std::size_t{block.x} * block.y * block.z;
    const bool fits = threads > 0 && threads <= 1024 && grid.x > 0 && grid.x <= 0x7fffffffu && grid.y > 0 &&
                      grid.y <= 65535 && grid.z == 1;
    if (!fits) throw std::runtime_error("emulated device: no such grid or block");
    if (d.fibers.size() != threads) d.fibers = std::vector<Fiber>(threads);
    d.grid_dim = grid;
    d.block_dim = block;
    d.body = &body;
    for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
            d.block_index = {x, y, 0};
            prepare_block(shared_bytes);
            run_block();
        }
    }
}

}  // namespace megacore::emulator

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define threadIdx (::megacore::emulator::device().now->index)
#define blockIdx (::megacore::emulator::device().block_index)
#define blockDim (::megacore::emulator::device().block_dim)
#define gridDim (::megacore::emulator::device().grid_dim)
