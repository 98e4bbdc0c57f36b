// NT-Xent: value and gradient (formulas: miue_fast/reference/nt_xent.py), in six kernels; number
// formats: nt_xent.cuh.
//   pack_rows    hi, lo, norms
//   row_sums     P, N (and the maximum, for `negatives`) of 64 rows against a span of columns
//   finish_rows  one block: adds the spans in order, coefficients, loss
//   weights      W r_j of one chunk x chunk square, as fp16 hi + lo with one power-of-two scale per
//                row and 64 columns
//   gradient     G += W q over that square; owner computes, no atomics
//   project      (G - (G.z) z) / ||f||
// A Hopper has other kernels for large batches in half precision (hopper/nt_xent_large.cu).
#include <algorithm>

#include "nt_xent.cuh"

// The CPU tests lower both, so that few rows reach every loop.
#ifndef MIUE_CHUNK
#define MIUE_CHUNK 2048
#endif
#ifndef MIUE_SPANS
#define MIUE_SPANS 256
#endif

namespace miue {
namespace {

constexpr int TILE = 64;  // rows and columns of a block's tile
constexpr int STEP = 32;  // depth of one stage in shared memory
// halves between rows of a stage: 32-bit fragment reads hit 32 banks
constexpr int STRIDE = STEP + 8;
constexpr int WIDE = TILE + 8;  // the same for the q stage of `gradient`

struct Work {
    int64_t B, D, Bp, Dp;  // Bp, Dp: padded with zeros to whole tiles
    int64_t spans, chunk;
    uint16_t *hi, *lo;        // [Bp, Dp] fp16 bits; lo: of fp32 features
    double *inverse, *shift;  // [Bp] 1 / (norm * scale); shift of N
    float *base, *own;        // [Bp] clamped norm, ||z||
    float *P, *N;             // [spans, Bp]
    double* top;              // [spans, Bp]
    float *same, *other;      // [Bp] coefficients of the row
    uint16_t *w_hi, *w_lo;    // [chunk, chunk]
    float* w_scale;           // [chunk, chunk / TILE]
    float* G;                 // [chunk, Dp]
    int64_t bytes;
};

Work plan(int64_t B, int64_t D, bool split, bool want_grad, void* memory) {
    Work w{};
    Carver carver{static_cast<char*>(memory)};
    w.B = B, w.D = D, w.Bp = ceil_div(B, TILE) * TILE, w.Dp = ceil_div(D, TILE) * TILE;
    const int64_t tiles = w.Bp / TILE;
    w.spans = tiles ? std::min(tiles, std::max<int64_t>(1, MIUE_SPANS / tiles)) : 0;
    w.chunk = std::min<int64_t>(w.Bp, MIUE_CHUNK);
    carver.take(w.hi, w.Bp * w.Dp);
    if (split) carver.take(w.lo, w.Bp * w.Dp);
    carver.take(w.inverse, w.Bp), carver.take(w.shift, w.Bp), carver.take(w.top, w.spans * w.Bp);
    for (float** p : {&w.base, &w.own, &w.same, &w.other}) carver.take(*p, w.Bp);
    carver.take(w.P, w.spans * w.Bp), carver.take(w.N, w.spans * w.Bp);
    if (want_grad) {
        carver.take(w.w_hi, w.chunk * w.chunk);
        carver.take(w.w_lo, w.chunk * w.chunk);
        carver.take(w.w_scale, w.chunk * (w.chunk / TILE));
        carver.take(w.G, w.chunk * w.Dp);
    }
    w.bytes = carver.bytes;
    return w;
}

// One warp per row.
template <bool SPLIT>
__global__ void pack_rows(const void* features, DType dtype, int64_t stride, Work w) {
    const int lane = threadIdx.x % 32;
    const int64_t i = blockIdx.x * int64_t{WARPS} + threadIdx.x / 32;
    Norm norm;
    if (i < w.B) {
        for (int64_t d = lane; d < w.D; d += 32) norm.add(load(features, dtype, i * stride + d));
    }
    norm.finish();
    for (int64_t d = lane; d < w.Dp; d += 32) {
        const float x =
            i < w.B && d < w.D ? load(features, dtype, i * stride + d) * norm.scale : 0.f;
        uint16_t hi, lo;
        operand<SPLIT>(x, hi, lo);
        w.hi[i * w.Dp + d] = hi;
        if (SPLIT) w.lo[i * w.Dp + d] = lo;
    }
    if (lane == 0) w.base[i] = norm.base, w.inverse[i] = norm.inverse, w.own[i] = norm.own;
}

// acc + small = 64 x 64 products of packed rows i0.. and j0..; warp w has rows 16w..16w+15 in mma
// layout.
template <bool SPLIT>
__device__ __forceinline__ void products(const Work& w, int64_t i0, int64_t j0, float (&acc)[8][4],
                                         float (&small)[8][4]) {
    constexpr int PARTS = SPLIT ? 2 : 1;
    alignas(16) __shared__ uint16_t stage[2 * PARTS][TILE][STRIDE];  // i hi, j hi, i lo, j lo
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, t = lane % 4;
    uint4 next[2 * PARTS][2];
    auto fetch = [&](int64_t k0) {
#pragma unroll
        for (int part = 0; part < 2 * PARTS; ++part) {
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                const int unit = threadIdx.x + THREADS * u;
                const int64_t r = (part % 2 ? j0 : i0) + unit / 4;
                next[part][u] = *reinterpret_cast<const uint4*>((part < 2 ? w.hi : w.lo) +
                                                                r * w.Dp + k0 + unit % 4 * 8);
            }
        }
    };
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) acc[n][c] = small[n][c] = 0;
    }
    if (w.Dp > 0) fetch(0);
    for (int64_t k0 = 0; k0 < w.Dp; k0 += STEP) {
        __syncthreads();
#pragma unroll
        for (int part = 0; part < 2 * PARTS; ++part) {
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                const int unit = threadIdx.x + THREADS * u;
                *reinterpret_cast<uint4*>(&stage[part][unit / 4][unit % 4 * 8]) = next[part][u];
            }
        }
        __syncthreads();
        if (k0 + STEP < w.Dp) fetch(k0 + STEP);
#pragma unroll
        for (int k = 0; k < STEP; k += 16) {
            uint32_t a[2][4], b[2][8][2];
            auto pair = [&](int part, int r, int c) {
                return *reinterpret_cast<const uint32_t*>(&stage[part][r][k + c + 2 * t]);
            };
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                a[part][0] = pair(2 * part, row, 0), a[part][1] = pair(2 * part, row + 8, 0);
                a[part][2] = pair(2 * part, row, 8), a[part][3] = pair(2 * part, row + 8, 8);
#pragma unroll
                for (int n = 0; n < 8; ++n) {
                    b[part][n][0] = pair(2 * part + 1, 8 * n + lane / 4, 0);
                    b[part][n][1] = pair(2 * part + 1, 8 * n + lane / 4, 8);
                }
            }
            add_products<SPLIT>(acc, small, a, b);
        }
    }
}

__device__ __forceinline__ Row row_of(const Work& w, const int64_t* labels, int64_t i,
                                      bool coefficients) {
    if (i >= w.B) return Row{0, 0, 0, 0, 0, 0, false};
    if (!coefficients) return Row{labels[i], w.inverse[i], 0, w.own[i], 0, 0, true};
    return Row{labels[i], w.inverse[i], w.shift[i], w.own[i], w.same[i], w.other[i], true};
}

// Block (x: row tile, y: span of column tiles). Sums of every row over the span.
template <bool SPLIT>
__global__ void row_sums(Work w, const int64_t* labels, double inv_t, bool negatives) {
    __shared__ Row columns[TILE];
    const int lane = threadIdx.x % 32;
    const int64_t i0 = blockIdx.x * int64_t{TILE}, first = i0 + threadIdx.x / 32 * 16 + lane / 4,
                  tiles = w.Bp / TILE;
    const int64_t begin = tiles * blockIdx.y / w.spans, end = tiles * (blockIdx.y + 1) / w.spans;
    const Row rows[2] = {row_of(w, labels, first, false), row_of(w, labels, first + 8, false)};
    Sums sums(rows, negatives);
    for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t j0 = tile * TILE;
        float acc[8][4], small[8][4];
        __syncthreads();
        if (threadIdx.x < TILE) columns[threadIdx.x] = row_of(w, labels, j0 + threadIdx.x, false);
        __syncthreads();
        products<SPLIT>(w, i0, j0, acc, small);
        sums.add(acc, small, rows, columns, first, j0, inv_t, negatives);
    }
    sums.finish(inv_t);
    if (lane % 4 == 0) {
        for (int r = 0; r < 2; ++r) {
            const int64_t at = blockIdx.y * w.Bp + first + 8 * r;
            w.P[at] = sums.P[r], w.N[at] = sums.N[r], w.top[at] = sums.top[r];
        }
    }
}

__global__ void finish_rows(Work w, double inv_t, bool negatives, float* loss) {
    double total = 0;
    for (int64_t i = threadIdx.x; i < w.B; i += THREADS) {
        const float own = w.own[i];
        float P = 0, N = 0;
        double top = w.top[i];
        for (int64_t k = 1; k < w.spans; ++k) top = fmax(top, w.top[k * w.Bp + i]);
        for (int64_t k = 0; k < w.spans; ++k) {
            const double part = w.top[k * w.Bp + i];
            P += w.P[k * w.Bp + i];
            N += w.N[k * w.Bp + i] * (negatives && part < top ? exp_of(part - top, inv_t) : 1.f);
        }
        total += coefficients(P, N, top, own, inv_t, negatives, w.same[i], w.other[i], w.shift[i]);
    }
    total = block_sum(total);
    if (threadIdx.x == 0) *loss = static_cast<float>(total / w.B);
}

// Block (x: column tile, y: row tile) of the square whose corner is (row0, column0).
template <bool SPLIT>
__global__ void weights(Work w, const int64_t* labels, double inv_t, int64_t row0,
                        int64_t column0) {
    __shared__ Row columns[TILE];
    const int lane = threadIdx.x % 32, local = blockIdx.y * TILE + threadIdx.x / 32 * 16 + lane / 4;
    const int64_t j0 = column0 + blockIdx.x * TILE;
    if (threadIdx.x < TILE) columns[threadIdx.x] = row_of(w, labels, j0 + threadIdx.x, true);
    __syncthreads();
    float acc[8][4], small[8][4];
    products<SPLIT>(w, row0 + blockIdx.y * TILE, j0, acc, small);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int64_t i = row0 + local + 8 * r;
        uint32_t hi[8], lo[8];
        float scale;
        pair_weights(acc, small, row_of(w, labels, i, true), columns, r, i, j0, inv_t, hi, lo,
                     scale);
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            const int64_t at =
                (local + 8 * r) * w.chunk + blockIdx.x * TILE + 8 * n + 2 * (lane % 4);
            *reinterpret_cast<uint32_t*>(w.w_hi + at) = hi[n];
            *reinterpret_cast<uint32_t*>(w.w_lo + at) = lo[n];
        }
        if (lane % 4 == 0) w.w_scale[(local + 8 * r) * (w.chunk / TILE) + blockIdx.x] = scale;
    }
}

// Block (x: 64 features, y: row tile): G [64, 64] (+)= W [64, columns] q [columns, 64].
template <bool SPLIT>
__global__ void gradient(Work w, int64_t column0, int64_t columns, bool add) {
    alignas(16) __shared__ uint16_t w_stage[2][TILE][STRIDE];  // hi, lo
    constexpr int PARTS = SPLIT ? 2 : 1;
    alignas(16) __shared__ uint16_t q_stage[PARTS][STEP][WIDE];
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, row = threadIdx.x / 32 * 16 + g;
    const int64_t i0 = blockIdx.y * int64_t{TILE}, d0 = blockIdx.x * int64_t{TILE};
    float acc[8][4];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            acc[n][c] = add ? w.G[(i0 + row + c / 2 * 8) * w.Dp + d0 + 8 * n + 2 * t + c % 2] : 0.f;
        }
    }
    uint4 w_next[2][2], q_next[PARTS][2];
    auto fetch = [&](int64_t k0) {
#pragma unroll
        for (int u = 0; u < 2; ++u) {
            const int unit = threadIdx.x + THREADS * u;
            const int64_t from = (i0 + unit / 4) * w.chunk + k0 + unit % 4 * 8;
            w_next[0][u] = *reinterpret_cast<const uint4*>(w.w_hi + from);
            w_next[1][u] = *reinterpret_cast<const uint4*>(w.w_lo + from);
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                const int64_t at = (column0 + k0 + unit / 8) * w.Dp + d0 + unit % 8 * 8;
                q_next[part][u] = *reinterpret_cast<const uint4*>((part ? w.lo : w.hi) + at);
            }
        }
    };
    fetch(0);
    for (int64_t k0 = 0; k0 < columns; k0 += STEP) {
        __syncthreads();
#pragma unroll
        for (int u = 0; u < 2; ++u) {
            const int unit = threadIdx.x + THREADS * u;
#pragma unroll
            for (int part = 0; part < 2; ++part)
                *reinterpret_cast<uint4*>(&w_stage[part][unit / 4][unit % 4 * 8]) = w_next[part][u];
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
                *reinterpret_cast<uint4*>(&q_stage[part][unit / 8][unit % 8 * 8]) = q_next[part][u];
        }
        __syncthreads();
        if (k0 + STEP < columns) fetch(k0 + STEP);
        const int64_t scales = k0 / TILE;
        const float scale[2] = {w.w_scale[(i0 + row) * (w.chunk / TILE) + scales],
                                w.w_scale[(i0 + row + 8) * (w.chunk / TILE) + scales]};
#pragma unroll
        for (int k = 0; k < STEP; k += 16) {
            uint32_t a[2][4], b[PARTS][8][2];
#pragma unroll
            for (int part = 0; part < 2; ++part) {
#pragma unroll
                for (int x = 0; x < 4; ++x) {
                    a[part][x] = *reinterpret_cast<const uint32_t*>(
                        &w_stage[part][row + x % 2 * 8][k + x / 2 * 8 + 2 * t]);
                }
            }
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
#pragma unroll
                for (int n = 0; n < 8; ++n) {
#pragma unroll
                    for (int x = 0; x < 2; ++x) {
                        const int from = k + 8 * x + 2 * t;
                        b[part][n][x] = q_stage[part][from][8 * n + g] |
                                        static_cast<uint32_t>(q_stage[part][from + 1][8 * n + g])
                                            << 16;
                    }
                }
            }
            float sum[8][4] = {};
            mma_row(sum, a[1], b[0]);
            if (SPLIT) mma_row(sum, a[0], b[PARTS - 1]);
            mma_row(sum, a[0], b[0]);
#pragma unroll
            for (int n = 0; n < 8; ++n) {
#pragma unroll
                for (int c = 0; c < 4; ++c) acc[n][c] += sum[n][c] * scale[c / 2];
            }
        }
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c)
            w.G[(i0 + row + c / 2 * 8) * w.Dp + d0 + 8 * n + 2 * t + c % 2] = acc[n][c];
    }
}

// One warp per row of the chunk that starts at row0.
__global__ void project(Work w, const void* features, DType dtype, int64_t stride, int64_t row0,
                        float scale, float* grad) {
    const int lane = threadIdx.x % 32;
    const int64_t local = blockIdx.x * int64_t{WARPS} + threadIdx.x / 32, i = row0 + local;
    if (i >= w.B) return;
    const float base = w.base[i];
    float dot = 0;
    for (int64_t d = lane; d < w.D; d += 32)
        dot += w.G[local * w.Dp + d] * scale * (load(features, dtype, i * stride + d) / base);
    dot = warp_sum(dot);
    for (int64_t d = lane; d < w.D; d += 32) {
        const float z = load(features, dtype, i * stride + d) / base;
        grad[i * w.D + d] = (w.G[local * w.Dp + d] * scale - dot * z) / base;
    }
}

template <bool SPLIT>
void run(const NtXentArgs& a, void* stream) {
    const Work w = plan(a.B, a.D, SPLIT, a.grad != nullptr, a.workspace);
    const double inv_t = 1 / a.temperature;
    launch("pack_rows", pack_rows<SPLIT>, w.Bp / WARPS, 1, stream, a.features, a.dtype,
           a.row_stride, w);
    launch("row_sums", row_sums<SPLIT>, w.Bp / TILE, w.spans, stream, w, a.labels, inv_t,
           a.negatives);
    launch("finish_rows", finish_rows, 1, 1, stream, w, inv_t, a.negatives,
           static_cast<float*>(a.loss));
    if (!a.grad || a.D == 0) return;
    const float scale = static_cast<float>(1 / (static_cast<double>(a.B) * a.temperature));
    for (int64_t row0 = 0; row0 < w.Bp; row0 += w.chunk) {
        const int64_t rows = std::min(w.chunk, w.Bp - row0);
        for (int64_t column0 = 0; column0 < w.Bp; column0 += w.chunk) {
            const int64_t columns = std::min(w.chunk, w.Bp - column0);
            launch("weights", weights<SPLIT>, columns / TILE, rows / TILE, stream, w, a.labels,
                   inv_t, row0, column0);
            launch("gradient", gradient<SPLIT>, w.Dp / TILE, rows / TILE, stream, w, column0,
                   columns, column0 > 0);
        }
        launch("project", project, rows / WARPS, 1, stream, w, a.features, a.dtype, a.row_stride,
               row0, scale, static_cast<float*>(a.grad));
    }
}

}  // namespace

int64_t nt_xent_workspace_cuda(int64_t B, int64_t D, DType dtype, bool want_grad) {
    const int64_t bytes = plan(B, D, dtype == DType::f32, want_grad, nullptr).bytes;
#ifdef MIUE_HOPPER
    return std::max(bytes, nt_xent_large_workspace(B, D, dtype, want_grad));
#else
    return bytes;
#endif
}

void nt_xent_cuda(const NtXentArgs& a, void* stream) {
    require_dtype("nt_xent", "features", a.dtype, is_feature(a.dtype));
#ifdef MIUE_HOPPER
    if (nt_xent_large_takes(a.B, a.D, a.dtype)) return nt_xent_large(a, stream);
#endif
    a.dtype == DType::f32 ? run<true>(a, stream) : run<false>(a, stream);
}

}  // namespace miue
