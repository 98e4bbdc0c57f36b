// The projected sign step, functional and in place. fp32 without contraction (-fmad=false), rounded
// once: bitwise the reference.
#include "pixels.cuh"

namespace miue {
namespace {

__device__ __forceinline__ float step(float delta, float grad, float image, float alpha,
                                      float eps) {
    const float sign = grad > 0 ? 1.f : grad < 0 ? -1.f : 0.f;  // NaN: 0
    const float moved = clamp(delta - alpha * sign, -eps, eps);
    // the budget, whatever the image and the sum's rounding
    return clamp(clamp(image + moved, 0.f, 1.f) - image, 0.f - eps, eps);
}

template <int V>
__global__ void step_all(void* out, const void* delta, const void* grad, const void* image,
                         DType dtype, int64_t n, float alpha, float eps) {
    const int64_t stride = int64_t{gridDim.x} * THREADS * V;
    for (int64_t at = (int64_t{blockIdx.x} * THREADS + threadIdx.x) * V; at < n; at += stride) {
        if (at + V <= n) {
            float d[V], g[V], x[V];
            load(delta, dtype, at, d);
            load(grad, dtype, at, g);
            load(image, dtype, at, x);
#pragma unroll
            for (int k = 0; k < V; ++k) d[k] = step(d[k], g[k], x[k], alpha, eps);
            store(out, dtype, at, d);
        } else {
            for (int64_t k = at; k < n; ++k) {
                store(out, dtype, k,
                      step(load(delta, dtype, k), load(grad, dtype, k), load(image, dtype, k),
                           alpha, eps));
            }
        }
    }
}

enum class Layout { strided, rows, pixels };  // pixels: channels-last

struct Gradient {
    const void* data;
    DType dtype;
    int64_t s[4];
    Layout layout;
    int64_t grid;
};

// The gradient of the pixel at (row, column) of the store, where the view of batch row b has it.
__device__ __forceinline__ float moved_back(const Tiles& t, const Gradient& g, int64_t b, int64_t c,
                                            int64_t row, int64_t column) {
    const int64_t at = seen_pixel(t.view, b, true, row, column, t.H, t.W);
    return at < 0 ? 0.f
                  : load(g.data, g.dtype,
                         b * g.s[0] + c * g.s[1] + at / t.W * g.s[2] + at % t.W * g.s[3]);
}

// The sum over the cell of that pixel: down each column of the cell, then over the columns.
__device__ __forceinline__ float cell_sum(const Tiles& t, const Gradient& g, int64_t b, int64_t c,
                                          int64_t row, int64_t column) {
    const int64_t top = row - row % g.grid, left = column - column % g.grid;
    float sum = 0;
    for (int64_t x = left; x < left + g.grid && x < t.W; ++x) {
        float down = 0;
        for (int64_t y = top; y < top + g.grid && y < t.H; ++y)
            down += moved_back(t, g, b, c, y, x);
        sum += down;
    }
    return sum;
}

struct Store {
    void* delta;
    DType dtype;
    const void* images;
    DType image_dtype;
    float alpha, eps, level, levels;  // int8: value = q * level, q = rint(value * levels)
    unsigned long long* nonfinite;
};

// MOVED: the gradient comes through a view or is summed over cells; V is 1 and the layout strided.
template <int V, bool MOVED>
__global__ void step_rows(Tiles t, Gradient g, Store s) {
    __shared__ float stage[STAGE];
    int bad = 0;
    for (int64_t tile = blockIdx.x; tile < t.B * t.per_image; tile += gridDim.x) {
        const int64_t b = tile / t.per_image, first = tile % t.per_image * t.pixels;
        const int64_t count = t.plane - first < t.pixels ? t.plane - first : t.pixels;
        const int64_t row = t.index ? t.index[b] : b;
        if (row < 0 || row >= t.N) continue;
        const bool mirror = t.flip && t.flip[b];
        if (g.layout == Layout::pixels) {
            __syncthreads();
            for (int64_t at = threadIdx.x * V; at < count * t.C; at += THREADS * V) {
                float v[V];
                load(g.data, g.dtype, b * g.s[0] + first * t.C + at, v);
#pragma unroll
                for (int k = 0; k < V; ++k) stage[at + k] = v[k];
            }
            __syncthreads();
        }
        const int64_t groups = (count + V - 1) / V;
        for (int64_t unit = threadIdx.x; unit < groups * t.C; unit += THREADS) {
            const int64_t c = unit / groups, offset = unit % groups * V, pixel = first + offset,
                          plane = (row * t.C + c) * t.plane;
            float v[V], d[V], x[V];
            if constexpr (MOVED) {
                v[0] = moved_back(t, g, b, c, pixel / t.W, pixel % t.W);
            } else if (g.layout == Layout::pixels) {
#pragma unroll
                for (int k = 0; k < V; ++k) v[k] = stage[(offset + k) * t.C + c];
            } else {
                const int64_t from =
                    b * g.s[0] + c * g.s[1] + pixel / t.W * g.s[2] + pixel % t.W * g.s[3];
                if (g.layout == Layout::rows) {
                    load(g.data, g.dtype, from, v);
                } else {
#pragma unroll
                    for (int k = 0; k < V; ++k) v[k] = load(g.data, g.dtype, from + k * g.s[3]);
                }
            }
            load(s.delta, s.dtype, plane + pixel, d);
            load_image(s.images, s.image_dtype, plane, pixel, t.W, mirror, x);
#pragma unroll
            for (int k = 0; k < V; ++k) bad += !(fabsf(v[k]) <= FLOAT_MAX);
            if constexpr (MOVED)
                if (g.grid > 1) v[0] = cell_sum(t, g, b, c, pixel / t.W, pixel % t.W);
#pragma unroll
            for (int k = 0; k < V; ++k) {
                const float before = s.dtype == DType::i8 ? d[k] * s.level : d[k];
                d[k] = step(before, v[k], x[k], s.alpha, s.eps);
                if (s.dtype == DType::i8) d[k] = clamp(rintf(d[k] * s.levels), -127.f, 127.f);
            }
            store(s.delta, s.dtype, plane + pixel, d);
        }
    }
    if (s.nonfinite) {
        bad = warp_sum(bad);
        if (bad && threadIdx.x % 32 == 0)
            atomicAdd(s.nonfinite, static_cast<unsigned long long>(bad));
    }
}

}  // namespace

void projected_step_cuda(const ProjectedStepArgs& a, void* stream) {
    require_dtype("projected_step", "delta", a.dtype, is_feature(a.dtype));
    const bool eights = aligned(a.out) && aligned(a.delta) && aligned(a.grad) && aligned(a.image);
    launch("step_all", eights ? step_all<8> : step_all<1>,
           std::min(ceil_div(a.n, THREADS * (eights ? 8 : 1)), BLOCKS), 1, stream, a.out, a.delta,
           a.grad, a.image, a.dtype, a.n, static_cast<float>(a.alpha), static_cast<float>(a.eps));
}

void projected_step_inplace_cuda(const ProjectedStepInplaceArgs& a, void* stream) {
    const char* op = "projected_step_";
    require_dtype(
        op, "delta", a.delta_dtype,
        a.delta_dtype == DType::f32 || a.delta_dtype == DType::f16 || a.delta_dtype == DType::i8);
    require_dtype(op, "grad", a.grad_dtype, is_feature(a.grad_dtype));
    require_dtype(op, "images", a.image_dtype,
                  a.image_dtype == DType::u8 || a.image_dtype == DType::f32);
    const Tiles t = tiles_of(a.B, a.C, a.H, a.W, a.N, a.index, a.flip, a.view);
    const int64_t* s = a.grad_stride;
    bool eights = in_eights(t, {a.delta, a.images});
    Layout layout = Layout::strided;
    const bool moved = a.view || a.grid > 1;
    if (moved) {
        eights = false;
    } else if (eights && s[3] == 1 && s[0] % 8 == 0 && s[1] % 8 == 0 && s[2] % 8 == 0 &&
               aligned(a.grad)) {
        layout = Layout::rows;
    } else if (s[1] == 1 && s[3] == a.C && s[2] == a.W * a.C && t.pixels * a.C <= STAGE) {
        layout = Layout::pixels;
        eights = eights && s[0] % 8 == 0 && aligned(a.grad);
    }
    const Gradient g{a.grad,
                     a.grad_dtype,
                     {s[0], s[1], s[2], s[3]},
                     layout,
                     std::min(a.grid, std::max(a.H, a.W))};
    const Store store{a.delta,
                      a.delta_dtype,
                      a.images,
                      a.image_dtype,
                      static_cast<float>(a.alpha),
                      static_cast<float>(a.eps),
                      static_cast<float>(a.eps / 127),
                      static_cast<float>(127 / a.eps),
                      reinterpret_cast<unsigned long long*>(a.nonfinite)};
    const int64_t tiles = a.C ? a.B * t.per_image : 0;
    launch("step_rows",
           moved    ? step_rows<1, true>
           : eights ? step_rows<8, false>
                    : step_rows<1, false>,
           std::min(tiles, BLOCKS), 1, stream, t, g, store);
}

}  // namespace miue
