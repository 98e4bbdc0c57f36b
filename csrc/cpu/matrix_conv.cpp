// Convolutions of bf16 values on matrix tiles. 32 images at one pixel are the rows of two tiles, so that any size, stride, padding and
// dilation is a list of taps per pixel: taps outside the image, and those that a stride skips going back, cost nothing.
#include <algorithm>
#include <cstring>
#include <vector>

#include "arena.h"
#include "kernels.h"
#include "matrix.h"
#include "parallel.h"

namespace miue {
namespace {

constexpr int64_t PANEL_TILES = 20;        // of the weights that stay in the level-1 cache
constexpr int64_t RING_BYTES = 512 << 10;  // of the images that stay in the level-2 cache
constexpr int64_t STRIP_SUMS = 64;         // pixels, times panels, whose sums stay there

// How the work is divided. The order of a sum, block by block of channels and tap by tap, depends on the convolution alone.
struct Division {
    int64_t taps, blocks, panels, depth, passes, together, row_values, strip, ring, groups, pieces;
    std::vector<int64_t> rows, columns;  // tap_sources()
    std::vector<int64_t> first, last;    // input rows of each result row: none where last < first

    Division(const MatrixConvShape& a, int threads)
        : rows(tap_sources(a, 0)), columns(tap_sources(a, 1)), first(a.P), last(a.P) {
        taps = a.R * a.S, blocks = parts(a.C, DEPTH), panels = parts(a.K, RESULTS);
        const int64_t met = a.back ? parts(taps, a.stride[0] * a.stride[1]) : taps;  // by a pixel
        passes = parts(blocks, std::max<int64_t>(1, PANEL_TILES / (2 * met)));
        depth = parts(blocks, passes), passes = parts(blocks, depth);
        row_values = blocks * a.W * 2 * SIDE;
        for (int64_t p = 0; p < a.P; p++) {
            // Of all taps, those outside the image left out, so that both ends only move forward.
            const int64_t reach = (a.R - 1) * a.dilation[0], step = a.stride[0],
                          low = a.back ? p + a.padding[0] - reach : p * step - a.padding[0],
                          high = low + reach;
            const auto down = [&](int64_t n) { return n < 0 ? -1 : n / step; };
            first[p] = std::min(a.H, std::max<int64_t>(0, a.back ? down(low + step - 1) : low));
            last[p] = std::min(a.H - 1, a.back ? down(high) : high);
        }
        together = std::max<int64_t>(1, at_most(panels, STRIP_SUMS / std::max<int64_t>(1, a.Q)));
        strip =
            std::max<int64_t>(1, at_most(a.P, STRIP_SUMS / std::max<int64_t>(1, a.Q * together)));
        while (strip > 1 && rows_of(strip) * row_values * 2 > RING_BYTES) strip--;
        ring = rows_of(strip);
        groups = parts(a.B, IMAGES);
        pieces = groups % threads ? at_most(parts(a.P, strip) > 1 ? parts(a.P, strip) : a.P,
                                            parts(4 * threads, groups))
                                  : 1;
    }
    // The most input rows that `count` result rows in turn look at.
    int64_t rows_of(int64_t count) const {
        const int64_t end = first.size();
        int64_t most = 1;
        for (int64_t p = 0; p < end; p++)
            most = std::max(most, last[at_most(p + count, end) - 1] - first[p] + 1);
        return most;
    }
};

struct Space {
    uint16_t* ring;
    float* sums;
    MatrixTap* taps;

    Space(Arena& arena, const MatrixConvShape& a, const Division& d) {
        ring = arena.take<uint16_t>(d.ring * d.row_values);
        sums = arena.take<float>(d.strip * a.Q * d.together * SUMS_STEP);
        taps = arena.take<MatrixTap>(d.taps);
    }
};

// An input row of some images, to [block][column][image][32 channels].
void gather_row(const MatrixConvArgs& a, const Division& d, int64_t image, int64_t images,
                int64_t row, uint16_t* to) {
    for (int64_t n = 0; n < images; n++) {
        const uint16_t* from = a.x + ((image + n) * a.H + row) * a.W * a.C;
        for (int64_t block = 0; block < d.blocks; block++) {
            const int64_t count = at_most(a.C - block * DEPTH, DEPTH);
            uint16_t* at = to + (block * a.W * IMAGES + n) * DEPTH;
            for (int64_t w = 0; w < a.W; w++, at += IMAGES * DEPTH) {
                const uint16_t* value = from + w * a.C + block * DEPTH;
                if (count == DEPTH)
                    std::memcpy(at, value, 2 * DEPTH);
                else {
                    std::memcpy(at, value, size_t(2 * count));
                    std::memset(at + count, 0, size_t(2 * (DEPTH - count)));
                }
            }
        }
    }
}

// The sums of rows [p0, p1) for a panel of results, over a pass of the blocks of channels.
void sums_of(const MatrixConvArgs& a, const Division& d, const MatrixKernels& kernels, int64_t p0,
             int64_t p1, int64_t panel, int64_t block, const Space& space, float* sums) {
    const uint16_t* weights = a.packed + (panel * d.blocks + block) * d.taps * 2 * SIDE;
    MatrixProducts m{
        space.taps,        0,         at_most(d.blocks - block, d.depth), a.W * 2 * SIDE, weights,
        d.taps * 2 * SIDE, block > 0, a.K - panel * RESULTS > TILE,       nullptr};
    // Going back, columns that meet the same taps come one after the other.
    const int64_t step = a.back ? a.stride[1] : 1;
    for (int64_t p = p0; p < p1; p++)
        for (int64_t i = 0, q = 0; i < a.Q; i++, q = q + step < a.Q ? q + step : (q + 1) % step) {
            m.taps = 0;
            for (int64_t r = 0; r < a.R; r++) {
                const int64_t row = d.rows[p * a.R + r];
                if (row < 0) continue;
                const uint16_t* line =
                    space.ring + row % d.ring * d.row_values + block * a.W * 2 * SIDE;
                for (int64_t s = 0; s < a.S; s++)
                    if (const int64_t column = d.columns[q * a.S + s]; column >= 0)
                        space.taps[m.taps++] = {line + column * 2 * SIDE, int32_t(r * a.S + s)};
            }
            m.sums = sums + ((p - p0) * a.Q + q) * SUMS_STEP;
            kernels.products(m);
        }
}

// Result rows [from, to) of a group of images.
void piece(const MatrixConvArgs& a, const Division& d, const MatrixKernels& kernels, int64_t image,
           int64_t from, int64_t to, const Space& space) {
    const int64_t images = at_most(a.B - image, IMAGES);
    kernels.begin(images);
    int64_t there = -1;  // the last row of the ring
    for (int64_t p0 = from; p0 < to; p0 += d.strip) {
        const int64_t p1 = at_most(to, p0 + d.strip);
        for (int64_t row = std::max(d.first[p0], there + 1); row <= d.last[p1 - 1]; row++)
            gather_row(a, d, image, images, row, space.ring + row % d.ring * d.row_values);
        there = std::max(there, d.last[p1 - 1]);
        const int64_t pixels = (p1 - p0) * a.Q, panel_step = pixels * SUMS_STEP;
        for (int64_t panel0 = 0; panel0 < d.panels; panel0 += d.together) {
            const int64_t panels = at_most(d.panels - panel0, d.together);
            for (int64_t i = 0; i < panels; i++)
                for (int64_t block = 0; block < d.blocks; block += d.depth)
                    sums_of(a, d, kernels, p0, p1, panel0 + i, block, space,
                            space.sums + i * panel_step);
            const int64_t first = panel0 * RESULTS;
            MatrixResults results{
                space.sums, pixels, panels, at_most(a.K - first, panels * RESULTS), panel_step, 0};
            for (int64_t n = 0; n < images; n++) {
                results.sums = space.sums + n / TILE * 512 + n % TILE * 16;
                results.place = (((image + n) * a.P + p0) * a.Q) * a.K + first;
                kernels.results(a, a.bias ? a.bias + first : nullptr, results);
            }
        }
    }
    kernels.end();
}

}  // namespace

int64_t matrix_weights_values_cpu(int64_t C, int64_t K, int64_t R, int64_t S) {
    return parts(K, RESULTS) * parts(C, DEPTH) * R * S * 2 * SIDE;
}

// To [panel][block][tap][half][channel / 2][result][channel % 2], as the tiles want the second factor.
void pack_matrix_weights_cpu(const PackMatrixWeightsArgs& a, int threads) {
    const int64_t blocks = parts(a.C, DEPTH), panels = parts(a.K, RESULTS), taps = a.R * a.S;
    Queue queue(panels * blocks);
    parallel(at_most(threads, panels * blocks), [&](int) {
        queue.drain([&](int64_t job) {
            const int64_t panel = job / blocks, block = job % blocks;
            uint16_t* to = a.packed + job * taps * 2 * SIDE;
            for (int64_t tap = 0; tap < taps; tap++)
                for (int64_t half = 0; half < 2; half++, to += SIDE) {
                    const int64_t k0 = panel * RESULTS + half * TILE, c0 = block * DEPTH;
                    const uint16_t* from = a.weight + c0 * a.stride[0] + k0 * a.stride[1] +
                                           tap / a.S * a.stride[2] + tap % a.S * a.stride[3];
                    for (int64_t c = 0; c < DEPTH; c++)
                        for (int64_t k = 0; k < TILE; k++)
                            to[c / 2 * DEPTH + 2 * k + c % 2] =
                                c0 + c < a.C && k0 + k < a.K
                                    ? from[c * a.stride[0] + k * a.stride[1]]
                                    : uint16_t(0);
                }
        });
    });
}

int64_t matrix_conv_workspace_cpu(const MatrixConvShape& args, int threads) {
    const Division d(args, threads);
    Arena arena(nullptr);
    for (int t = 0; t < threads; t++) Space(arena, args, d);
    return arena.used();
}

void matrix_conv_cpu(const MatrixConvArgs& args, int threads) {
    const int64_t count = args.B * args.P * args.Q * args.K;
    if (!count) return;
    const Division d(args, threads);
    const MatrixKernels& kernels = matrix_kernels("matrix_conv", args.plain);
    MatrixConvArgs a = args;
    // ReLU bits are read and written 16 at a time: other numbers of channels take the epilogue as a pass of its own.
    const bool epilogue = a.residual || a.relu || a.mask_in, fused = a.K % TILE == 0;
    if (epilogue && !fused) {
        if (a.relu) a.bias = nullptr;
        a.residual = nullptr, a.relu = false, a.mask_out = nullptr, a.mask_in = nullptr;
    }
    if (a.mask_out)
        std::memset(a.mask_out + count / 8, 0, size_t((count + 63) / 64 * 8 - count / 8));
    Queue queue(d.groups * d.pieces);
    const int64_t rows = parts(a.P, d.pieces);
    parallel(at_most(threads, d.groups * d.pieces), [&](int me) {
        Arena arena(args.workspace);
        for (int t = 0; t < me; t++) Space(arena, args, d);
        const Space space(arena, args, d);
        queue.drain([&](int64_t job) {
            const int64_t from = job % d.pieces * rows;
            piece(a, d, kernels, job / d.pieces * IMAGES, from, at_most(a.P, from + rows), space);
        });
    });
    if (!epilogue || fused) return;
    if (args.relu)
        conv_epilogue_cpu(
            {args.y, DType::bf16, args.bias, args.residual, true, args.mask_out, args.K, count},
            threads);
    else
        conv_grad_epilogue_cpu({args.y, DType::bf16, args.residual, args.mask_in, count}, threads);
}

}  // namespace miue
