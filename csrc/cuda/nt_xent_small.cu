// NT-Xent of a small batch in one cooperative launch: value and gradient (formulas and number formats: nt_xent.cuh).
//
// A block holds 32 x 64 cosines, from its 96 rows in shared memory to its weights, in registers; the grid meets twice:
//   similarities  norms and operands of the 96 rows, their products, sums of 16 columns; operands of 32 rows also go to memory
//   weights       the rows' whole sums, coefficients, W as fp16 hi + lo with one scale per row and 16 columns, sum_j W_ij s_ij = G.z
//   gradient      G [32, 64 features] = W q, (G - (G.z) z) / ||f||; the loss
// Everything a phase reads from memory is under way at once: at these sizes latency is what there is to save.
#include <algorithm>
#include <type_traits>

#include "nt_xent.cuh"

namespace miue {
namespace {

constexpr int ROWS = 32, COLUMNS = 64;   // of a block's cosines
constexpr int SPAN = 16;                 // columns of a warp: of one partial sum, and of one scale of W
constexpr int FEATURES = 64;             // of a block's tile of G
constexpr int WIDE = FEATURES + 8;       // halves between rows in shared memory: the eight rows of an ldmatrix hit 32 banks
constexpr int64_t MAX_B = 512;           // 128 blocks, and W of 32 rows beside the operands of one tile of features
constexpr int64_t max_width(bool split) { return split ? 512 : 1024; }

struct Small {
    const void* features;
    DType dtype;
    int64_t stride;
    const int64_t* labels;
    float *loss, *grad;            // grad may be null
    int64_t B, D, Bp, Dp, spans;   // Bp, Dp: padded with zeros to whole tiles
    double inv_t;
    bool negatives, vectors;       // vectors: rows can be read in 16-byte pieces
    uint16_t *hi, *lo;             // [Bp, Dp] operands
    float *P, *N;                  // [Bp, spans]
    double *top;                   // [Bp, spans]
    double *terms;                 // [Bp] of the loss
    uint16_t *w_hi, *w_lo;         // [Bp, Bp]
    float *w_scale, *along;        // [Bp, spans]
    int64_t bytes;
};

Small plan(int64_t B, int64_t D, bool split, void* memory) {
    Small s{};
    Carver carver{static_cast<char*>(memory)};
    s.B = B, s.D = D, s.Bp = ceil_div(B, COLUMNS) * COLUMNS, s.Dp = ceil_div(D, FEATURES) * FEATURES, s.spans = s.Bp / SPAN;
    carver.take(s.hi, s.Bp * s.Dp);
    if (split) carver.take(s.lo, s.Bp * s.Dp);
    for (float** p : {&s.P, &s.N, &s.w_scale, &s.along}) carver.take(*p, s.Bp * s.spans);
    carver.take(s.top, s.Bp * s.spans), carver.take(s.terms, s.Bp);
    carver.take(s.w_hi, s.Bp * s.Bp), carver.take(s.w_lo, s.Bp * s.Bp);
    s.bytes = carver.bytes;
    return s;
}

// Shared memory: the block's 96 rows as statistics, then either their operands or what the gradient needs.
struct Layout {
    Row* rows;                  // [96] 32 rows, then 64 columns
    float *base, *along;        // [32]
    uint16_t *hi, *lo;          // [96, Dp + 8]
    uint16_t *q_hi, *q_lo;      // [Bp, WIDE], over the operands
    uint16_t *w_hi, *w_lo;      // [32, Bp + 8]
    float* w_scale;             // [32, spans]
    int64_t bytes;
};

template <bool SPLIT>
__host__ __device__ inline Layout layout(const Small& s, char* memory) {
    constexpr int PARTS = SPLIT ? 2 : 1;
    Layout l{};
    l.rows = reinterpret_cast<Row*>(memory);
    l.base = reinterpret_cast<float*>(memory + sizeof(Row) * (ROWS + COLUMNS));
    l.along = l.base + ROWS;
    char* rest = reinterpret_cast<char*>(l.along + ROWS);
    const int64_t operands = (ROWS + COLUMNS) * (s.Dp + 8), q = s.Bp * WIDE, w = ROWS * (s.Bp + 8);
    l.hi = reinterpret_cast<uint16_t*>(rest), l.lo = l.hi + operands;
    l.q_hi = reinterpret_cast<uint16_t*>(rest), l.q_lo = l.q_hi + q;
    l.w_hi = l.q_hi + PARTS * q, l.w_lo = l.w_hi + w;
    l.w_scale = reinterpret_cast<float*>(l.w_lo + w);
    const int64_t gradient = 2 * (PARTS * q + 2 * w) + 4 * ROWS * s.spans;
    l.bytes = sizeof(Row) * (ROWS + COLUMNS) + 8 * ROWS + (gradient > 2 * PARTS * operands ? gradient : 2 * PARTS * operands);
    return l;
}
static_assert(sizeof(Row) * (ROWS + COLUMNS) % 16 == 0);

// Eight features as they lie in memory: zeros from `count` on.
template <bool SPLIT>
struct Eight {
    uint32_t word[SPLIT ? 8 : 4];

    __device__ __forceinline__ void read(const void* features, int64_t at, int64_t count, bool vectors) {
        constexpr int WORDS = SPLIT ? 8 : 4;
        if (vectors && count >= 8) {
            const auto* from = reinterpret_cast<const uint4*>(static_cast<const char*>(features) + at * (SPLIT ? 4 : 2));
#pragma unroll
            for (int k = 0; k < WORDS / 4; ++k) {
                const uint4 four = from[k];
                word[4 * k] = four.x, word[4 * k + 1] = four.y, word[4 * k + 2] = four.z, word[4 * k + 3] = four.w;
            }
            return;
        }
#pragma unroll
        for (int k = 0; k < WORDS; ++k) {
            if (SPLIT) {
                word[k] = k < count ? static_cast<const uint32_t*>(features)[at + k] : 0;
            } else {
                const auto* from = static_cast<const uint16_t*>(features) + at;
                word[k] = (2 * k < count ? from[2 * k] : 0) | static_cast<uint32_t>(2 * k + 1 < count ? from[2 * k + 1] : 0) << 16;
            }
        }
    }
    __device__ __forceinline__ float value(int k, DType dtype) const {
        if (SPLIT) return __uint_as_float(word[k]);
        const uint16_t bits = static_cast<uint16_t>(word[k / 2] >> (16 * (k % 2)));
        return dtype == DType::f16 ? half_value(bits) : bfloat_value(bits);
    }
};

// The three phases of one thread of one block; its members outlive the meetings of the grid.
template <bool SPLIT, int CHUNKS>  // CHUNKS of 256 features hold a row
struct Phases {
    static constexpr int THREADS = 256, WARPS = THREADS / 32, PARTS = SPLIT ? 2 : 1;
    static constexpr int FLIGHT = (SPLIT ? 4 : 8) / CHUNKS;  // rows that a warp reads at once
    static_assert((ROWS + COLUMNS) % (WARPS * FLIGHT) == 0 && WARPS == ROWS / 16 * (COLUMNS / SPAN));
    float acc[2][4], small[2][4];

    __device__ __forceinline__ void run(std::integral_constant<int, 0>, const Small& s) {
        const Layout l = layout<SPLIT>(s, dynamic_shared<char>());
        pack(s, l);
        __syncthreads();
        products(s, l);
        const Row rows[2] = {l.rows[row()], l.rows[row() + 8]};
        Sums sums(rows, s.negatives);
        sums.add(acc, small, rows, &l.rows[ROWS + column()], i0() + row(), j0() + column(), s.inv_t, s.negatives);
        sums.finish(s.inv_t);
        if (threadIdx.x % 4 == 0) {
            for (int r = 0; r < 2; ++r) {
                const int64_t at = (i0() + row() + 8 * r) * s.spans + span();
                s.P[at] = sums.P[r], s.N[at] = sums.N[r];
                if (s.negatives) s.top[at] = sums.top[r];
            }
        }
    }

    __device__ __forceinline__ void run(std::integral_constant<int, 1>, const Small& s) {
        const Layout l = layout<SPLIT>(s, dynamic_shared<char>());
        if (s.grad) fetch_q(s, l, blockIdx.x);
        whole_sums(s, l);
        if (!s.grad) return;
        __syncthreads();
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int64_t i = i0() + row() + 8 * r;
            uint32_t hi[2], lo[2];
            float scale;
            const float along = pair_weights(acc, small, l.rows[row() + 8 * r], &l.rows[ROWS + column()], r, i, j0() + column(), s.inv_t,
                                             hi, lo, scale);
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const int64_t at = i * s.Bp + j0() + column() + 8 * n + 2 * (threadIdx.x % 4);
                *reinterpret_cast<uint32_t*>(s.w_hi + at) = hi[n];
                *reinterpret_cast<uint32_t*>(s.w_lo + at) = lo[n];
            }
            if (threadIdx.x % 4 == 0) s.w_scale[i * s.spans + span()] = scale, s.along[i * s.spans + span()] = along;
        }
    }

    __device__ __forceinline__ void run(std::integral_constant<int, 2>, const Small& s) {
        const Layout l = layout<SPLIT>(s, dynamic_shared<char>());
        const int lane = threadIdx.x % 32;
        if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x < 32) {
            double total = 0;
            for (int64_t i = lane; i < s.B; i += 32) total += s.terms[i];
            total = warp_sum(total);
            if (lane == 0) *s.loss = static_cast<float>(total / s.B);
        }
        if (!s.grad || blockIdx.x >= s.Dp / FEATURES) return;
        for (int64_t k = threadIdx.x; k < 2 * ROWS * (s.Bp / 8); k += THREADS) {
            const int64_t r = k / 2 / (s.Bp / 8), c = k / 2 % (s.Bp / 8) * 8;
            copy_async((k % 2 ? l.w_lo : l.w_hi) + r * (s.Bp + 8) + c, (k % 2 ? s.w_lo : s.w_hi) + (i0() + r) * s.Bp + c);
        }
        for (int64_t k = threadIdx.x; k < ROWS * s.spans; k += THREADS) l.w_scale[k] = s.w_scale[i0() * s.spans + k];
        for (int r = threadIdx.x / 32; r < ROWS; r += WARPS) {
            float dot = 0;
            for (int64_t k = lane; k < s.spans; k += 32) dot += s.along[(i0() + r) * s.spans + k];
            dot = warp_sum(dot);
            if (lane == 0) l.along[r] = dot;
        }
        for (int64_t tile = blockIdx.x; tile < s.Dp / FEATURES; tile += gridDim.x) {
            if (tile != blockIdx.x) {
                __syncthreads();
                fetch_q(s, l, tile);
            }
            copies_done();
            __syncthreads();
            gradient(s, l, tile * FEATURES);
        }
    }

  private:
    static __device__ __forceinline__ int64_t i0() { return blockIdx.y * int64_t{ROWS}; }
    static __device__ __forceinline__ int64_t j0() { return blockIdx.x * int64_t{COLUMNS}; }
    // The warp's 16 x 16 part of a tile, and in it the lane's rows (row and row + 8) in mma layout.
    static __device__ __forceinline__ int row() { return threadIdx.x / 32 % 2 * 16 + threadIdx.x % 32 / 4; }
    static __device__ __forceinline__ int column() { return threadIdx.x / 64 * SPAN; }
    static __device__ __forceinline__ int64_t span() { return blockIdx.x * int64_t{COLUMNS / SPAN} + threadIdx.x / 64; }
    template <bool TRANSPOSED>
    static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint16_t* row) {
        ldmatrix<TRANSPOSED>(a[0], a[1], a[2], a[3], row);
    }
    template <bool TRANSPOSED>
    static __device__ __forceinline__ void fragment(uint32_t (&b)[2][2], const uint16_t* row) {
        ldmatrix<TRANSPOSED>(b[0][0], b[0][1], b[1][0], b[1][1], row);
    }
    // Where this lane's row of an ldmatrix starts: of a 16 x 16 block with k along the row (A; B with the n's as rows), and of one with the
    // k's as rows (B, transposed on the way).
    static __device__ __forceinline__ int a_at(int64_t stride) { return threadIdx.x % 16 * stride + threadIdx.x % 32 / 16 * 8; }
    static __device__ __forceinline__ int b_at(int64_t stride) {
        const int lane = threadIdx.x % 32;
        return (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8;
    }
    static __device__ __forceinline__ int b_transposed_at(int64_t stride) {
        const int lane = threadIdx.x % 32;
        return (lane / 8 % 2 * 8 + lane % 8) * stride + lane / 16 * 8;
    }

    // Statistics and operands of the block's rows, one warp per row, several rows in flight.
    __device__ __forceinline__ void pack(const Small& s, const Layout& l) {
        const int lane = threadIdx.x % 32;
        for (int first = threadIdx.x / 32; first < ROWS + COLUMNS; first += WARPS * FLIGHT) {
            Eight<SPLIT> raw[FLIGHT][CHUNKS];
#pragma unroll
            for (int f = 0; f < FLIGHT; ++f) {
                const int64_t i = global_row(first + WARPS * f);
#pragma unroll
                for (int c = 0; c < CHUNKS; ++c) {
                    const int64_t d = 256 * c + 8 * lane;
                    raw[f][c].read(s.features, i * s.stride + d, i < s.B ? s.D - d : 0, s.vectors);
                }
            }
#pragma unroll
            for (int f = 0; f < FLIGHT; ++f) {
                const int local = first + WARPS * f;
                const int64_t i = global_row(local);
                Norm norm;
#pragma unroll
                for (int c = 0; c < CHUNKS; ++c) {
#pragma unroll
                    for (int k = 0; k < 8; ++k) norm.add(raw[f][c].value(k, s.dtype));
                }
                norm.finish();
                const bool mine = local < ROWS && local % gridDim.x == blockIdx.x;  // the blocks of a row tile share its way to memory
#pragma unroll
                for (int c = 0; c < CHUNKS; ++c) {
                    const int64_t d = 256 * c + 8 * lane;
                    if (d >= s.Dp) continue;
                    uint32_t hi[4], lo[4];
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        uint16_t h[2], r[2] = {0, 0};
                        operand<SPLIT>(raw[f][c].value(2 * k, s.dtype) * norm.scale, h[0], r[0]);
                        operand<SPLIT>(raw[f][c].value(2 * k + 1, s.dtype) * norm.scale, h[1], r[1]);
                        hi[k] = h[0] | static_cast<uint32_t>(h[1]) << 16;
                        lo[k] = r[0] | static_cast<uint32_t>(r[1]) << 16;
                    }
                    for (int part = 0; part < PARTS; ++part) {
                        const uint32_t(&v)[4] = part ? lo : hi;
                        const uint4 four = make_uint4(v[0], v[1], v[2], v[3]);
                        *reinterpret_cast<uint4*>((part ? l.lo : l.hi) + local * (s.Dp + 8) + d) = four;
                        if (mine) *reinterpret_cast<uint4*>((part ? s.lo : s.hi) + i * s.Dp + d) = four;
                    }
                }
                if (lane == 0) {
                    l.rows[local] = i < s.B ? Row{s.labels[i], norm.inverse, 0, norm.own, 0, 0, true} : Row{0, 0, 0, 0, 0, 0, false};
                    if (local < ROWS) l.base[local] = norm.base;
                }
            }
        }
    }
    static __device__ __forceinline__ int64_t global_row(int local) { return local < ROWS ? i0() + local : j0() + local - ROWS; }

    __device__ __forceinline__ void products(const Small& s, const Layout& l) {
        const int64_t stride = s.Dp + 8, a_from = threadIdx.x / 32 % 2 * 16 * stride + a_at(stride);
        const int64_t b_from = (ROWS + column()) * stride + b_at(stride);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int c = 0; c < 4; ++c) acc[n][c] = small[n][c] = 0;
        }
#pragma unroll 4
        for (int64_t k = 0; k < s.Dp; k += 16) {
            uint32_t a[2][4], b[2][2][2];
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                fragment<false>(a[part], (part ? l.lo : l.hi) + a_from + k);
                fragment<false>(b[part], (part ? l.lo : l.hi) + b_from + k);
            }
            add_products<SPLIT>(acc, small, a, b);
        }
    }

    // The rows' sums over all spans, in order of the lanes, and their coefficients: every block for its own 96 rows.
    __device__ __forceinline__ void whole_sums(const Small& s, const Layout& l) {
        const int lane = threadIdx.x % 32;
        for (int local = threadIdx.x / 32; local < ROWS + COLUMNS; local += WARPS) {
            Row& row = l.rows[local];
            if (!row.real) continue;  // uniform over the warp
            const int64_t i = global_row(local), from = i * s.spans;
            double top = s.negatives ? -INFINITY : row.own;
            if (s.negatives) {
                for (int64_t k = lane; k < s.spans; k += 32) top = fmax(top, s.top[from + k]);
                for (int lanes = 16; lanes > 0; lanes /= 2) top = fmax(top, __shfl_xor_sync(0xffffffffu, top, lanes));
            }
            float P = 0, N = 0;
            for (int64_t k = lane; k < s.spans; k += 32) {
                P += s.P[from + k];
                N += s.N[from + k] * (s.negatives && s.top[from + k] < top ? exp_of(s.top[from + k] - top, s.inv_t) : 1.f);
            }
            P = warp_sum(P), N = warp_sum(N);
            float same, other;
            double shift;
            const double term = coefficients(P, N, top, row.own, s.inv_t, s.negatives, same, other, shift);
            if (lane == 0) {
                row.same = same, row.other = other, row.shift = shift;
                if (local < ROWS && blockIdx.x == 0) s.terms[i] = term;
            }
        }
    }

    // Operands of all rows, FEATURES of them: on their way while the weights are made.
    __device__ __forceinline__ void fetch_q(const Small& s, const Layout& l, int64_t tile) {
        if (tile * FEATURES >= s.Dp) return;
        for (int64_t k = threadIdx.x; k < PARTS * s.Bp * (FEATURES / 8); k += THREADS) {
            const int64_t part = k / (s.Bp * (FEATURES / 8)), j = k / (FEATURES / 8) % s.Bp, d = k % (FEATURES / 8) * 8;
            copy_async((part ? l.q_lo : l.q_hi) + j * WIDE + d, (part ? s.lo : s.hi) + j * s.Dp + tile * FEATURES + d);
        }
    }

    __device__ __forceinline__ void gradient(const Small& s, const Layout& l, int64_t d0) {
        const int64_t stride = s.Bp + 8, a_from = threadIdx.x / 32 % 2 * 16 * stride + a_at(stride);
        const int b_from = column() + b_transposed_at(WIDE);
        float G[2][4] = {};
#pragma unroll 4
        for (int64_t k = 0; k < s.Bp; k += 16) {
            uint32_t a[2][4], b[PARTS][2][2];
            fragment<false>(a[0], l.w_hi + a_from + k);
            fragment<false>(a[1], l.w_lo + a_from + k);
#pragma unroll
            for (int part = 0; part < PARTS; ++part) fragment<true>(b[part], (part ? l.q_lo : l.q_hi) + b_from + k * WIDE);
            float sum[2][4] = {};
            mma_row(sum, a[1], b[0]);
            if (SPLIT) mma_row(sum, a[0], b[PARTS - 1]);
            mma_row(sum, a[0], b[0]);
            const float scale[2] = {l.w_scale[row() * s.spans + k / 16], l.w_scale[(row() + 8) * s.spans + k / 16]};
#pragma unroll
            for (int n = 0; n < 2; ++n) {
#pragma unroll
                for (int c = 0; c < 4; ++c) G[n][c] += sum[n][c] * scale[c / 2];
            }
        }
        const float factor = static_cast<float>(s.inv_t / s.B);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int local = row() + 8 * r;
            const int64_t i = i0() + local;
            if (i >= s.B) continue;
            const float inverse = static_cast<float>(l.rows[local].inverse), along = l.along[local] * factor, base = l.base[local];
#pragma unroll
            for (int n = 0; n < 2; ++n) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int d = column() + 8 * n + 2 * (threadIdx.x % 4) + c;
                    float z = half_value(l.q_hi[i * WIDE + d]);
                    if (SPLIT) z += half_value(l.q_lo[i * WIDE + d]);
                    if (d0 + d < s.D) s.grad[i * s.D + d0 + d] = (G[n][2 * r + c] * factor - along * (z * inverse)) / base;
                }
            }
        }
    }
};

template <bool SPLIT, int CHUNKS>
void launch_small(const Small& s, void* stream) {
    const int shared = static_cast<int>(layout<SPLIT>(s, nullptr).bytes);
    launch_cooperative<Phases<SPLIT, CHUNKS>>("nt_xent_small", s.Bp / COLUMNS, s.Bp / ROWS, shared, stream, s);
}

}  // namespace

bool nt_xent_small_takes(int64_t B, int64_t D, DType dtype) {
    const bool split = dtype == DType::f32;
    if (B < 1 || B > MAX_B || D < 1 || D > max_width(split)) return false;
    const Small s = plan(B, D, split, nullptr);
    const int64_t shared = split ? layout<true>(s, nullptr).bytes : layout<false>(s, nullptr).bytes;
    return cooperative_fits(s.Bp / COLUMNS * (s.Bp / ROWS), shared);
}

int64_t nt_xent_small_workspace(int64_t B, int64_t D, DType dtype) {
    return B <= MAX_B && D <= max_width(dtype == DType::f32) ? plan(B, D, dtype == DType::f32, nullptr).bytes : 0;
}

void nt_xent_small(const NtXentArgs& a, void* stream) {
    const bool split = a.dtype == DType::f32;
    Small s = plan(a.B, a.D, split, a.workspace);
    s.features = a.features, s.dtype = a.dtype, s.stride = a.row_stride, s.labels = a.labels;
    s.loss = static_cast<float*>(a.loss), s.grad = static_cast<float*>(a.grad), s.inv_t = 1 / a.temperature, s.negatives = a.negatives;
    s.vectors = aligned(a.features) && a.row_stride % (split ? 4 : 8) == 0;
    if (split) return launch_small<true, 2>(s, stream);
    s.Dp <= 512 ? launch_small<false, 2>(s, stream) : launch_small<false, 4>(s, stream);
}

}  // namespace miue
