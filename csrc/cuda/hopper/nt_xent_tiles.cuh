// The tiles of nt_xent_large.cu: what its kernels are given, and how a block goes through its span
// of tiles.
#pragma once
#include "../nt_xent.cuh"
#include "wgmma.cuh"

namespace miue {
namespace {

constexpr int TILE = 64, GROUP = 128, BUFFERS = 3, COLUMNS = 4;
// norms of packed rows are 2^UNIT to 2^(UNIT + 1), and so is the bound of a row's weights
constexpr int UNIT = 12;
constexpr int64_t SPLIT_ROWS = 16384;  // rows of all spans together, if there are several
constexpr float BITS = 1.44269504f;    // log2(e)

struct Large : NtXentArgs {
    int64_t Bp;
    int width, sum_spans, spans;
    bool vectors;
    float inv_t;
    uint16_t* z;     // [Bp / TILE][width / 8][TILE][8] fp16 bits
    int64_t* kinds;  // [Bp] labels
    // [Bp] 1 / norm of the packed row, 0 on padding; ||z||; clamped norm
    float *inverse, *own, *base;
    float *P, *N, *top;  // [sum_spans, Bp] top: log2
    // [Bp] log2 of the coefficients times exp(-shift / t); -inf on padding
    float *pull, *push;
    double* losses;        // [Bp / 32]
    float* peaks;          // [Bp / 32] largest bound of a weight
    float* scale;          // one: what weights are multiplied with
    float *parts, *along;  // [spans, B, width], [spans, Bp]
};

struct Columns {
    alignas(16) float inverse[TILE], pull[TILE], push[TILE];
    alignas(16) int64_t labels[TILE];
};

template <int W>
constexpr int TILE_BYTES = TILE * W * 2;
template <int W>
constexpr int SUMS_SHARED = BUFFERS * TILE_BYTES<W> + COLUMNS * static_cast<int>(sizeof(Columns));
// Registers of the gradient's warpgroups: two hold G, one makes the weights. There are as many as
// the block was launched with.
constexpr int HOLDERS = 160, MAKER = 184;
static_assert(2 * HOLDERS + MAKER <= 3 * (65536 / (3 * GROUP) / 8 * 8),
              "setmaxnreg would wait for ever");
// How many times 16 features the gradient keeps in registers; the others, at 512, are in shared
// memory.
template <int W>
constexpr int KEPT = W / 16 < 28 ? W / 16 : 28;
template <int W>
constexpr int REST_BYTES = TILE_BYTES<W> - TILE_BYTES<16> * KEPT<W>;
template <int W>
constexpr int GRADIENT_SHARED =
    SUMS_SHARED<W> + static_cast<int>(sizeof(Columns)) + 2 * TILE_BYTES<TILE> + REST_BYTES<W>;

// Where eight features of a row of a tile lie, in halves.
__device__ __forceinline__ int64_t place(int64_t row, int eight, int width) {
    return (row / TILE * (width / 8) + eight) * TILE * 8 + row % TILE * 8;
}

// Eight features from d on, 0 past the end.
__device__ __forceinline__ void features_at(const Large& a, int64_t row, int d, float (&v)[8]) {
    if (a.vectors && d + 8 <= a.D) return load(a.features, a.dtype, row * a.row_stride + d, v);
#pragma unroll
    for (int c = 0; c < 8; ++c)
        v[c] = d + c < a.D ? load(a.features, a.dtype, row * a.row_stride + d + c) : 0.f;
}

constexpr int COPIERS = 2 * GROUP;  // the first two warpgroups

// What a kernel needs of its span of tiles: buffers in shared memory, and this thread's two rows (i
// and i + 8, z as A of a product).
template <int W>
struct Span {
    const Large& a;
    const int begin, end;
    unsigned char* const tiles = dynamic_shared<unsigned char>();
    Columns* const columns = reinterpret_cast<Columns*>(tiles + BUFFERS * TILE_BYTES<W>);

    // The blockIdx.y-th of `spans` of `units` of `size` tiles.
    __device__ __forceinline__ Span(const Large& large, int spans, int64_t units, int size)
        : a(large),
          begin(static_cast<int>(units * blockIdx.y / spans) * size),
          end(static_cast<int>(units * (blockIdx.y + 1) / spans) * size) {}
    __device__ __forceinline__ unsigned char* tile(int n) const {
        return tiles + (n - begin) % BUFFERS * TILE_BYTES<W>;
    }
    __device__ __forceinline__ Columns& column(int n) const {
        return columns[(n - begin) % COLUMNS];
    }

    // By the copiers; nothing past the end.
    template <bool WEIGHTS>
    __device__ __forceinline__ void fetch(int n) const {
        if (n >= end) return;
        unsigned char* const to = tile(n) + threadIdx.x * 16;
        const uint16_t* const from = a.z + int64_t{n} * (TILE * W) + threadIdx.x * 8;
#pragma unroll
        for (int k = 0; k < TILE * W / 8 / COPIERS; ++k)
            copy_async(to + k * COPIERS * 16, from + k * COPIERS * 8);
        fetch_columns<WEIGHTS>(n, column(n));
    }
    template <bool WEIGHTS>
    __device__ __forceinline__ void fetch_columns(int64_t n, Columns& to) const {
        const int quarter = threadIdx.x / 16, at = threadIdx.x % 16 * 4,
                  label = threadIdx.x % 32 * 2;
        if (quarter == 0) copy_async(&to.inverse[at], &a.inverse[n * TILE + at]);
        if (WEIGHTS && quarter == 1) copy_async(&to.pull[at], &a.pull[n * TILE + at]);
        if (WEIGHTS && quarter == 2) copy_async(&to.push[at], &a.push[n * TILE + at]);
        if (quarter == 4 || quarter == 5) copy_async(&to.labels[label], &a.kinds[n * TILE + label]);
    }
    template <int STEPS>
    __device__ __forceinline__ void rows(int64_t i, uint32_t (&z)[STEPS][4]) const {
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
#pragma unroll
            for (int x = 0; x < 4; ++x) {
                z[k][x] = *reinterpret_cast<const uint32_t*>(
                    a.z + place(i + x % 2 * 8, 2 * k + x / 2, W) + threadIdx.x % 4 * 2);
            }
        }
    }
    // The rows' products with those of tile n; in s after wgmma_wait. `rest`: the features that are
    // not in registers.
    template <int STEPS>
    __device__ __forceinline__ void multiply(const uint32_t (&z)[STEPS][4], int n, float (&s)[32],
                                             [[maybe_unused]] uint64_t rest = 0) const {
        const uint64_t theirs = descriptor(tile(n), TILE * 16, 128);
        wgmma_first(s, z[0], theirs);
#pragma unroll
        for (int k = 1; k < W / 16; ++k) {
            if constexpr (STEPS == W / 16) {
                wgmma(s, z[k], theirs + k * (2 * TILE));
            } else {
                k < STEPS ? wgmma(s, z[k % STEPS], theirs + k * (2 * TILE))
                          : wgmma<DType::f16, TILE>(s, rest + (k - STEPS) * (2 * TILE),
                                                    theirs + k * (2 * TILE));
            }
        }
        wgmma_commit();
    }
};

}  // namespace
}  // namespace miue
