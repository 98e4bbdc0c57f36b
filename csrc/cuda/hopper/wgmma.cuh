// Hopper's warpgroup product and what moves its operands: inline PTX, host twins in
// tests/shim/wgmma_twin.h. setup.py compiles this folder for sm_90a only: the instructions are not
// in sm_80 or in PTX for compute_90. A warpgroup is 128 consecutive threads; every function here is
// called by all of them, or by a whole warp where it says so.
#pragma once
#include "../device.cuh"

namespace miue {

// Descriptor of an operand without swizzle. Its unit is the core matrix, eight rows of 16 bytes,
// 128 contiguous bytes: of a K-major operand 8 numbers of M or N, each with 8 of K; of an N-major
// one (TRANSPOSED below) 8 of K, each with 8 of N. `along_k`, `along_rows`: bytes from a core
// matrix to its neighbour in K and in M or N. Adding n to it moves it by 16 n bytes.
__device__ __forceinline__ uint64_t descriptor(const void* p, uint32_t along_k,
                                               uint32_t along_rows) {
    return uint64_t{shared_address(p) >> 4 & 0x3fff} | uint64_t{along_k >> 4} << 16 |
           uint64_t{along_rows >> 4} << 32;
}

// What this thread wrote to shared memory is visible to wgmma, which reads through another proxy;
// for other threads' after a barrier.
__device__ __forceinline__ void finish_writes() {
#ifdef __CUDACC__
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ void finish_copies() {
    copies_done();
    finish_writes();
}

// Barrier of one warpgroup: named barriers 1, 2, ... (0 is __syncthreads).
__device__ __forceinline__ void warpgroup_barrier() {
#ifdef __CUDACC__
    asm volatile("bar.sync %0, 128;" ::"r"(1 + threadIdx.x / 128) : "memory");
#else
    shim::warpgroup_barrier();
#endif
}

// Barrier of the whole block, for warpgroups that go different ways to it.
__device__ __forceinline__ void block_barrier() {
#ifdef __CUDACC__
    asm volatile("bar.sync 0;" ::: "memory");
#else
    __syncthreads();
#endif
}

// This warpgroup gives registers back to its block, or waits until the block has so many more for
// it. Needs a second number in __launch_bounds__.
template <int COUNT>
__device__ __forceinline__ void registers_down() {
#ifdef __CUDACC__
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}
template <int COUNT>
__device__ __forceinline__ void registers_up() {
#ifdef __CUDACC__
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

// Before the first product of a batch, after the last write to its accumulators.
template <int R>
__device__ __forceinline__ void wgmma_begin([[maybe_unused]] float (&d)[R]) {
#ifdef __CUDACC__
#pragma unroll
    for (int k = 0; k < R; ++k) asm volatile("" : "+f"(d[k])::"memory");
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
    shim::wgmma_begin();
#endif
}

__device__ __forceinline__ void wgmma_commit() {
#ifdef __CUDACC__
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
    shim::wgmma_commit();
#endif
}

// All committed batches but the last PENDING are done: d, of one of them, may be read, and as far
// as this warp goes their operands may be overwritten.
template <int PENDING = 0, int R>
__device__ __forceinline__ void wgmma_wait([[maybe_unused]] float (&d)[R]) {
#ifdef __CUDACC__
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#pragma unroll
    for (int k = 0; k < R; ++k) asm volatile("" : "+f"(d[k])::"memory");
#else
    shim::wgmma_wait(PENDING);
#endif
}

// d += A B^T: A 64 x 16, B N x 16, f16 or bf16, both by descriptor; d 64 x N in fp32 over the
// warpgroup. In warp w of the four, lane l:
//   d[4 j + i] = D[16 w + l / 4 + 8 (i / 2)][8 j + 2 (l % 4) + i % 2]
// Reads shared memory until wgmma_wait. TRANSPOSED: B is N-major.
#define MIUE_TEN(t) \
    "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9"
#define MIUE_30 MIUE_TEN() "," MIUE_TEN(1) "," MIUE_TEN(2)
#define MIUE_60 MIUE_30 "," MIUE_TEN(3) "," MIUE_TEN(4) "," MIUE_TEN(5)
#define MIUE_D4(k) "+f"(d[k]), "+f"(d[k + 1]), "+f"(d[k + 2]), "+f"(d[k + 3])
#define MIUE_D16(k) MIUE_D4(k), MIUE_D4(k + 4), MIUE_D4(k + 8), MIUE_D4(k + 12)
#define MIUE_D32(k) MIUE_D16(k), MIUE_D16(k + 16)
#define MIUE_D64(k) MIUE_D32(k), MIUE_D32(k + 32)
#define MIUE_WGMMA(size, type, registers, a_at, b_at, t_at, ...)                      \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #size "k16.f32." #type "." #type \
                 " {" registers "}, %" #a_at ", %" #b_at ", 1, 1, 1, 0, %" #t_at ";"  \
                 : __VA_ARGS__                                                        \
                 : "l"(a), "l"(b), "n"(TRANSPOSED))
#define MIUE_WGMMA_TYPES(...)             \
    if constexpr (T == DType::f16) {      \
        MIUE_WGMMA_OF(f16, __VA_ARGS__);  \
    } else {                              \
        MIUE_WGMMA_OF(bf16, __VA_ARGS__); \
    }
#define MIUE_WGMMA_OF(type, size, ...) MIUE_WGMMA(size, type, __VA_ARGS__)

template <DType T, int N, bool TRANSPOSED = false>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b) {
    static_assert(T == DType::f16 || T == DType::bf16);
    static_assert(N == 64 || N == 72 || N == 128 || N == 136 || N == 176 || N == 256);
#ifdef __CUDACC__
    if constexpr (N == 64) {
        MIUE_WGMMA_TYPES(64, MIUE_30 ",%30,%31", 32, 33, 34, MIUE_D32(0))
    } else if constexpr (N == 72) {
        MIUE_WGMMA_TYPES(72, MIUE_30 ",%30,%31,%32,%33,%34,%35", 36, 37, 38, MIUE_D32(0),
                         MIUE_D4(32))
    } else if constexpr (N == 128) {
        MIUE_WGMMA_TYPES(128, MIUE_60 ",%60,%61,%62,%63", 64, 65, 66, MIUE_D64(0))
    } else if constexpr (N == 136) {
        MIUE_WGMMA_TYPES(136, MIUE_60 ",%60,%61,%62,%63,%64,%65,%66,%67", 68, 69, 70, MIUE_D64(0),
                         MIUE_D4(64))
    } else if constexpr (N == 176) {
        MIUE_WGMMA_TYPES(176,
                         MIUE_60 "," MIUE_TEN(6) "," MIUE_TEN(7) ",%80,%81,%82,%83,%84,%85,%86,%87",
                         88, 89, 90, MIUE_D64(0), MIUE_D16(64), MIUE_D4(80), MIUE_D4(84))
    } else {
        MIUE_WGMMA_TYPES(
            256,
            MIUE_60 "," MIUE_TEN(6) "," MIUE_TEN(7) "," MIUE_TEN(8) "," MIUE_TEN(9) "," MIUE_TEN(
                10) "," MIUE_TEN(11) ",%120,%121,%122,%123,%124,%125,%126,%127",
            128, 129, 130, MIUE_D64(0), MIUE_D64(64))
    }
#else
    shim::wgmma<N, TRANSPOSED>(d, a, b, T == DType::bf16);
#endif
}

// The same with A, f16, in registers: in warp w, lane l, a[i] is A[16 w + l / 4 + 8 (i % 2)][8 (i /
// 2) + 2 (l % 4)] and the next in its row (high half). They must not change until wgmma_wait.
#define MIUE_WGMMA_FROM_REGISTERS(add, ...)                                     \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" MIUE_30 \
                 ",%30,%31}, {%32,%33,%34,%35}, %36, " #add ", 1, 1, 0;"        \
                 : __VA_ARGS__                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
#ifdef __CUDACC__
    MIUE_WGMMA_FROM_REGISTERS(1, MIUE_D32(0));
#else
    shim::wgmma<true>(d, a, b);
#endif
}

// d = A B^T, the first of its batch: it takes the place of wgmma_begin. (Zeros for d might come out
// of another accumulator, and ptxas would let no two products overlap.)
#define MIUE_E4(k) "=f"(d[k]), "=f"(d[k + 1]), "=f"(d[k + 2]), "=f"(d[k + 3])
#define MIUE_E16(k) MIUE_E4(k), MIUE_E4(k + 4), MIUE_E4(k + 8), MIUE_E4(k + 12)
__device__ __forceinline__ void wgmma_first(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
#ifdef __CUDACC__
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    MIUE_WGMMA_FROM_REGISTERS(0, MIUE_E16(0), MIUE_E16(16));
#else
    shim::wgmma_begin();
    shim::wgmma<false>(d, a, b);
#endif
}
#undef MIUE_E16
#undef MIUE_E4
#undef MIUE_WGMMA_FROM_REGISTERS
#undef MIUE_WGMMA_OF
#undef MIUE_WGMMA_TYPES
#undef MIUE_WGMMA
#undef MIUE_D64
#undef MIUE_D32
#undef MIUE_D16
#undef MIUE_D4
#undef MIUE_60
#undef MIUE_30
#undef MIUE_TEN

// Two 8 x 8 matrices of 16-bit numbers between a warp's registers and rows of 16 bytes in shared
// memory, transposed on the way: lanes 0-7 give the rows of the first, lanes 8-15 of the second.
// m[i] in lane l: numbers l / 4 of the rows 2 (l % 4) and 2 (l % 4) + 1 (high half).
__device__ __forceinline__ void store_transposed(void* row, const uint32_t (&m)[2]) {
#ifdef __CUDACC__
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)),
        "r"(m[0]), "r"(m[1])
        : "memory");
#else
    shim::store_transposed(row, m);
#endif
}

__device__ __forceinline__ void load_transposed(uint32_t (&m)[2], const void* row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(m[0]), "=r"(m[1])
                 : "r"(shared_address(row))
                 : "memory");
#else
    shim::load_transposed(m, row);
#endif
}

}  // namespace miue
