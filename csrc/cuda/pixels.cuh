// What the two ops on image stores share: tiles of pixels, mirrored image loads, levels.
#pragma once
#include <algorithm>

#include "device.cuh"

namespace miue {

// floats of shared memory that turn [pixel][channel] into [channel][pixel]
constexpr int STAGE = 4096;

// A tile is `pixels` consecutive pixels of one image, all channels.
struct Tiles {
    int64_t B, C, H, W, N, plane, pixels, per_image;
    const int64_t* index;
    const uint8_t* flip;
    const int32_t* view;
};

inline Tiles tiles_of(int64_t B, int64_t C, int64_t H, int64_t W, int64_t N, const int64_t* index,
                      const uint8_t* flip, const int32_t* view) {
    const int64_t plane = H * W, most = std::max<int64_t>(1, STAGE / std::max<int64_t>(C, 1));
    const int64_t pixels = std::max<int64_t>(1, std::min(plane, most >= 8 ? most / 8 * 8 : most));
    return {B, C, H, W, N, plane, pixels, ceil_div(plane, pixels), index, flip, view};
}

// Groups of eight neighbours never cross a row or a tile, and every access is aligned.
inline bool in_eights(const Tiles& t, std::initializer_list<const void*> pointers) {
    return t.W % 8 == 0 && t.pixels % 8 == 0 &&
           std::all_of(pointers.begin(), pointers.end(), aligned);
}

// Where the pixel at (row, column) of a viewed plane is in the plane itself; -1: padding.
__device__ __forceinline__ int64_t seen_pixel(const int32_t* views, int64_t b, bool transpose,
                                              int64_t row, int64_t column, int64_t H, int64_t W) {
    if (!views) return row * W + column;
    const int32_t* v = views + 3 * b;
    const bool mirrored = v[2] != 0;
    const int64_t down = transpose ? -int64_t{v[0]} : v[0];
    const int64_t right = transpose && !mirrored ? -int64_t{v[1]} : v[1];
    row -= down, column -= right;
    if (row < 0 || row >= H || column < 0 || column >= W) return -1;
    return row * W + (mirrored ? W - 1 - column : column);
}

__device__ __forceinline__ float clamp(float x, float low, float high) {  // NaN stays
    return x < low ? low : x > high ? high : x;
}

// V pixels from `pixel` of one channel plane on the [0, 1] scale, mirrored along W if asked.
template <int V>
__device__ __forceinline__ void load_image(const void* images, DType dtype, int64_t plane_start,
                                           int64_t pixel, int64_t W, bool mirror, float (&x)[V]) {
    if (!mirror) {
        load(images, dtype, plane_start + pixel, x);
    } else {
        const int64_t column = pixel % W;
        float back[V];
        load(images, dtype, plane_start + pixel - column + (W - V - column), back);
#pragma unroll
        for (int k = 0; k < V; ++k) x[k] = back[V - 1 - k];
    }
    if (dtype == DType::u8) {
#pragma unroll
        for (int k = 0; k < V; ++k) x[k] = __fdiv_rn(x[k], 255.f);
    }
}

}  // namespace miue
