// Count, mean and covariance of every class: members listed in batch order, means in double, then
// 64 x 64 tiles of centred products.
#include "device.cuh"

namespace miue {
namespace {

constexpr unsigned ALL = 0xffffffffu;
constexpr int TILE = 64, DEPTH = 16;    // columns of a tile, rows in shared memory at a time
constexpr int ROWS = 8, COLUMNS = 4;    // of the tile, per thread
constexpr int ACROSS = TILE / COLUMNS;  // threads along a tile's row
static_assert(TILE * TILE == THREADS * ROWS * COLUMNS);

struct Classes {
    const void* features;
    DType dtype;
    int64_t stride, B, D;
    const int64_t *labels, *counts, *starts;
    int64_t* order;  // the members of class k from starts[k], in batch order
    // [K, D]: mean = means + rests, the second what the rounding of the first left
    float *means, *rests;
};

__global__ void count_members(const int64_t* labels, int64_t B, int64_t* counts) {
    double count = 0;
    for (int64_t i = threadIdx.x; i < B; i += THREADS)
        count += labels[i] == static_cast<int64_t>(blockIdx.x);
    count = block_sum(count);
    if (threadIdx.x == 0) counts[blockIdx.x] = static_cast<int64_t>(count);
}

__global__ void list_members(Classes c, int64_t* starts) {
    __shared__ int found[WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t label = blockIdx.x;
    double before = 0;  // exact: a count
    for (int64_t k = threadIdx.x; k < label; k += THREADS)
        before += static_cast<double>(c.counts[k]);
    before = block_sum(before);
    __shared__ int64_t start;
    if (threadIdx.x == 0) starts[label] = start = static_cast<int64_t>(before);
    __syncthreads();
    int64_t slot = start;
    for (int64_t window = 0; window < c.B; window += THREADS) {
        const int64_t i = window + threadIdx.x;
        const bool mine = i < c.B && c.labels[i] == label;
        const unsigned members = __ballot_sync(ALL, mine);
        if (lane == 0) found[warp] = __popc(members);
        __syncthreads();
        int64_t own = slot + __popc(members & ((1u << lane) - 1));
        for (int w = 0; w < WARPS; ++w) {
            if (w < warp) own += found[w];
            slot += found[w];
        }
        if (mine) c.order[own] = i;
        __syncthreads();
    }
}

// One thread per column: the members of its class in batch order.
__global__ void class_means(Classes c) {
    const int64_t k = blockIdx.x, d = static_cast<int64_t>(blockIdx.y) * THREADS + threadIdx.x,
                  count = c.counts[k];
    if (d >= c.D) return;
    const int64_t* members = c.order + c.starts[k];
    double total = 0;
#pragma unroll 8
    for (int64_t i = 0; i < count; ++i)
        total += static_cast<double>(load(c.features, c.dtype, members[i] * c.stride + d));
    const double mean = count ? total / static_cast<double>(count) : 0;
    const float high = static_cast<float>(mean);
    c.means[k * c.D + d] = high;
    c.rests[k * c.D + d] = static_cast<float>(mean - static_cast<double>(high));
}

// Rows [first, first + DEPTH) of columns [column, column + TILE), less the mean; 0 past the ends.
__device__ __forceinline__ void load_centred(const Classes& c, int64_t k, int64_t first,
                                             int64_t column, float (&tile)[DEPTH][TILE]) {
    const int64_t d = column + threadIdx.x % TILE, count = c.counts[k];
    const float high = d < c.D ? c.means[k * c.D + d] : 0.f,
                low = d < c.D ? c.rests[k * c.D + d] : 0.f;
#pragma unroll
    for (int row = threadIdx.x / TILE; row < DEPTH; row += THREADS / TILE) {
        const bool inside = first + row < count && d < c.D;
        tile[row][threadIdx.x % TILE] =
            inside ? load(c.features, c.dtype, c.order[c.starts[k] + first + row] * c.stride + d) -
                         high - low
                   : 0.f;
    }
}

// One tile of the upper triangle, written to both places. Block: tile row and class in x, tile
// column in y.
__global__ void class_products(Classes c, int64_t tiles, float* covariances) {
    __shared__ float a[DEPTH][TILE], b[DEPTH][TILE];
    const int64_t k = blockIdx.x / tiles, p = blockIdx.x % tiles, q = blockIdx.y,
                  count = c.counts[k];
    if (p > q) return;
    const int row = threadIdx.x / ACROSS * ROWS, column = threadIdx.x % ACROSS * COLUMNS;
    float sum[ROWS][COLUMNS] = {};
    for (int64_t first = 0; first < count; first += DEPTH) {
        load_centred(c, k, first, p * TILE, a);
        load_centred(c, k, first, q * TILE, b);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
#pragma unroll
                for (int s = 0; s < COLUMNS; ++s)
                    sum[r][s] = fmaf(a[i][row + r], b[i][column + s], sum[r][s]);
            }
        }
        __syncthreads();
    }
    const float divisor = count ? static_cast<float>(count) : 1.f;
    float* matrix = covariances + k * c.D * c.D;
    for (int r = 0; r < ROWS; ++r) {
        for (int s = 0; s < COLUMNS; ++s) {
            const int64_t i = p * TILE + row + r, j = q * TILE + column + s;
            if (i > j || j >= c.D) continue;
            matrix[i * c.D + j] = matrix[j * c.D + i] = sum[r][s] / divisor;
        }
    }
}

}  // namespace

int64_t class_covariance_workspace_cuda(int64_t B, int64_t D, DType, int64_t K) {
    return (K + B) * sizeof(int64_t) + K * D * sizeof(float);
}

void class_covariance_cuda(const ClassCovarianceArgs& a, void* stream) {
    require_dtype("class_covariance", "features", a.dtype, is_feature(a.dtype));
    int64_t* starts = static_cast<int64_t*>(a.workspace);
    int64_t* order = starts + a.K;
    const Classes classes{a.features,
                          a.dtype,
                          a.row_stride,
                          a.B,
                          a.D,
                          a.labels,
                          a.counts,
                          starts,
                          order,
                          static_cast<float*>(a.means),
                          reinterpret_cast<float*>(order + a.B)};
    launch("count_members", count_members, a.K, 1, stream, a.labels, a.B, a.counts);
    launch("list_members", list_members, a.K, 1, stream, classes, starts);
    launch("class_means", class_means, a.K, ceil_div(a.D, THREADS), stream, classes);
    const int64_t tiles = ceil_div(a.D, TILE);
    launch("class_products", class_products, a.K * tiles, tiles, stream, classes, tiles,
           static_cast<float*>(a.covariances));
}

}  // namespace miue
