// Runs the CUDA kernels of csrc/cuda as host C++, for tests only: one OS thread per CUDA thread,
// blocks one after another. Shared memory is a static array, __syncthreads a barrier of the block,
// warp functions go through slots and a barrier of the warp. A missing __syncthreads is therefore a
// data race that -fsanitize=thread can see.
#pragma once
#include <algorithm>
#include <array>
#include <atomic>
#include <barrier>
#include <bit>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "half.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

using std::max;
using std::min;

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

constinit inline thread_local uint3 threadIdx{}, blockIdx{};
constinit inline thread_local dim3 blockDim{}, gridDim{};

namespace shim {

#ifdef __linux__
// std::barrier without its spinning, which takes three to ten times as long with 128 threads on two
// cores.
class Barrier {
    const int count;
    std::atomic<int> left, phase{0};

  public:
    explicit Barrier(int threads) : count(threads), left(threads) {}
    void arrive_and_wait() {
        const int now = phase.load(std::memory_order_relaxed);
        if (left.fetch_sub(1, std::memory_order_acq_rel) == 1) {
            left.store(count, std::memory_order_relaxed);
            phase.store(now + 1, std::memory_order_release);
            syscall(SYS_futex, &phase, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
        }
        while (phase.load(std::memory_order_acquire) == now)
            syscall(SYS_futex, &phase, FUTEX_WAIT_PRIVATE, now, nullptr, nullptr, 0);
    }
};
#else
using Barrier = std::barrier<>;
#endif

struct Warp {
    Barrier gate{32};
    alignas(16) char slots[2][32][128];  // two generations: one barrier per exchange is enough
};

struct Warpgroup {
    Barrier gate{128};
};

struct alignas(16) Line {
    char bytes[16];
};
// A block's dynamic shared memory, full of NaN.
inline std::vector<Line> shared_memory(size_t bytes) {
    if (bytes > 232448) std::abort();  // more than a block may have on Hopper
    std::vector<Line> lines((bytes + sizeof(Line) - 1) / sizeof(Line));
    if (bytes) std::memset(lines.data(), 0xff, lines.size() * sizeof(Line));
    return lines;
}

struct Block {
    Barrier gate;
    std::vector<Warp> warps;
    std::vector<Warpgroup> groups;
    explicit Block(int threads) : gate(threads), warps(threads / 32), groups(threads / 128) {}
};

constinit inline thread_local Block* block = nullptr;
constinit inline thread_local unsigned generation = 0;
constinit inline thread_local std::vector<Line>* dynamic = nullptr;

// Every lane gives `mine` and gets the 32 values of its warp.
template <class T>
const T (&exchange(const T& mine))[32] {
    static_assert(sizeof(T) <= 128);
    Warp& warp = block->warps[threadIdx.x / 32];
    T* all = reinterpret_cast<T*>(warp.slots[generation++ % 2]);
    all[threadIdx.x % 32] = mine;
    warp.gate.arrive_and_wait();
    return *reinterpret_cast<const T(*)[32]>(all);
}

// work() on each thread of a block, which goes through the blocks by itself.
template <class F>
void block_of_threads(dim3 grid, int threads, F work) {
    Block shared(threads);
    std::vector<std::jthread> pool;
    for (int k = 0; k < threads; ++k) {
        pool.emplace_back([&, k] {
            block = &shared;
            gridDim = grid;
            blockDim = dim3(threads);
            threadIdx = {static_cast<unsigned>(k), 0, 0};
            work();
        });
    }
}

template <class F>
void launch(dim3 grid, int threads, F kernel, size_t bytes = 0) {
    std::vector<Line> memory = shared_memory(bytes);
    block_of_threads(grid, threads, [&] {
        dynamic = &memory;
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = {x, y, 0};
                kernel();
                block->gate.arrive_and_wait();
            }
        }
    });
}

}  // namespace shim

inline void __syncthreads() { shim::block->gate.arrive_and_wait(); }

template <class T>
T __shfl_xor_sync(unsigned, T x, int lanes) {
    return shim::exchange(x)[threadIdx.x % 32 ^ lanes];
}
inline unsigned __ballot_sync(unsigned, bool vote) {
    const auto& votes = shim::exchange(vote);
    unsigned mask = 0;
    for (int lane = 0; lane < 32; ++lane) mask |= static_cast<unsigned>(votes[lane]) << lane;
    return mask;
}
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long x) {
    return __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
}

#include "mma_twin.h"
#include "wgmma_twin.h"
