// What follows a convolution and its input gradient. fp32 without contraction (-fmad=false),
// rounded once: bitwise the reference. Each thread has eight neighbours and their byte of the mask.
#include <algorithm>

#include "device.cuh"

namespace miue {
namespace {

template <bool WIDE>
__device__ __forceinline__ void load_eight(const void* p, DType t, int64_t at, int64_t count,
                                           float (&v)[8]) {
    if (WIDE && at + 8 <= count) {
        load(p, t, at, v);
    } else {
#pragma unroll
        for (int k = 0; k < 8; ++k) v[k] = at + k < count ? load(p, t, at + k) : 0.f;
    }
}

template <bool WIDE>
__device__ __forceinline__ void store_eight(void* p, DType t, int64_t at, int64_t count,
                                            const float (&v)[8]) {
    if (WIDE && at + 8 <= count) {
        store(p, t, at, v);
    } else {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            if (at + k < count) store(p, t, at + k, v[k]);
        }
    }
}

__device__ __forceinline__ float rounded(float x, DType t) {
    return t == DType::f16    ? half_value(half_bits(x))
           : t == DType::bf16 ? bfloat_value(bfloat_bits(x))
                              : x;
}

struct Epilogue {
    void* y;
    DType dtype;
    const float* bias;
    bool bias_in_eights;
    const void* residual;
    bool relu;
    uint8_t* mask;
    int64_t channels, count;
};

template <bool WIDE>
__global__ void epilogue(Epilogue a) {
    // the last word is whole
    const int64_t stride = int64_t{gridDim.x} * THREADS * 8, end = (a.count + 63) / 64 * 64;
    int64_t at = (int64_t{blockIdx.x} * THREADS + threadIdx.x) * 8, channel = at % a.channels;
    for (const int64_t step = stride % a.channels; at < end; at += stride) {
        float v[8], w[8];
        load_eight<WIDE>(a.y, a.dtype, at, a.count, v);
        if (a.bias) {
            if (a.bias_in_eights) {
                load(a.bias, DType::f32, channel, w);
            } else {
                int64_t c = channel;
#pragma unroll
                for (int k = 0; k < 8; ++k) {
                    w[k] = a.bias[c];
                    if (++c == a.channels) c = 0;
                }
            }
#pragma unroll
            for (int k = 0; k < 8; ++k) v[k] += w[k];
        }
        if (a.residual) {
            load_eight<WIDE>(a.residual, a.dtype, at, a.count, w);
#pragma unroll
            for (int k = 0; k < 8; ++k) v[k] += w[k];
        }
        uint32_t bits = 0;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            v[k] = rounded(v[k], a.dtype);
            const bool positive = !(v[k] <= 0.f);
            if (a.relu && !positive) v[k] = 0.f;
            bits |= static_cast<uint32_t>(positive && at + k < a.count) << k;
        }
        store_eight<WIDE>(a.y, a.dtype, at, a.count, v);
        if (a.mask) a.mask[at / 8] = static_cast<uint8_t>(bits);
        channel += step;
        if (channel >= a.channels) channel -= a.channels;
    }
}

template <bool WIDE>
__global__ void grad_epilogue(void* grad, DType dtype, const void* addend, const uint8_t* mask,
                              int64_t count) {
    const int64_t stride = int64_t{gridDim.x} * THREADS * 8;
    for (int64_t at = (int64_t{blockIdx.x} * THREADS + threadIdx.x) * 8; at < count; at += stride) {
        float v[8], w[8];
        load_eight<WIDE>(grad, dtype, at, count, v);
        if (addend) {
            load_eight<WIDE>(addend, dtype, at, count, w);
#pragma unroll
            for (int k = 0; k < 8; ++k) v[k] += w[k];
        }
        const uint32_t bits = mask ? mask[at / 8] : 255;
#pragma unroll
        for (int k = 0; k < 8; ++k) v[k] = bits >> k & 1 ? v[k] : 0.f;
        store_eight<WIDE>(grad, dtype, at, count, v);
    }
}

int64_t blocks(int64_t count) { return std::min(ceil_div(count, THREADS * 8), BLOCKS); }

}  // namespace

void conv_epilogue_cuda(const ConvEpilogueArgs& a, void* stream) {
    require_dtype("conv_epilogue_", "y", a.dtype, is_feature(a.dtype));
    const Epilogue e{a.y,
                     a.dtype,
                     static_cast<const float*>(a.bias),
                     a.channels % 8 == 0 && aligned(a.bias),
                     a.residual,
                     a.relu,
                     a.mask,
                     a.channels,
                     a.count};
    launch("epilogue", aligned(a.y) && aligned(a.residual) ? epilogue<true> : epilogue<false>,
           blocks(a.count), 1, stream, e);
}

void conv_grad_epilogue_cuda(const ConvGradEpilogueArgs& a, void* stream) {
    require_dtype("conv_grad_epilogue_", "grad", a.dtype, is_feature(a.dtype));
    if (!a.addend && !a.mask) return;
    launch("grad_epilogue",
           aligned(a.grad) && aligned(a.addend) ? grad_epilogue<true> : grad_epilogue<false>,
           blocks(a.count), 1, stream, a.grad, a.dtype, a.addend, a.mask, a.count);
}

}  // namespace miue
