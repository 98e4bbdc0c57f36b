// Host twins of csrc/cuda/hopper/wgmma.cuh from the tables of the PTX ISA: descriptors are decoded from
// their bits, every thread computes its own part of D out of the block's dynamic shared memory. The
// products are as inexact as those of mma_twin.h. Copies and products happen as late as they may: a
// copy leaves NaN behind until it is waited for, a product is made in wgmma_wait.
#pragma once
#include <deque>
#include <functional>

namespace shim {

// where dynamic shared memory starts: the system's own comes first
constexpr uint32_t SHARED_WINDOW = 1024;
constexpr int MULTIPROCESSORS = 2;

inline uint32_t shared_address(const void* p) {
    return SHARED_WINDOW +
           static_cast<uint32_t>(static_cast<const char*>(p) - dynamic->data()->bytes);
}

[[noreturn]] inline void wrong(const char* what) {
    std::fprintf(stderr, "shim: %s\n", what);
    std::abort();
}

struct Copy {
    void* to;
    const void* from;  // null: zeros
};
inline thread_local std::vector<Copy> copies;
using Products = std::vector<std::function<void()>>;
inline thread_local Products issued;
inline thread_local std::deque<Products> committed;
inline thread_local bool fenced = false;

inline void copy_async(void* to, const void* from, bool there) {
    if (shared_address(to) % 16 || (there && reinterpret_cast<uintptr_t>(from) % 16))
        wrong("cp.async of 16 bytes at another address");
    std::memset(to, 0xff, 16);
    copies.push_back({to, there ? from : nullptr});
}

inline void copies_done() {
    for (const Copy& copy : copies) {
        if (copy.from) {
            std::memcpy(copy.to, copy.from, 16);
        } else {
            std::memset(copy.to, 0, 16);
        }
    }
    copies.clear();
}

inline void wgmma_begin() { fenced = true; }

inline void wgmma_commit() {
    committed.push_back(std::move(issued));
    issued.clear();
}

inline void wgmma_wait(size_t pending) {
    while (committed.size() > pending) {
        for (const auto& product : committed.front()) product();
        committed.pop_front();
    }
    fenced = false;
}

inline void warpgroup_barrier() { block->groups[threadIdx.x / 128].gate.arrive_and_wait(); }

// An operand without swizzle, by its descriptor: bits 0-13 start, 16-29 leading and 32-45 stride
// byte offset (all / 16), 49-51 base offset, 62-63 swizzle. The leading offset is between core
// matrices in K, the stride offset between those in M or N. A core matrix has 8 numbers of M or N
// in 8 rows if the operand is K-major, else 8 of K.
struct Operand {
    uint32_t start, leading, stride;
    explicit Operand(uint64_t d)
        : start((d & 0x3fff) << 4),
          leading((d >> 16 & 0x3fff) << 4),
          stride((d >> 32 & 0x3fff) << 4) {
        if (d >> 62 || (d >> 49 & 7)) wrong("a descriptor with a swizzle or a base offset");
    }
    template <bool TRANSPOSED>
    void row(int row, bool brain, float (&values)[16]) const {
        for (int k = 0; k < 16; ++k) {
            const int major = TRANSPOSED ? k % 8 : row % 8, minor = TRANSPOSED ? row % 8 : k % 8;
            const uint32_t at =
                start + row / 8 * stride + k / 8 * leading + major * 16 + minor * 2 - SHARED_WINDOW;
            if (at >= dynamic->size() * sizeof(Line))
                wrong("a descriptor that leaves shared memory");
            uint16_t bits;
            std::memcpy(&bits, dynamic->data()->bytes + at, 2);
            values[k] = brain ? __bfloat162float({bits}) : __half2float({bits});
        }
    }
};

// This thread's elements of D += A B^T; `rows` are its two rows of A.
template <int N, bool TRANSPOSED>
void product(float (&d)[N / 2], const float (&rows)[2][16], uint64_t b, bool brain) {
    const Operand right(b);
    float column[16];
    // Element i of D: row = 16 warp + lane / 4, + 8 for i % 4 >= 2; column = 8 (i / 4) + 2 (lane %
    // 4) + (i & 1).
    for (int eight = 0; eight < N / 8; ++eight) {
        for (int odd = 0; odd < 2; ++odd) {
            right.row<TRANSPOSED>(8 * eight + threadIdx.x % 4 * 2 + odd, brain, column);
            for (int k = 0; k < 2; ++k)
                d[4 * eight + 2 * k + odd] =
                    sum_like_tensor_cores(rows[k], column, d[4 * eight + 2 * k + odd]);
        }
    }
}

template <int N, bool TRANSPOSED>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool brain) {
    if (!fenced) wrong("wgmma without wgmma.fence");
    issued.push_back([&d, a, b, brain] {
        float rows[2][16];
        for (int k = 0; k < 2; ++k)
            Operand(a).row<false>(threadIdx.x % 128 / 32 * 16 + (threadIdx.x % 32 >> 2) + 8 * k,
                                  brain, rows[k]);
        product<N, TRANSPOSED>(d, rows, b, brain);
    });
}

struct Fragment {
    uint32_t words[4];
};

// A in registers: element i in a lane: row = lane / 4, + 8 for i / 2 odd; column = 2 (lane % 4) +
// (i & 1), + 8 for i >= 4.
template <bool ADD>
void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    if (!fenced) wrong("wgmma without wgmma.fence");
    const auto& warp = exchange(Fragment{{a[0], a[1], a[2], a[3]}});
    std::array<Fragment, 4> quad;
    for (int k = 0; k < 4; ++k) quad[k] = warp[threadIdx.x % 32 / 4 * 4 + k];
    issued.push_back([&d, quad, b] {
        float rows[2][16];
        for (int k = 0; k < 4; ++k) {
            for (int i = 0; i < 8; ++i) {
                const uint16_t bits = static_cast<uint16_t>(quad[k].words[i / 2] >> 16 * (i & 1));
                rows[i / 2 % 2][2 * k + (i & 1) + (i < 4 ? 0 : 8)] = __half2float({bits});
            }
        }
        if (!ADD) std::fill_n(d, 32, 0.f);
        product<64, false>(d, rows, b, false);
    });
}

// stmatrix and ldmatrix .m8n8.x2.trans: lane 8 i + k holds the address of row k of matrix i; of the
// transposed matrix lane l holds row l / 4, columns 2 (l % 4) and 2 (l % 4) + 1, low half first.
inline void store_transposed(void* row, const uint32_t (&m)[2]) {
    struct Pair {
        uint32_t m[2];
    };
    const auto& warp = exchange(Pair{{m[0], m[1]}});
    const int lane = threadIdx.x % 32, matrix = lane / 8, k = lane % 8;
    if (matrix > 1) return;
    if (shared_address(row) % 16)
        wrong("stmatrix to a row that does not start at a multiple of 16");
    uint16_t values[8];
    for (int c = 0; c < 8; ++c)
        values[c] = static_cast<uint16_t>(warp[4 * c + k / 2].m[matrix] >> 16 * (k % 2));
    std::memcpy(row, values, 16);
}

inline void load_transposed(uint32_t (&m)[2], const void* row) {
    const auto& rows = exchange(row);
    const int lane = threadIdx.x % 32;
    for (int matrix = 0; matrix < 2; ++matrix) {
        m[matrix] = 0;
        for (int half = 0; half < 2; ++half) {
            const void* from = rows[8 * matrix + 2 * (lane % 4) + half];
            if (shared_address(from) % 16)
                wrong("ldmatrix of a row that does not start at a multiple of 16");
            uint16_t bits;
            std::memcpy(&bits, static_cast<const char*>(from) + 2 * (lane / 4), 2);
            m[matrix] |= static_cast<uint32_t>(bits) << 16 * half;
        }
    }
}

}  // namespace shim
