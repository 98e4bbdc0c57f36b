// What the NT-Xent kernels share: those of nt_xent.cu, for every GPU, dtype and size, and those of
// hopper/nt_xent_large.cu.
//
// Tensor cores take fp16 and truncate their sums, so a row is scaled by a power of two into fp16's
// range. Half-precision features are then exact. fp32 features are split into hi, whole numbers up
// to 2^11, and lo, the rest (SPLIT): hi*hi is a sum of whole numbers, exact on a tensor core (below
// 2^24: each k-step is summed from zero and added in fp32); the three products with lo are 2^-10 of
// it and their truncation does not matter. Together: fp32 accuracy or better.
#pragma once
#include "mma.cuh"

namespace miue {

#ifdef MIUE_HOPPER
// hopper/nt_xent_large.cu: whether it takes this shape on the current device, the bytes it needs if
// it does, and the op itself.
bool nt_xent_large_takes(int64_t B, int64_t D, DType);
int64_t nt_xent_large_workspace(int64_t B, int64_t D, DType, bool want_grad);
void nt_xent_large(const NtXentArgs&, void* stream);
#endif

constexpr float MIN_NORM = 1e-8f;
// operands are scaled to magnitudes below 2^11: whole numbers up to there are fp16
constexpr int TOP_BIT = 10;

// A row's features, as far as one warp has read them, and then what follows from all of them.
struct Norm {
    double squares = 0;
    // poison: NaN if the row has an infinite or NaN feature or such a norm, else 0
    float largest = 0, poison = 0;
    float base, scale, own;  // clamped norm, power of two of the operand, ||z||
    double inverse;          // 1 / (norm * scale)

    __device__ __forceinline__ void add(float x) {
        squares += static_cast<double>(x) * x;
        largest = fmaxf(largest, fabsf(x));
        poison += x * 0.f;
    }
    __device__ __forceinline__ void finish() {
        largest = warp_max(largest);
        const double norm = sqrt(warp_sum(squares));
        poison = warp_sum(poison);
        const double clamped = norm < MIN_NORM ? MIN_NORM : norm;
        base = static_cast<float>(clamped);
        const bool finite = base <= FLOAT_MAX;
        scale = finite ? ldexpf(1.f, TOP_BIT - ilogbf(fmaxf(largest, MIN_NORM))) : 0.f;
        inverse = finite ? 1 / (clamped * scale) : 1.0;
        if (!finite) poison = NAN;  // also where all features are numbers and their norm is none
        own = !finite ? poison : norm < MIN_NORM ? static_cast<float>(norm / MIN_NORM) : 1.f;
    }
};

// x is scaled; lo is the rest of an fp32 feature.
template <bool SPLIT>
__device__ __forceinline__ void operand(float x, uint16_t& hi, uint16_t& lo) {
    const float whole = SPLIT ? rintf(x) : x;
    hi = half_bits(whole);
    if (SPLIT) lo = half_bits(x - whole);
}

struct Row {
    int64_t label;
    double inverse, shift;
    float own, same, other;
    bool real;  // false on padding
};

// One k-step of 16: acc and small += products of hi and lo parts (part 0, part 1).
template <bool SPLIT, int N>
__device__ __forceinline__ void add_products(float (&acc)[N][4], float (&small)[N][4],
                                             const uint32_t (&a)[2][4],
                                             const uint32_t (&b)[2][N][2]) {
    float whole[N][4] = {};
    mma_row(whole, a[0], b[0]);
    if (SPLIT) {
        mma_row(small, a[0], b[1]);
        mma_row(small, a[1], b[0]);
        mma_row(small, a[1], b[1]);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) acc[n][c] += whole[n][c];
    }
}

// Small temperatures magnify the last bits of a cosine, hence double. The diagonal is known:
// ||z||^2.
__device__ __forceinline__ double cosine(float whole, float small, const Row& a, const Row& b,
                                         bool self) {
    return self ? static_cast<double>(a.own) * a.own
                : (static_cast<double>(whole) + small) * a.inverse * b.inverse;
}

__device__ __forceinline__ float exp_of(double difference, double inv_t) {
    return expf(static_cast<float>(difference * inv_t));
}

// P, N and N's shift of the two rows that a lane has in mma layout (i and i + 8): sums over the
// columns that its quad has seen.
struct Sums {
    float P[2] = {0, 0}, N[2] = {0, 0};
    double top[2];

    __device__ __forceinline__ Sums(const Row (&rows)[2], bool negatives) {
        for (int r = 0; r < 2; ++r) top[r] = negatives ? -INFINITY : rows[r].own;
    }
    // `columns` are those of the N tiles, from column j on.
    template <int TILES>
    __device__ __forceinline__ void add(const float (&acc)[TILES][4],
                                        const float (&small)[TILES][4], const Row (&rows)[2],
                                        const Row* columns, int64_t i, int64_t j, double inv_t,
                                        bool negatives) {
        const int t = threadIdx.x % 4;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            double best = top[r];
            if (negatives) {
#pragma unroll
                for (int n = 0; n < TILES; ++n) {
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        const int k = 8 * n + 2 * t + c;
                        const bool other = columns[k].real && columns[k].label != rows[r].label;
                        const double s = cosine(acc[n][2 * r + c], small[n][2 * r + c], rows[r],
                                                columns[k], i + 8 * r == j + k);
                        if (other) best = fmax(best, s);
                    }
                }
                if (best > top[r]) {
                    N[r] *= exp_of(top[r] - best, inv_t);
                    top[r] = best;
                }
            }
#pragma unroll
            for (int n = 0; n < TILES; ++n) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int k = 8 * n + 2 * t + c;
                    const bool same = columns[k].label == rows[r].label;
                    const double s = cosine(acc[n][2 * r + c], small[n][2 * r + c], rows[r],
                                            columns[k], i + 8 * r == j + k);
                    const float e = exp_of(s - (same ? rows[r].own : top[r]), inv_t);
                    if (columns[k].real && same) P[r] += e;
                    if (columns[k].real && !same) N[r] += e;
                }
            }
        }
    }
    // Over the four lanes of a row; all of them get it.
    __device__ __forceinline__ void finish(double inv_t) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            double best = top[r];
            best = fmax(best, __shfl_xor_sync(0xffffffffu, best, 1));
            best = fmax(best, __shfl_xor_sync(0xffffffffu, best, 2));
            if (best > top[r]) N[r] *= exp_of(top[r] - best, inv_t);
            top[r] = best;
#pragma unroll
            for (int lanes = 1; lanes < 4; lanes *= 2) {
                P[r] += __shfl_xor_sync(0xffffffffu, P[r], lanes);
                N[r] += __shfl_xor_sync(0xffffffffu, N[r], lanes);
            }
        }
    }
};

// The row's coefficients from its whole sums, and its term of the loss.
__device__ __forceinline__ double coefficients(float P, float N, double top, float own,
                                               double inv_t, bool negatives, float& same,
                                               float& other, double& shift) {
    if (negatives) {
        same = -1 / P, other = 1 / N, shift = top;
        return static_cast<double>(logf(N)) - logf(P) + (top - own) * inv_t;
    }
    same = -N / (P * (P + N)), other = 1 / (P + N), shift = own;
    return log1pf(N / P);
}

// Turns row r's sums of products into its weights W_ij of z_j, and those into W_ij times the
// column's inverse, which weighs q_j, as hi and lo fp16 with a power of two for the row: `scale` is
// what they are to be multiplied with. Returns sum_j W_ij s_ij, over the quad's columns.
template <int TILES>
__device__ __forceinline__ float pair_weights(const float (&acc)[TILES][4],
                                              const float (&small)[TILES][4], const Row& row,
                                              const Row* columns, int r, int64_t i, int64_t j,
                                              double inv_t, uint32_t (&hi)[TILES],
                                              uint32_t (&lo)[TILES], float& scale) {
    const int t = threadIdx.x % 4;
    float w[TILES][2], largest = 0, along = 0;
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const Row& column = columns[8 * n + 2 * t + c];
            const bool self = i == j + 8 * n + 2 * t + c, same = row.label == column.label;
            const double s = cosine(acc[n][2 * r + c], small[n][2 * r + c], row, column, self);
            const double mine = same ? row.own : row.shift,
                         theirs = same ? column.own : column.shift;
            const float e = exp_of(s - mine, inv_t),
                        f = mine == theirs ? e : exp_of(s - theirs, inv_t);
            float x = (same ? row.same : row.other) * e + (same ? column.same : column.other) * f;
            // A multiple of a unit z_i is removed by the projection: leaving it out saves its
            // rounding.
            if (!row.real || !column.real || (self && row.own == 1.f)) x = 0;
            along += x * static_cast<float>(s);
            w[n][c] = x * static_cast<float>(column.inverse);
            largest = fmaxf(largest, fabsf(w[n][c]));
        }
    }
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
        along += __shfl_xor_sync(0xffffffffu, along, lanes);
    }
    const int up = largest > 0 && largest <= FLOAT_MAX ? min(13 - ilogbf(largest), 120) : 0;
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
        hi[n] = lo[n] = 0;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const float x = ldexpf(w[n][c], up);
            const uint16_t bits = half_bits(x);
            hi[n] |= static_cast<uint32_t>(bits) << (16 * c);
            lo[n] |= static_cast<uint32_t>(half_bits(x - half_value(bits))) << (16 * c);
        }
    }
    scale = ldexpf(1.f, -up);
    return along;
}

}  // namespace miue
