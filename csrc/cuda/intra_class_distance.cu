// Within-class distance: value and gradient (formulas:
// miue_fast/reference/intra_class_distance.py). One block per row walks the labels and meets the
// members of its class in index order; differences are direct, in fp32.
#include "device.cuh"

// Members gathered before their contributions are added. The CPU tests lower it, so that few rows
// reach every branch.
#ifndef MIUE_MEMBERS
#define MIUE_MEMBERS 128
#endif

namespace miue {
namespace {

constexpr unsigned ALL = 0xffffffffu;
constexpr int CAPACITY = MIUE_MEMBERS + THREADS;

struct Features {
    const void* data;
    DType dtype;
    int64_t stride, B, D;
    const int64_t* labels;
};

__device__ __forceinline__ float difference(const Features& f, int64_t i, int64_t j, int64_t d) {
    return load(f.data, f.dtype, i * f.stride + d) - load(f.data, f.dtype, j * f.stride + d);
}

// ||f_i - f_j|| where the plain sum of squares may have lost something to overflow or underflow:
// once more, times a power of two.
__device__ __forceinline__ float rescaled(const Features& f, int64_t i, int64_t j, float plain) {
    float largest = 0, squares = 0;
    for (int64_t d = threadIdx.x % 32; d < f.D; d += 32)
        largest = fmaxf(largest, fabsf(difference(f, i, j, d)));
    largest = warp_max(largest);
    if (largest == 0 || plain != plain || !(largest <= FLOAT_MAX)) return sqrtf(plain);
    const int exponent = max(-126, min(126, ilogbf(largest)));
    const float scale = ldexpf(1.f, -exponent);
    for (int64_t d = threadIdx.x % 32; d < f.D; d += 32) {
        const float scaled = difference(f, i, j, d) * scale;
        squares += scaled * scaled;
    }
    return ldexpf(sqrtf(warp_sum(squares)), exponent);
}

// ||f_i - f_j|| in every lane of the warp.
__device__ __forceinline__ float distance(const Features& f, int64_t i, int64_t j) {
    float squares = 0;
    for (int64_t d = threadIdx.x % 32; d < f.D; d += 32) {
        const float x = difference(f, i, j, d);
        squares += x * x;
    }
    squares = warp_sum(squares);
    const bool sure = (squares >= 0x1p-100f && squares <= FLOAT_MAX) || (i == j && squares == 0);
    return sure ? sqrtf(squares) : rescaled(f, i, j, squares);
}

// The warp's 32 rows from j0 that are of row i's class, as a bit mask.
__device__ __forceinline__ unsigned members_of(const Features& f, int64_t label, int64_t j0) {
    const int64_t j = j0 + threadIdx.x % 32;
    return __ballot_sync(ALL, j < f.B && f.labels[j] == label);
}

__global__ void sum_distances(Features f, float scale, float* sums) {
    const int64_t i = blockIdx.x, label = f.labels[i];
    double total = 0;
    for (int64_t j0 = threadIdx.x / 32 * 32; j0 < f.B; j0 += THREADS) {
        for (unsigned members = members_of(f, label, j0); members; members &= members - 1) {
            total += distance(f, i, j0 + __ffs(members) - 1);
        }
    }
    total = block_sum(threadIdx.x % 32 ? 0 : total);
    if (threadIdx.x == 0) sums[i] = static_cast<float>(scale * total);
}

__global__ void finish_loss(const float* sums, int64_t B, double weight, const float* addend,
                            float* loss) {
    double total = 0;
    for (int64_t i = threadIdx.x; i < B; i += THREADS) total += log1pf(sums[i]);
    total = block_sum(total);
    if (threadIdx.x == 0)
        *loss =
            static_cast<float>((addend ? static_cast<double>(*addend) : 0) + weight * (total / B));
}

// `partial` [B, D] holds a row's sum while there are labels left to look at.
__global__ void distance_gradient(Features f, float scale, const float* sums, float* partial,
                                  float weight, const float* addend, float* grad) {
    __shared__ int64_t member[CAPACITY];
    __shared__ float pull[CAPACITY];
    __shared__ int found[WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t i = blockIdx.x, label = f.labels[i];
    // own: a quotient by it alone may be too small
    const float own = 1 + sums[i], share = scale * static_cast<float>(1.0 / f.B);
    int count = 0;
    bool first = true;
    for (int64_t window = 0; window < f.B; window += THREADS) {
        const int64_t j0 = window + 32 * warp;
        unsigned members = members_of(f, label, j0);
        if (lane == 0) found[warp] = __popc(members);
        __syncthreads();
        int slot = count;
        for (int k = 0; k < warp; ++k) slot += found[k];
        for (int k = 0; k < WARPS; ++k) count += found[k];
        for (; members; members &= members - 1, ++slot) {
            const int64_t j = j0 + __ffs(members) - 1;
            const float d = distance(f, i, j);
            if (lane == 0) {
                member[slot] = j;
                pull[slot] = d < FLOAT_LEAST ? 0.f : (1 + own / (1 + sums[j])) / d;
            }
        }
        __syncthreads();
        const bool last = window + THREADS >= f.B;
        if (!last && count <= MIUE_MEMBERS) continue;
        for (int64_t d = threadIdx.x; d < f.D; d += THREADS) {
            const float mine = load(f.data, f.dtype, i * f.stride + d);
            float sum = first ? 0.f : partial[i * f.D + d];
            for (int k = 0; k < count; ++k)
                sum += pull[k] * (mine - load(f.data, f.dtype, member[k] * f.stride + d));
            if (last) {
                grad[i * f.D + d] =
                    (addend ? addend[i * f.D + d] : 0.f) + weight * (sum * share / own);
            } else {
                partial[i * f.D + d] = sum;
            }
        }
        __syncthreads();
        count = 0, first = false;
    }
}

int64_t sums_bytes(int64_t B) { return ceil_div(B * sizeof(float), 64) * 64; }

}  // namespace

int64_t intra_class_distance_workspace_cuda(int64_t B, int64_t D, DType, bool want_grad) {
    return sums_bytes(B) + (want_grad && B > THREADS ? B * D * sizeof(float) : 0);
}

void intra_class_distance_cuda(const IntraClassDistanceArgs& a, void* stream) {
    require_dtype("intra_class_distance", "features", a.dtype, is_feature(a.dtype));
    const Features f{a.features, a.dtype, a.row_stride, a.B, a.D, a.labels};
    const float scale = a.normalize_dim && a.D ? static_cast<float>(1.0 / a.D) : 1.f;
    float* sums = static_cast<float*>(a.workspace);
    float* partial =
        reinterpret_cast<float*>(reinterpret_cast<uintptr_t>(a.workspace) + sums_bytes(a.B));
    launch("sum_distances", sum_distances, a.B, 1, stream, f, scale, sums);
    launch("finish_loss", finish_loss, 1, 1, stream, sums, a.B, a.weight,
           static_cast<const float*>(a.addend_loss), static_cast<float*>(a.loss));
    if (!a.grad || a.D == 0) return;
    launch("distance_gradient", distance_gradient, a.B, 1, stream, f, scale, sums, partial,
           static_cast<float>(a.weight), static_cast<const float*>(a.addend_grad),
           static_cast<float*>(a.grad));
}

}  // namespace miue
