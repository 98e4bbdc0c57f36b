// What every kernel file shares: launch with its check, typed loads and stores, warp sums.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "check.h"
#include "ops.h"

#ifndef MIUE_BLOCKS
#define MIUE_BLOCKS 8192
#endif

namespace miue {

constexpr int THREADS = 128;  // of every block here
constexpr int WARPS = THREADS / 32;
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t BLOCKS = MIUE_BLOCKS;  // of a grid over values or pixels; grid-stride beyond

// Launches on `stream` and turns a failed launch (or a missing driver) into BackendFailure. An
// empty grid is no launch.
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), int64_t x, int64_t y,
            [[maybe_unused]] void* stream, A... args) {
    if (x == 0 || y == 0) return;
    const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>(y));
#ifdef __CUDACC__
    kernel<<<grid, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<P>(args)...);
#else
    shim::launch(grid, THREADS, [&] { kernel(static_cast<P>(args)...); });
#endif
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess)
        throw BackendFailure(std::string(name) + ": " + cudaGetErrorString(error));
}

// The same with a number of threads and of bytes of dynamic shared memory.
template <class... P, class... A>
void launch_wide(const char* name, void (*kernel)(P...), int64_t x, int64_t y, int threads,
                 int shared_bytes, [[maybe_unused]] void* stream, A... args) {
    if (x == 0 || y == 0) return;
    const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>(y));
#ifdef __CUDACC__
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error == cudaSuccess) {
        kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
            static_cast<P>(args)...);
        error = cudaGetLastError();
    }
    if (error != cudaSuccess)
        throw BackendFailure(std::string(name) + ": " + cudaGetErrorString(error));
#else
    shim::launch(grid, threads, [&] { kernel(static_cast<P>(args)...); }, shared_bytes);
    static_cast<void>(name);
#endif
}

// The block's dynamic shared memory.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef __CUDACC__
    extern __shared__ __align__(1024) char memory[];
    return reinterpret_cast<T*>(memory);
#else
    return reinterpret_cast<T*>(shim::dynamic->data());
#endif
}

// Compute capability of the current device, 10 * major + minor, or 0 without one.
inline int capability() {
#ifdef __CUDACC__
    int device = 0, major = 0, minor = 0;
    const bool known =
        cudaGetDevice(&device) == cudaSuccess &&
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
    if (!known) cudaGetLastError();
    return known ? 10 * major + minor : 0;
#else
    return 90;
#endif
}

// Cuts `memory` into arrays at multiples of 64 bytes; where it is null, only their sum is of
// interest.
struct Carver {
    char* memory;
    int64_t bytes = 0;

    template <class T>
    void take(T*& pointer, int64_t count) {
        pointer = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(memory) + bytes);
        bytes += ceil_div(count * sizeof(T), 64) * 64;
    }
};

// the largest number and the smallest normal one
constexpr float FLOAT_MAX = 3.4028235e38f, FLOAT_LEAST = 0x1p-126f;

inline void require_dtype(const char* op, const char* argument, DType got, bool ok) {
    require(ok, op, argument, "a dtype the CUDA kernels take (see ops.h)",
            "code " + std::to_string(static_cast<int>(got)));
}
inline bool is_feature(DType t) { return t == DType::f32 || t == DType::f16 || t == DType::bf16; }
inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

__device__ __forceinline__ float half_value(uint16_t bits) {
    return __half2float(__ushort_as_half(bits));
}
__device__ __forceinline__ uint16_t half_bits(float x) {
    return __half_as_ushort(__float2half_rn(x));
}
// Both as fp16, `low` in the low half.
__device__ __forceinline__ uint32_t half_pair(float low, float high) {
#ifdef __CUDACC__
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return half_bits(low) | static_cast<uint32_t>(half_bits(high)) << 16;
#endif
}
__device__ __forceinline__ float bfloat_value(uint16_t bits) {
    return __bfloat162float(__ushort_as_bfloat16(bits));
}
__device__ __forceinline__ uint16_t bfloat_bits(float x) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

// Address in the shared window, as descriptors and shared-memory instructions take it.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
#ifdef __CUDACC__
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#else
    return shim::shared_address(p);
#endif
}

// 16 bytes from global to shared memory, or 16 zeros where not `there`; both addresses are
// multiples of 16. Under way until copies_done() of the same thread; for the other threads until a
// barrier after that.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there = true) {
#ifdef __CUDACC__
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(there ? 16 : 0)
                 : "memory");
#else
    shim::copy_async(to, from, there);
#endif
}
__device__ __forceinline__ void copies_done() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_all;" ::: "memory");
#else
    shim::copies_done();
#endif
}

// One number as stored (u8 and i8 are not scaled). The switch is uniform over the grid.
__device__ __forceinline__ float load(const void* p, DType t, int64_t at) {
    switch (t) {
        case DType::f32: return static_cast<const float*>(p)[at];
        case DType::f16: return half_value(static_cast<const uint16_t*>(p)[at]);
        case DType::bf16: return bfloat_value(static_cast<const uint16_t*>(p)[at]);
        case DType::u8: return static_cast<const uint8_t*>(p)[at];
        default: return static_cast<const int8_t*>(p)[at];
    }
}

__device__ __forceinline__ void store(void* p, DType t, int64_t at, float x) {
    switch (t) {
        case DType::f32: static_cast<float*>(p)[at] = x; break;
        case DType::f16: static_cast<uint16_t*>(p)[at] = half_bits(x); break;
        case DType::bf16: static_cast<uint16_t*>(p)[at] = bfloat_bits(x); break;
        // i8 levels, already whole numbers
        default: static_cast<int8_t*>(p)[at] = static_cast<int8_t>(x == x ? x : 0.f); break;
    }
}

// V = 8 consecutive numbers in 16-byte (bytes: 8-byte) accesses; the caller has checked alignment.
// V = 1 is the plain form.
template <int V>
__device__ __forceinline__ void load(const void* p, DType t, int64_t at, float (&v)[V]) {
    if constexpr (V == 1) {
        v[0] = load(p, t, at);
    } else if (t == DType::f32) {
        const float4 a = *reinterpret_cast<const float4*>(static_cast<const float*>(p) + at);
        const float4 b = *reinterpret_cast<const float4*>(static_cast<const float*>(p) + at + 4);
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z,
        v[7] = b.w;
    } else if (t == DType::f16 || t == DType::bf16) {
        const uint4 a = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p) + at);
        const uint32_t words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const uint16_t bits = static_cast<uint16_t>(words[k / 2] >> (16 * (k % 2)));
            v[k] = t == DType::f16 ? half_value(bits) : bfloat_value(bits);
        }
    } else {
        const uint2 a = *reinterpret_cast<const uint2*>(static_cast<const uint8_t*>(p) + at);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const uint8_t byte = static_cast<uint8_t>((k < 4 ? a.x : a.y) >> (8 * (k % 4)));
            v[k] = t == DType::u8 ? static_cast<float>(byte)
                                  : static_cast<float>(static_cast<int8_t>(byte));
        }
    }
}

template <int V>
__device__ __forceinline__ void store(void* p, DType t, int64_t at, const float (&v)[V]) {
    if constexpr (V == 1) {
        store(p, t, at, v[0]);
    } else if (t == DType::f32) {
        *reinterpret_cast<float4*>(static_cast<float*>(p) + at) =
            make_float4(v[0], v[1], v[2], v[3]);
        *reinterpret_cast<float4*>(static_cast<float*>(p) + at + 4) =
            make_float4(v[4], v[5], v[6], v[7]);
    } else if (t == DType::f16 || t == DType::bf16) {
        uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            words[k / 2] |=
                static_cast<uint32_t>(t == DType::f16 ? half_bits(v[k]) : bfloat_bits(v[k]))
                << (16 * (k % 2));
        }
        *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p) + at) =
            make_uint4(words[0], words[1], words[2], words[3]);
    } else {
        uint32_t words[2] = {0, 0};
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const int8_t level = static_cast<int8_t>(v[k] == v[k] ? v[k] : 0.f);
            words[k / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(level)) << (8 * (k % 4));
        }
        *reinterpret_cast<uint2*>(static_cast<uint8_t*>(p) + at) = make_uint2(words[0], words[1]);
    }
}

// 2^x in one instruction (2 ulp); what is below 2^-126 is 0.
__device__ __forceinline__ float exp2_of(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// Every lane gets the sum; the order is fixed.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}

// Likewise the largest; NaN are passed over.
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
    return x;
}

// Sum over the block, valid in thread 0.
__device__ __forceinline__ double block_sum(double x) {
    __shared__ double parts[WARPS];
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    double sum = 0;
    for (int k = 0; k < WARPS; ++k) sum += parts[k];
    __syncthreads();
    return sum;
}

}  // namespace miue
