// Gather, mirror, add, normalise, lay out: one pass. fp32 without contraction (-fmad=false),
// rounded once: bitwise the reference.
#include "pixels.cuh"

namespace miue {
namespace {

constexpr int CHANNELS = 16;

struct Normal {
    float mean[CHANNELS], inv_std[CHANNELS];
    bool on;
};

struct Input {
    void* out;
    DType out_dtype;
    bool channels_last;
    const void* images;
    DType image_dtype;
    const void* delta;
    DType delta_dtype;
    float level;  // int8 delta: value = q * level
};

template <int V>
__global__ void build_input(Tiles t, Input a, Normal normal) {
    __shared__ float stage[STAGE];
    const bool staged = a.channels_last && t.pixels * t.C <= STAGE;
    for (int64_t tile = blockIdx.x; tile < t.B * t.per_image; tile += gridDim.x) {
        const int64_t b = tile / t.per_image, first = tile % t.per_image * t.pixels;
        const int64_t count = t.plane - first < t.pixels ? t.plane - first : t.pixels;
        const int64_t row = t.index ? t.index[b] : b, groups = (count + V - 1) / V;
        const bool known = row >= 0 && row < t.N, mirror = t.flip && t.flip[b];
        for (int64_t unit = threadIdx.x; unit < groups * t.C; unit += THREADS) {
            const int64_t c = unit / groups, offset = unit % groups * V, pixel = first + offset,
                          plane = (row * t.C + c) * t.plane;
            int64_t from = pixel;
            if constexpr (V == 1)  // a view moves single pixels
                if (t.view) from = seen_pixel(t.view, b, false, pixel / t.W, pixel % t.W, t.H, t.W);
            float x[V];
#pragma unroll
            for (int k = 0; k < V; ++k) x[k] = known ? 0.f : NAN;  // a row that does not exist
            if (known && from >= 0) {
                load_image(a.images, a.image_dtype, plane, from, t.W, mirror, x);
                if (a.delta) {
                    float d[V];
                    load(a.delta, a.delta_dtype, plane + from, d);
#pragma unroll
                    for (int k = 0; k < V; ++k)
                        x[k] += a.delta_dtype == DType::i8 ? d[k] * a.level : d[k];
                }
            }
            if (normal.on) {
#pragma unroll
                for (int k = 0; k < V; ++k) x[k] = (x[k] - normal.mean[c]) * normal.inv_std[c];
            }
            if (staged) {
#pragma unroll
                for (int k = 0; k < V; ++k) stage[(offset + k) * t.C + c] = x[k];
            } else if (a.channels_last) {
#pragma unroll
                for (int k = 0; k < V; ++k)
                    store(a.out, a.out_dtype, (b * t.plane + pixel + k) * t.C + c, x[k]);
            } else {
                store(a.out, a.out_dtype, (b * t.C + c) * t.plane + pixel, x);
            }
        }
        if (staged) {
            __syncthreads();
            for (int64_t at = threadIdx.x * V; at < count * t.C; at += THREADS * V) {
                float x[V];
#pragma unroll
                for (int k = 0; k < V; ++k) x[k] = stage[at + k];
                store(a.out, a.out_dtype, (b * t.plane + first) * t.C + at, x);
            }
            __syncthreads();
        }
    }
}

}  // namespace

void perturbed_input_cuda(const PerturbedInputArgs& a, void* stream) {
    const char* op = "perturbed_input";
    require_dtype(op, "dtype", a.out_dtype, is_feature(a.out_dtype));
    require_dtype(op, "images", a.image_dtype,
                  a.image_dtype == DType::u8 || a.image_dtype == DType::f32);
    require_dtype(op, "delta", a.delta_dtype,
                  !a.delta || a.delta_dtype == DType::f32 || a.delta_dtype == DType::f16 ||
                      a.delta_dtype == DType::i8);
    require(!a.mean || a.C <= CHANNELS, op, "mean and std", "at most 16 channels on a GPU",
            std::to_string(a.C));
    Normal normal{};
    normal.on = a.mean && a.inv_std;
    for (int64_t c = 0; normal.on && c < a.C; ++c)
        normal.mean[c] = a.mean[c], normal.inv_std[c] = a.inv_std[c];
    const Tiles t = tiles_of(a.B, a.C, a.H, a.W, a.N, a.index, a.flip, a.view);
    const Input input{a.out,         a.out_dtype, a.channels_last, a.images,
                      a.image_dtype, a.delta,     a.delta_dtype,   static_cast<float>(a.eps / 127)};
    const bool eights = !a.view && in_eights(t, {a.out, a.images, a.delta});
    const int64_t tiles = a.C ? a.B * t.per_image : 0;
    launch("build_input", eights ? build_input<8> : build_input<1>, std::min(tiles, BLOCKS), 1,
           stream, t, input, normal);
}

}  // namespace miue
