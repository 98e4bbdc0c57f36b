// A 3x3 convolution of 64 to 64 channels (stride 1, padding 1) for Hopper. The weights stay in
// shared memory, a tile of the image is copied there once, with its halo, and the nine taps are
// nine products over it whose descriptors are shifted by a few pixels.
//
// Tile: `rows` rows of one image, or several whole images. A row is a pixel of zeros and then the W
// pixels of the image, so that the right neighbour of a row's last pixel is the next row's zero;
// between images lies a row of zeros. The output at row y, column x is position m = y (W + 1) + x
// and needs pixel m + r (W + 1) + s for tap (r, s): one shift for the whole tile. One position per
// row is wasted. Channels lie in eight planes of 8 (16 bytes), each [pixel][16 bytes]: the layout
// of core matrices without swizzle, in which a shift by any number of pixels is a descriptor. (With
// the 128-byte swizzle it would start inside the 1,024-byte pattern.) A plane has an odd number of
// pixels: the eight planes of a pixel are then written to different banks.
//
// Each of the two warpgroups of a block works through tiles of its own with two buffers; they share
// the weights only, so that one multiplies while the other finishes a tile.
#include <algorithm>

#include "wgmma.cuh"

namespace miue {
namespace {

constexpr int CHANNELS = 64, TAPS = 9, PLANES = CHANNELS / 8, GROUP = 128, GROUPS = 2;
// bytes; odd in 16, as a plane of the tile
constexpr int WEIGHT_PLANE = (CHANNELS + 1) * 16;
constexpr int WEIGHT_BYTES = TAPS * PLANES * WEIGHT_PLANE;  // 74,880
constexpr int MOST_SHARED = 232448;                         // bytes that a block may have on Hopper

struct Conv {
    const uint16_t *x, *weight, *residual;
    const float* bias;
    uint16_t* y;
    uint8_t* mask_out;
    const uint8_t* mask_in;
    bool relu, transpose, reverse;
    int B, H, W;
    int images, rows, tiles_per_image, tiles;  // of a tile: images > 1 only with rows = H
    int plane;                                 // pixels of a plane
    // for quotients by W + 1, rows + 1, W, rows
    unsigned per_line, per_period, per_width, per_rows;
};

struct Tile {
    int image, y, count;  // first image, first row, pixels that exist
};

// n / d from 65536 / d + 1, exact for n * d < 65536.
__device__ __forceinline__ int quotient(int n, unsigned per) {
    return static_cast<int>(static_cast<unsigned>(n) * per >> 16);
}

__device__ __forceinline__ Tile tile_at(const Conv& a, int tile) {
    const int n = tile / a.tiles_per_image, image = n * a.images,
              y = (tile - n * a.tiles_per_image) * a.rows;
    return {image, y,
            (a.images > 1 ? min(a.images, a.B - image) * a.rows : min(a.rows, a.H - y)) * a.W};
}

__device__ __forceinline__ int64_t first_pixel(const Conv& a, const Tile& t) {
    return (int64_t{t.image} * a.H + t.y) * a.W;
}

// Output position of the tile's pixel-th pixel.
__device__ __forceinline__ int position(const Conv& a, int pixel) {
    const int row = quotient(pixel, a.per_width), image = quotient(row, a.per_rows);
    return (row + image) * (a.W + 1) + pixel - row * a.W;
}

// Where eight channels of an output position lie while a tile is finished. The order of the eights
// changes with the position, so that eight positions and eight eights are different banks.
__device__ __forceinline__ unsigned char* staged(unsigned char* stage, int m, int eight) {
    return stage + (m * PLANES + (eight ^ (m & 7))) * 16;
}

// Weights [tap][plane of summed channels][channel of the result][8 summed channels], taps in the
// order of the shifts.
__device__ __forceinline__ void copy_weights(const Conv& a, unsigned char* to) {
    if (!a.transpose) {
        for (int k = threadIdx.x; k < CHANNELS * TAPS * PLANES; k += GROUP * GROUPS) {
            const int plane = k % PLANES, tap = k / PLANES % TAPS, channel = k / (PLANES * TAPS);
            copy_async(to + ((a.reverse ? TAPS - 1 - tap : tap) * PLANES + plane) * WEIGHT_PLANE +
                           channel * 16,
                       a.weight + k * 8, true);
        }
        return;
    }
    // 8 summed channels x 8 channels of the result
    for (int k = threadIdx.x; k < TAPS * PLANES * PLANES; k += GROUP * GROUPS) {
        const int plane = k % PLANES, eight = k / PLANES % PLANES, tap = k / (PLANES * PLANES);
        uint32_t rows[8][4];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint4 row = *reinterpret_cast<const uint4*>(
                a.weight + ((plane * 8 + i) * TAPS + tap) * CHANNELS + eight * 8);
            rows[i][0] = row.x, rows[i][1] = row.y, rows[i][2] = row.z, rows[i][3] = row.w;
        }
        unsigned char* first =
            to + ((a.reverse ? TAPS - 1 - tap : tap) * PLANES + plane) * WEIGHT_PLANE + eight * 128;
#pragma unroll
        for (int c = 0; c < 8; ++c) {
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t low = rows[2 * i][c / 2] >> 16 * (c % 2),
                               high = rows[2 * i + 1][c / 2] >> 16 * (c % 2);
                words[i] = (low & 0xffff) | high << 16;
            }
            *reinterpret_cast<uint4*>(first + c * 16) =
                make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}

// All pixels of all planes, those outside the image as zeros: no product reads what is older.
__device__ __forceinline__ void copy_tile(const Conv& a, const Tile& t, unsigned char* to) {
    const int eight = threadIdx.x % PLANES, last = a.images * (a.rows + 1);
    for (int at = threadIdx.x % GROUP / PLANES; at < a.plane; at += GROUP / PLANES) {
        const int row = quotient(at, a.per_line), column = at - row * (a.W + 1);
        const int image = min(quotient(row, a.per_period), a.images - 1),
                  y = t.y + row - 1 - image * (a.rows + 1);
        const bool there = column > 0 && row <= last && y >= 0 && y < a.H && t.image + image < a.B;
        const int64_t pixel = (int64_t{t.image + image} * a.H + y) * a.W + column - 1;
        copy_async(to + (eight * a.plane + at) * 16,
                   a.x + (there ? pixel * CHANNELS + eight * 8 : 0), there);
    }
}

template <DType T>
__device__ __forceinline__ float value(uint32_t bits) {
    return T == DType::f16 ? half_value(static_cast<uint16_t>(bits))
                           : bfloat_value(static_cast<uint16_t>(bits));
}

template <DType T>
__device__ __forceinline__ uint32_t packed(float low, float high) {
    if constexpr (T == DType::f16) return half_pair(low, high);
    return bfloat_bits(low) | static_cast<uint32_t>(bfloat_bits(high)) << 16;
}

template <DType T, int N>
__global__ void __launch_bounds__(GROUP* GROUPS) conv64(Conv a) {
    constexpr int CHUNKS = (N * PLANES + GROUP - 1) / GROUP;  // eights of channels per thread
    unsigned char* const weights = dynamic_shared<unsigned char>();
    const int group = threadIdx.x / GROUP, thread = threadIdx.x % GROUP, warp = thread / 32,
              lane = thread % 32;
    const int step = gridDim.x * GROUPS, buffer_bytes = PLANES * a.plane * 16;
    unsigned char *buffer = weights + WEIGHT_BYTES + group * 2 * buffer_bytes,
                  *other = buffer + buffer_bytes;
    // this thread's rows of D: it and the one eight further
    const int channel = 16 * warp + lane / 4;
    const float bias = a.bias ? a.bias[channel] : 0.f, bias8 = a.bias ? a.bias[channel + 8] : 0.f;

    int tile = blockIdx.x * GROUPS + group;
    copy_weights(a, weights);
    if (tile < a.tiles) copy_tile(a, tile_at(a, tile), buffer);
    finish_copies();
    __syncthreads();
    const uint64_t weight_matrix = descriptor(weights, WEIGHT_PLANE, 128);
    for (; tile < a.tiles; tile += step) {
        finish_copies();
        warpgroup_barrier();  // the tile is in `buffer`, and nobody reads `other`
        const uint64_t image_matrix = descriptor(buffer, a.plane * 16, 128);
        float d[N / 2];
#pragma unroll
        for (float& v : d) v = 0.f;
        wgmma_begin(d);
#pragma unroll
        for (int tap = 0; tap < TAPS; ++tap) {
            const int shift = tap / 3 * (a.W + 1) + tap % 3;
#pragma unroll
            for (int plane = 0; plane < PLANES; plane += 2) {
                wgmma<T, N>(d, weight_matrix + (tap * PLANES + plane) * (WEIGHT_PLANE / 16),
                            image_matrix + plane * a.plane + shift);
            }
        }
        wgmma_commit();

        if (tile + step < a.tiles) copy_tile(a, tile_at(a, tile + step), other);
        const Tile t = tile_at(a, tile);
        const int64_t first = first_pixel(a, t) * PLANES;  // in eights of channels
        uint4 residual[CHUNKS];
        uint32_t bits[CHUNKS];
        if (a.residual) {
#pragma unroll
            for (int k = 0; k < CHUNKS; ++k) {
                const int e = k * GROUP + thread;
                if (e < t.count * PLANES)
                    residual[k] = *reinterpret_cast<const uint4*>(a.residual + (first + e) * 8);
            }
        }
        if (a.mask_in) {
#pragma unroll
            for (int k = 0; k < CHUNKS; ++k) {
                const int e = k * GROUP + thread;
                if (e < t.count * PLANES) bits[k] = a.mask_in[first + e];
            }
        }

        wgmma_wait(d);
        warpgroup_barrier();  // no warp reads `buffer` any more
        if (a.residual) {
#pragma unroll
            for (int k = 0; k < CHUNKS; ++k) {
                const int e = k * GROUP + thread;
                if (e < t.count * PLANES)
                    *reinterpret_cast<uint4*>(staged(buffer, position(a, e / PLANES), e % PLANES)) =
                        residual[k];
            }
            warpgroup_barrier();
        }
        unsigned char* const rows = staged(buffer, lane % 8, 2 * warp + lane / 8 % 2);
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            float v[4] = {d[4 * j] + bias, d[4 * j + 1] + bias, d[4 * j + 2] + bias8,
                          d[4 * j + 3] + bias8};
            if (a.residual) {
                uint32_t w[2];
                load_transposed(w, rows + j * 8 * PLANES * 16);
                v[0] += value<T>(w[0]), v[1] += value<T>(w[0] >> 16), v[2] += value<T>(w[1]),
                    v[3] += value<T>(w[1] >> 16);
            }
            const uint32_t pairs[2] = {packed<T>(v[0], v[1]), packed<T>(v[2], v[3])};
            store_transposed(rows + j * 8 * PLANES * 16, pairs);
        }
        warpgroup_barrier();
#pragma unroll
        for (int k = 0; k < CHUNKS; ++k) {
            const int e = k * GROUP + thread;
            if (e >= t.count * PLANES) continue;
            float v[8];
            load(staged(buffer, position(a, e / PLANES), e % PLANES), T, 0, v);
            uint32_t positive = 0;
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                positive |= static_cast<uint32_t>(!(v[c] <= 0.f)) << c;
                const bool kept = a.relu ? positive >> c & 1 : !a.mask_in || bits[k] >> c & 1;
                v[c] = kept ? v[c] : 0.f;
            }
            store(a.y, T, (first + e) * 8, v);
            if (a.mask_out) a.mask_out[first + e] = static_cast<uint8_t>(positive);
        }
        unsigned char* const swap = buffer;
        buffer = other, other = swap;
    }
}

struct Plan {
    int n = 0, images = 0, rows = 0, plane = 0, tiles_per_image = 0, shared = 0;
    int64_t tiles = 0, cost = 0;
};

// The tile with n output positions at most.
Plan plan(int n, int64_t B, int H, int W) {
    Plan p{n};
    const int lines = (n + 1) / (W + 1);
    p.plane = (n + 2 * (W + 1) + 2) | 1;
    p.shared = WEIGHT_BYTES + GROUPS * 2 * PLANES * p.plane * 16;
    if (lines == 0 || p.shared > MOST_SHARED) return p;
    p.tiles_per_image = static_cast<int>(ceil_div(H, std::min(lines, H)));
    p.rows = static_cast<int>(ceil_div(H, p.tiles_per_image));
    p.images = p.rows == H ? static_cast<int>(std::min<int64_t>(B, (lines + 1) / (H + 1))) : 1;
    p.tiles = ceil_div(B, p.images) * p.tiles_per_image;
    return p;
}

// The tile that costs least: products, and about 16 positions' worth of barriers, times the tiles
// that one warpgroup goes through.
Plan cheapest(int64_t B, int H, int W, int groups) {
    Plan best;
    for (const int n : {72, 136, 176}) {
        Plan p = plan(n, B, H, W);
        p.cost = ceil_div(p.tiles, groups) * (n + 16);
        if (p.tiles && (!best.tiles || p.cost < best.cost)) best = p;
    }
    return best;
}

// How many multiprocessors the current device has; BackendFailure unless sm_90a code runs on it.
int hopper_multiprocessors() {
#ifdef __CUDACC__
    int device = 0, count = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess)
        throw BackendFailure(std::string("conv64: ") + cudaGetErrorString(error));
    if (const int have = capability(); have != 90) {
        throw BackendFailure("conv64: its code is for compute capability 9.0, this device has " +
                             std::to_string(have / 10) + "." + std::to_string(have % 10));
    }
    return count;
#else
    return shim::MULTIPROCESSORS;
#endif
}

unsigned reciprocal(int d) { return 65536u / static_cast<unsigned>(d) + 1; }

template <DType T>
auto kernel_for(int n) {
    return n == 72 ? conv64<T, 72> : n == 136 ? conv64<T, 136> : conv64<T, 176>;
}

}  // namespace

void conv64_cuda(const Conv64Args& a, void* stream) {
    require_dtype("conv64", "x", a.dtype, a.dtype == DType::f16 || a.dtype == DType::bf16);
    const std::string size = std::to_string(a.H) + " x " + std::to_string(a.W),
                      count = std::to_string(a.B) + " images";
    const bool sixteen = aligned(a.x) && aligned(a.weight) && aligned(a.residual) && aligned(a.y);
    require(a.W >= 4 && a.W <= 64 && a.H >= 1, "conv64", "size", "H >= 1 and W in 4..64", size);
    require(a.H <= INT32_MAX && a.B <= INT32_MAX / a.H, "conv64", "size",
            "fewer than 2^31 rows of pixels", count);
    require(sixteen, "conv64", "memory", "multiples of 16 bytes", "other addresses");
    const int multiprocessors = hopper_multiprocessors();
    if (a.B == 0) return;
    const int H = static_cast<int>(a.H), W = static_cast<int>(a.W);
    const Plan p = cheapest(a.B, H, W, multiprocessors * GROUPS);
    const auto halves = [](const void* from) { return static_cast<const uint16_t*>(from); };
    const Conv c{halves(a.x),
                 halves(a.weight),
                 halves(a.residual),
                 a.bias,
                 static_cast<uint16_t*>(a.y),
                 a.mask_out,
                 a.mask_in,
                 a.relu,
                 a.transpose,
                 a.reverse,
                 static_cast<int>(a.B),
                 H,
                 W,
                 p.images,
                 p.rows,
                 p.tiles_per_image,
                 static_cast<int>(p.tiles),
                 p.plane,
                 reciprocal(W + 1),
                 reciprocal(p.rows + 1),
                 reciprocal(W),
                 reciprocal(p.rows)};
    const int64_t blocks = std::min<int64_t>(multiprocessors, ceil_div(p.tiles, GROUPS));
    launch_wide("conv64",
                a.dtype == DType::f16 ? kernel_for<DType::f16>(p.n) : kernel_for<DType::bf16>(p.n),
                blocks, 1, GROUP * GROUPS, p.shared, stream, c);
}

}  // namespace miue
