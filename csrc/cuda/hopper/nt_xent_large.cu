// NT-Xent of many half-precision rows of at most 512 features, for Hopper: value and gradient in
// six launches.
//
// The workload that these kernels are for is a call of `nt_xent` at B = 8,192 and D = 512 in
// bfloat16: 0.34 ms are predicted, against about 1.3 ms for the kernels of nt_xent.cu and 0.66 ms
// for Triton (docs/performance-notes.md). In a PGD step of ResNet-18 they save 1 to 3 %.
//
//   pack_tiles      rows as fp16 times a power of two, norms in [2^12, 2^13); tiles of 64 rows
//   tile_sums       P, N (and the maximum, for `negatives`) of 128 rows over a span of tiles
//   row_weights     coefficients, as logarithms; the loss of 32 rows
//   whole_loss      one block: the loss, and a power of two that brings the weights into fp16's
//                   range
//   tile_gradient   G = W z of 64 rows over a span of tiles, and G . z
//   project_tiles   (G - (G . z) z) / ||f||, the spans summed in order
//
// A tile of z is copied to shared memory as it lies in memory, once for each block that needs it:
// [eight features][row][8 numbers], core matrices without swizzle. S = Z z^T takes them K-major and
// G += W z N-major, like an attention whose keys are its values.
//   tile_sums: each of two warpgroups keeps 64 rows in registers; the products of one tile run
//       while another's exponentials are taken.
//   tile_gradient: one warpgroup keeps the 64 rows in registers and makes a tile's weights;
//       meanwhile the other two multiply the weights of the tile before with it, half of the
//       features of G each.
// W is rounded to fp16 (2^-11), also in G . z: only what is orthogonal to z sees the rounding. A
// similarity, a row's to itself too, is one tensor-core sum over all features, so that what its
// truncation does to P and to N cancels.
#include <algorithm>

#include "nt_xent_tiles.cuh"

// The CPU tests lower it, so that few rows reach several spans and several tiles of a span.
#ifndef MIUE_MULTIPROCESSORS
#define MIUE_MULTIPROCESSORS 132
#endif

// Batches of at most so many rows keep the exact weights of nt_xent.cu. The CPU tests lower it, so
// that small batches reach these kernels.
#ifndef MIUE_LARGE_ROWS
#define MIUE_LARGE_ROWS 512
#endif

namespace miue {
namespace {

// One warp per row.
__global__ void pack_tiles(Large a) {
    const int lane = threadIdx.x % 32;
    const int64_t row = blockIdx.x * int64_t{WARPS} + threadIdx.x / 32;
    const bool real = row < a.B;
    Norm norm;
    for (int d = 8 * lane; real && d < a.D; d += 256) {
        float v[8];
        features_at(a, row, d, v);
#pragma unroll
        for (int c = 0; c < 8; ++c) norm.add(v[c]);
    }
    norm.finish();
    const bool finite = norm.base <= FLOAT_MAX;
    const int power = finite ? UNIT - ilogbf(norm.base) : 0;
    for (int d = 8 * lane; d < a.width; d += 256) {
        float v[8] = {};
        if (real) features_at(a, row, d, v);
#pragma unroll
        for (int c = 0; c < 8; ++c) v[c] = finite ? ldexpf(v[c], power) : norm.poison;
        store(a.z, DType::f16, place(row, d / 8, a.width), v);
    }
    if (lane == 0) {
        a.inverse[row] = real ? (finite ? 1 / ldexpf(norm.base, power) : 1.f) : 0.f;
        a.own[row] = norm.own, a.base[row] = norm.base, a.kinds[row] = real ? a.labels[row] : 0;
    }
}

// P, N and N's shift of this thread's two rows, over the columns that it has seen. Everything in
// units of log2: per, own: rate times 1 / norm and ||z||. `real`: how many columns there are.
template <bool NEGATIVES>
struct TileSums {
    float P[2] = {0, 0}, N[2] = {0, 0}, top[2] = {-INFINITY, -INFINITY};

    __device__ __forceinline__ void add(float (&s)[32], const Columns& columns,
                                        const float (&per)[2], const float (&own)[2],
                                        const int64_t (&labels)[2], int real) {
        const auto column = [](int k) { return k / 4 * 8 + threadIdx.x % 4 * 2 + k % 2; };
#pragma unroll
        for (int k = 0; k < 32; ++k) {
            const int r = k / 2 % 2;
            s[k] = fmaf(s[k] * columns.inverse[column(k)], per[r], NEGATIVES ? 0.f : -own[r]);
        }
        if (real < TILE) {
#pragma unroll
            for (int k = 0; k < 32; ++k) {
                if (static_cast<int>(column(k)) >= real) s[k] = -INFINITY;
            }
        }
        float shift[2] = {0, 0};
        if (NEGATIVES) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float best = top[r];
#pragma unroll
                for (int k = 2 * r; k < 32; k += k % 2 ? 3 : 1) {
                    if (columns.labels[column(k)] != labels[r]) best = fmaxf(best, s[k]);
                }
                if (best > top[r]) N[r] *= exp2_of(top[r] - best);
                top[r] = best;
                shift[r] = best == -INFINITY ? 0 : best;
            }
        }
#pragma unroll
        for (int k = 0; k < 32; ++k) {
            const int r = k / 2 % 2;
            const bool same = columns.labels[column(k)] == labels[r];
            const float e = exp2_of(NEGATIVES ? s[k] - (same ? own[r] : shift[r]) : s[k]);
            if (same) P[r] += e;
            if (!same) N[r] += e;
        }
    }
    // Over the four lanes of a row; all of them get it.
    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float best = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
            best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 2));
            if (best > top[r]) N[r] *= exp2_of(top[r] - best);
            top[r] = best;
#pragma unroll
            for (int lanes = 1; lanes < 4; lanes *= 2) {
                P[r] += __shfl_xor_sync(0xffffffffu, P[r], lanes);
                N[r] += __shfl_xor_sync(0xffffffffu, N[r], lanes);
            }
        }
    }
};

// Block (x: two tiles of rows, y: span of tiles of columns).
template <int W, bool NEGATIVES>
__global__ void __launch_bounds__(2 * GROUP, 1) tile_sums(Large a) {
    const int lane = threadIdx.x % 32;
    const int64_t i = blockIdx.x * int64_t{2 * TILE} + threadIdx.x / 32 * 16 + lane / 4;
    const Span<W> span(a, a.sum_spans, a.Bp / TILE / 2, 2);
    const float rate = a.inv_t * BITS, per[2] = {a.inverse[i] * rate, a.inverse[i + 8] * rate};
    const float own[2] = {a.own[i] * rate, a.own[i + 8] * rate};
    const int64_t labels[2] = {a.kinds[i], a.kinds[i + 8]};
    uint32_t z[W / 16][4];
    span.rows(i, z);
    TileSums<NEGATIVES> sums;
    const auto add = [&](int tile, float (&s)[32]) {
        sums.add(s, span.column(tile), per, own, labels,
                 static_cast<int>(min(a.B - int64_t{tile} * TILE, int64_t{TILE})));
    };
    span.template fetch<false>(span.begin);
    span.template fetch<false>(span.begin + 1);
    for (int tile = span.begin; tile < span.end; tile += 2) {
        float even[32], odd[32];
        finish_copies();
        __syncthreads();  // both tiles are there
        span.multiply(z, tile, even);
        span.multiply(z, tile + 1, odd);
        span.template fetch<false>(tile + 2);
        wgmma_wait<1>(even);
        __syncthreads();  // nobody needs the first
        span.template fetch<false>(tile + 3);
        add(tile, even);
        wgmma_wait(odd);
        add(tile + 1, odd);
    }
    sums.finish();
    if (lane % 4 == 0) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int64_t at = blockIdx.y * a.Bp + i + 8 * r;
            a.P[at] = sums.P[r], a.N[at] = sums.N[r], a.top[at] = sums.top[r];
        }
    }
}

__global__ void row_weights(Large a) {
    const int64_t i = blockIdx.x * int64_t{THREADS} + threadIdx.x;
    const float rate = a.inv_t * BITS, own = a.own[i];
    double loss = 0;
    float peak = 0;
    a.pull[i] = a.push[i] = -INFINITY;
    if (i < a.B) {
        float P = 0, N = 0, top = -INFINITY;
        for (int k = 0; k < a.sum_spans; ++k) top = fmaxf(top, a.top[k * a.Bp + i]);
        for (int k = 0; k < a.sum_spans; ++k) {
            const float part = a.top[k * a.Bp + i];
            P += a.P[k * a.Bp + i];
            N += a.N[k * a.Bp + i] * (a.negatives && part < top ? exp2_of(part - top) : 1.f);
        }
        float same, other;
        double shift;
        loss = coefficients(P, N, static_cast<double>(top) / rate, own, a.inv_t, a.negatives, same,
                            other, shift);
        a.pull[i] = log2f(-same) - own * rate,
        a.push[i] = log2f(other) - (a.negatives ? top : own * rate);
        peak = -same * P;
    }
    loss = warp_sum(loss);
    peak = warp_max(peak);
    if (threadIdx.x % 32 == 0) a.losses[i / 32] = loss, a.peaks[i / 32] = peak;
}

__global__ void whole_loss(Large a) {
    __shared__ float peaks[WARPS];
    double total = 0;
    float peak = 0;
    for (int64_t k = threadIdx.x; k < a.Bp / 32; k += THREADS)
        total += a.losses[k], peak = fmaxf(peak, a.peaks[k]);
    peak = warp_max(peak);
    if (threadIdx.x % 32 == 0) peaks[threadIdx.x / 32] = peak;
    total = block_sum(total);
    if (threadIdx.x == 0) {
        for (int k = 1; k < WARPS; ++k) peak = fmaxf(peak, peaks[k]);
        *static_cast<float*>(a.loss) = static_cast<float>(total / a.B);
        // A weight is at most twice `peak`, the sum of a row's pulls and of its pushes; it is
        // multiplied with an inverse, 2^-13 to 2^-12.
        *a.scale = ldexpf(1.f, UNIT + (peak > 0 ? min(UNIT - ilogbf(peak), 100) : 0));
    }
}

// Block (x: tile of rows, y: span of tiles of columns). Between two barriers of the block the third
// warpgroup multiplies the rows with a tile, and after the second it makes the weights, while the
// others are at the tile before: the products do not compete.
template <int W>
__global__ void __launch_bounds__(3 * GROUP, 1) tile_gradient(Large a) {
    const int lane = threadIdx.x % 32, t = lane % 4,
              local = threadIdx.x % GROUP / 32 * 16 + lane / 4;
    const int64_t i = blockIdx.x * int64_t{TILE} + local;
    const Span<W> span(a, a.spans, a.Bp / TILE, 1);
    Columns& own = span.columns[COLUMNS];  // of this block's rows
    // two: as a tile, of columns instead of features
    unsigned char* const weights = span.tiles + SUMS_SHARED<W> + sizeof(Columns);
    unsigned char* const rest = weights + 2 * TILE_BYTES<TILE>;
    if (threadIdx.x >= COPIERS) {
        registers_up<MAKER>();
        const float scale = *a.scale, rate = a.inv_t * BITS;
        float along[2] = {0, 0};
        uint32_t z[KEPT<W>][4];
        span.rows(i, z);
        block_barrier();
        for (int n = span.begin; n < span.end; ++n) {
            float s[32];
            span.multiply(z, n, s, descriptor(rest, TILE * 16, 128));
            wgmma_wait(s);
            block_barrier();
            // The rows' own numbers are read again for every tile: there are no registers to keep
            // them.
            const float rates[2] = {own.inverse[local] * rate, own.inverse[local + 8] * rate};
            const float pull[2] = {own.pull[local], own.pull[local + 8]},
                        push[2] = {own.push[local], own.push[local + 8]};
            const int64_t labels[2] = {own.labels[local], own.labels[local + 8]};
            const Columns& c = span.column(n);
            const bool whole = (n + int64_t{1}) * TILE <= a.B;
            unsigned char* const to =
                weights + (n - span.begin) % 2 * TILE_BYTES<TILE> + local * 16 + 4 * t;
#pragma unroll
            for (int eight = 0; eight < TILE / 8; ++eight) {
                float w[2][2];
#pragma unroll
                for (int x = 0; x < 2; ++x) {
                    const int column = 8 * eight + 2 * t + x;
                    const float inverse = c.inverse[column], their_pull = c.pull[column],
                                their_push = c.push[column];
                    const float factor = inverse * scale;
                    const int64_t label = c.labels[column];
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        const float raw = s[4 * eight + 2 * r + x], per = rates[r] * inverse;
                        const bool same = label == labels[r];
                        const float mine = exp2_of(fmaf(raw, per, same ? pull[r] : push[r]));
                        const float theirs =
                            exp2_of(fmaf(raw, per, same ? their_pull : their_push));
                        w[r][x] = (mine + theirs) * (same ? -factor : factor);
                    }
                    // `mine` may have overflowed
                    if (!whole && inverse == 0) w[0][x] = w[1][x] = 0;
                }
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const uint32_t pair = half_pair(w[r][0], w[r][1]);
                    along[r] = fmaf(half_value(static_cast<uint16_t>(pair)), s[4 * eight + 2 * r],
                                    along[r]);
                    along[r] = fmaf(half_value(static_cast<uint16_t>(pair >> 16)),
                                    s[4 * eight + 2 * r + 1], along[r]);
                    *reinterpret_cast<uint32_t*>(to + (eight * TILE + 8 * r) * 16) = pair;
                }
            }
            finish_writes();
            block_barrier();
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int lanes = 1; lanes < 4; lanes *= 2)
                along[r] += __shfl_xor_sync(0xffffffffu, along[r], lanes);
            if (t == 0) a.along[blockIdx.y * a.Bp + i + 8 * r] = along[r];
        }
        return;
    }
    registers_down<HOLDERS>();
    const int half = threadIdx.x / GROUP;
    float g[W / 4];
#pragma unroll
    for (float& v : g) v = 0.f;
    const auto multiply = [&](int n) {
        const uint64_t theirs =
            descriptor(span.tile(n) + half * (W / 16) * (TILE * 16), 128, TILE * 16);
        const uint64_t rows =
            descriptor(weights + (n - span.begin) % 2 * TILE_BYTES<TILE>, TILE * 16, 128);
        wgmma_begin(g);
#pragma unroll
        for (int k = 0; k < TILE / 16; ++k)
            wgmma<DType::f16, W / 2, true>(g, rows + k * (2 * TILE), theirs + k * 16);
        wgmma_commit();
        wgmma_wait(g);
    };
    span.template fetch_columns<true>(blockIdx.x, own);
    for (int k = threadIdx.x; k < REST_BYTES<W> / 16; k += COPIERS) {
        copy_async(rest + k * 16, a.z + place(i - local, 2 * KEPT<W>, W) + k * 8);
    }
    span.template fetch<true>(span.begin);
    finish_copies();
    block_barrier();
    span.template fetch<true>(span.begin + 1);
    block_barrier();
    finish_copies();
    block_barrier();
    for (int n = span.begin; n + 1 < span.end; ++n) {
        span.template fetch<true>(n + 2);
        block_barrier();
        multiply(n);
        finish_copies();
        block_barrier();
    }
    multiply(span.end - 1);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (i + 8 * r >= a.B) continue;
        float* const to = a.parts + (blockIdx.y * a.B + i + 8 * r) * W + half * (W / 2) + 2 * t;
#pragma unroll
        for (int n = 0; n < W / 16; ++n)
            *reinterpret_cast<float2*>(to + 8 * n) =
                make_float2(g[4 * n + 2 * r], g[4 * n + 2 * r + 1]);
    }
}

// One warp per row; grad may be the only part.
__global__ void project_tiles(Large a) {
    float* const grad = static_cast<float*>(a.grad);
    const int64_t row = blockIdx.x * int64_t{WARPS} + threadIdx.x / 32;
    if (row >= a.B) return;
    const float inverse = a.inverse[row];
    float along = 0;
    for (int k = 0; k < a.spans; ++k) along += a.along[k * a.Bp + row];
    along *= inverse * inverse;
    // their product may be no number
    const float factor = a.inv_t / (static_cast<float>(a.B) * *a.scale), shrink = 1 / a.base[row];
    for (int d = threadIdx.x % 32 * 8; d < a.D; d += 256) {
        float g[8] = {}, z[8];
        for (int k = 0; k < a.spans; ++k) {
            float part[8];
            load(a.parts, DType::f32, (k * a.B + row) * a.width + d, part);
#pragma unroll
            for (int c = 0; c < 8; ++c) g[c] += part[c];
        }
        load(a.z, DType::f16, place(row, d / 8, a.width), z);
#pragma unroll
        for (int c = 0; c < 8; ++c) g[c] = (g[c] - along * z[c]) * factor * shrink;
        if (a.D % 4 == 0 && d + 8 <= a.D) {
            store(grad, DType::f32, row * a.D + d, g);
        } else {
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                if (d + c < a.D) grad[row * a.D + d + c] = g[c];
            }
        }
    }
}

// How many spans of `units` let the multiprocessors, one block each, end soonest.
int spans_of(int64_t blocks, int64_t units, int64_t Bp) {
    int64_t best = 1, least = 0;
    for (int64_t spans = 1; spans <= units && (spans == 1 || spans * Bp <= SPLIT_ROWS); ++spans) {
        const int64_t cost =
            ceil_div(blocks * spans, MIUE_MULTIPROCESSORS) * ceil_div(units, spans);
        if (spans == 1 || cost < least) best = spans, least = cost;
    }
    return static_cast<int>(best);
}

Large plan(const NtXentArgs& args, bool want_grad, int64_t* bytes) {
    Large a{};
    static_cast<NtXentArgs&>(a) = args;
    Carver carver{static_cast<char*>(args.workspace)};
    a.Bp = ceil_div(a.B, 2 * TILE) * 2 * TILE, a.width = a.D <= 128 ? 128 : a.D <= 256 ? 256 : 512;
    const int64_t tiles = a.Bp / TILE, pairs = tiles / 2;
    a.sum_spans = spans_of(pairs, pairs, a.Bp), a.spans = spans_of(tiles, tiles, a.Bp);
    carver.take(a.z, a.Bp * a.width), carver.take(a.kinds, a.Bp), carver.take(a.losses, a.Bp / 32);
    for (float** p : {&a.inverse, &a.own, &a.base, &a.pull, &a.push}) carver.take(*p, a.Bp);
    for (float** p : {&a.P, &a.N, &a.top}) carver.take(*p, a.sum_spans * a.Bp);
    carver.take(a.peaks, a.Bp / 32), carver.take(a.scale, 1);
    if (want_grad) carver.take(a.along, a.spans * a.Bp);
    if (a.spans == 1 && a.D == a.width) {
        a.parts = static_cast<float*>(a.grad);
    } else if (want_grad) {
        carver.take(a.parts, a.spans * a.B * a.width);
    }
    *bytes = carver.bytes;
    return a;
}

bool fits(int64_t B, int64_t D, DType dtype) {
    return (dtype == DType::f16 || dtype == DType::bf16) && D >= 1 && D <= 512 &&
           B > MIUE_LARGE_ROWS && B <= 1 << 30;
}

template <int W>
void launch_large(const Large& a, void* stream) {
    const auto sums = a.negatives ? tile_sums<W, true> : tile_sums<W, false>;
    launch("pack_tiles", pack_tiles, a.Bp / WARPS, 1, stream, a);
    launch_wide("tile_sums", sums, a.Bp / TILE / 2, a.sum_spans, 2 * GROUP, SUMS_SHARED<W>, stream,
                a);
    launch("row_weights", row_weights, a.Bp / THREADS, 1, stream, a);
    launch("whole_loss", whole_loss, 1, 1, stream, a);
    if (!a.grad) return;
    launch_wide("tile_gradient", tile_gradient<W>, a.Bp / TILE, a.spans, 3 * GROUP,
                GRADIENT_SHARED<W>, stream, a);
    launch("project_tiles", project_tiles, a.Bp / WARPS, 1, stream, a);
}

}  // namespace

bool nt_xent_large_takes(int64_t B, int64_t D, DType dtype) {
    return fits(B, D, dtype) && capability() == 90;
}

int64_t nt_xent_large_workspace(int64_t B, int64_t D, DType dtype, bool want_grad) {
    NtXentArgs args{};
    args.B = B, args.D = D;
    int64_t bytes = 0;
    if (fits(B, D, dtype)) plan(args, want_grad, &bytes);
    return bytes;
}

void nt_xent_large(const NtXentArgs& args, void* stream) {
    int64_t bytes;
    Large a = plan(args, args.grad != nullptr, &bytes);
    a.vectors = aligned(a.features) && a.row_stride % 8 == 0;
    a.inv_t = static_cast<float>(1 / a.temperature);
    if (a.width == 128) return launch_large<128>(a, stream);
    a.width == 256 ? launch_large<256>(a, stream) : launch_large<512>(a, stream);
}

}  // namespace miue
