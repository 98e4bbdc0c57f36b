// Convolutions of bf16 values on matrix tiles. 32 images at one pixel are the rows of two tiles, so that any size, stride, padding and
// dilation is a list of taps per pixel: taps outside the image, and those that a stride skips going back, cost nothing.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../check.h"
#include "arena.h"
#include "kernels.h"
#include "matrix.h"
#include "parallel.h"

namespace miue {
namespace {

constexpr int64_t PANEL_TILES = 20;        // of the weights that stay in the level-1 cache
constexpr int64_t RING_BYTES = 512 << 10;  // of the images that stay in the level-2 cache
constexpr int64_t STRIP_SUMS = 64;         // pixels, times panels, whose sums stay there

int64_t parts(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// Input coordinate that a tap reads for result coordinate `at`, or -1; of one dimension d.
int64_t source(const MatrixConvArgs& a, int d, int64_t at, int64_t tap) {
    const int64_t extent = d ? a.W : a.H;
    int64_t from = a.back ? at + a.padding[d] - tap * a.dilation[d]
                          : at * a.stride[d] - a.padding[d] + tap * a.dilation[d];
    if (a.back) {
        if (from < 0 || from % a.stride[d]) return -1;
        from /= a.stride[d];
    }
    return from >= 0 && from < extent ? from : -1;
}

// How the work is divided. The order of a sum, block by block of channels and tap by tap, depends on the convolution alone.
struct Division {
    int64_t taps, blocks, panels, depth, passes, together, row_values, strip, ring, groups, pieces;
    std::vector<int64_t> first, last;  // input rows of each result row: none where last < first

    Division(const MatrixConvArgs& a, int threads) : first(a.P), last(a.P) {
        taps = a.R * a.S, blocks = parts(a.C, DEPTH), panels = parts(a.K, RESULTS);
        const int64_t met = a.back ? parts(taps, a.stride[0] * a.stride[1]) : taps;  // by a pixel
        passes = parts(blocks, std::max<int64_t>(1, PANEL_TILES / (2 * met)));
        depth = parts(blocks, passes), passes = parts(blocks, depth);
        row_values = blocks * a.W * 2 * SIDE;
        for (int64_t p = 0; p < a.P; p++) {
            first[p] = a.H, last[p] = -1;
            for (int64_t r = 0; r < a.R; r++)
                if (const int64_t row = source(a, 0, p, r); row >= 0)
                    first[p] = std::min(first[p], row), last[p] = std::max(last[p], row);
        }
        together = std::max<int64_t>(1, at_most(panels, STRIP_SUMS / a.Q));
        strip = std::max<int64_t>(1, at_most(a.P, STRIP_SUMS / (a.Q * together)));
        while (strip > 1 && rows_of(strip) * row_values * 2 > RING_BYTES) strip--;
        ring = rows_of(strip);
        groups = parts(a.B, IMAGES);
        pieces = groups % threads ? at_most(parts(a.P, strip) > 1 ? parts(a.P, strip) : a.P,
                                            parts(4 * threads, groups))
                                  : 1;
    }
    // The most input rows that `count` result rows in turn look at, the ones in between included.
    int64_t rows_of(int64_t count) const {
        int64_t most = 1;
        for (int64_t p = 0; p < int64_t(first.size()); p++) {
            int64_t low = first[p], high = last[p];
            for (int64_t q = p; q < at_most(p + count, first.size()); q++)
                low = std::min(low, first[q]), high = std::max(high, last[q]);
            most = std::max(most, high - low + 1);
        }
        return most;
    }
};

struct Space {
    uint16_t* ring;
    float* sums;
    MatrixTap* taps;

    Space(Arena& arena, const MatrixConvArgs& a, const Division& d) {
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
                const int64_t row = source(a, 0, p, r);
                if (row < 0) continue;
                const uint16_t* line =
                    space.ring + row % d.ring * d.row_values + block * a.W * 2 * SIDE;
                for (int64_t s = 0; s < a.S; s++)
                    if (const int64_t column = source(a, 1, q, s); column >= 0)
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
        int64_t low = a.H, high = -1;
        for (int64_t p = p0; p < p1; p++)
            low = std::min(low, d.first[p]), high = std::max(high, d.last[p]);
        for (int64_t row = std::max(low, there + 1); row <= high; row++)
            gather_row(a, d, image, images, row, space.ring + row % d.ring * d.row_values);
        there = std::max(there, high);
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

const char* matrix_missing_cpu() {
    return amx_starts() ? nullptr : "this processor, or its system, has no bf16 matrix tiles (AMX)";
}

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

int64_t matrix_conv_workspace_cpu(const MatrixConvArgs& args, int threads) {
    const Division d(args, threads);
    Arena arena(nullptr);
    for (int t = 0; t < threads; t++) Space(arena, args, d);
    return arena.used();
}

namespace {

float wide(uint16_t h) {
    const uint32_t u = uint32_t(h) << 16;
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}
uint16_t narrow(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return x != x ? uint16_t(0x7fc0) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

thread_local int64_t images_here;

void plain_products(const MatrixProducts& a) {
    if (!a.add) std::memset(a.sums, 0, IMAGES * RESULTS * sizeof(float));
    for (int64_t block = 0; block < a.blocks; block++)
        for (int64_t t = 0; t < a.taps; t++)
            for (int64_t n = 0; n < images_here; n++)
                for (int64_t k = 0; k < (a.wide ? RESULTS : TILE); k++) {
                    const uint16_t* x = a.tap[t].pixel + block * a.pixel_step + n * DEPTH;
                    const uint16_t* w = a.panel + block * a.panel_step +
                                        (2 * a.tap[t].number + k / TILE) * SIDE + 2 * (k % TILE);
                    float& sum = a.sums[n / TILE * 512 + k / TILE * 256 + n % TILE * 16 + k % TILE];
                    for (int64_t c = 0; c < DEPTH; c++)
                        sum += wide(x[c]) * wide(w[c / 2 * DEPTH + c % 2]);
                }
}

void plain_results(const MatrixConvArgs& a, const float* bias, const MatrixResults& r) {
    for (int64_t p = 0; p < r.pixels; p++)
        for (int64_t k = 0; k < r.results; k++) {
            const int64_t place = r.place + p * a.K + k;
            float v = r.sums[p * SUMS_STEP + k / RESULTS * r.panel_step + k % RESULTS / TILE * 256 +
                             k % TILE];
            if (bias) v += bias[k];
            if (a.residual) v += wide(a.residual[place]);
            const bool bit = a.mask_in ? a.mask_in[place / 8] >> place % 8 & 1
                                       : !a.relu || !(wide(narrow(v)) <= 0);
            a.y[place] = bit ? narrow(v) : uint16_t(0);
            if (!a.mask_out) continue;
            uint8_t& byte = a.mask_out[place / 8];
            if (place % 8 == 0) byte = 0;
            byte = uint8_t(byte | bit << place % 8);
        }
}

void plain_across(const uint16_t* from, int64_t step, int64_t images, int64_t channels,
                  uint16_t* to) {
    for (int64_t n = 0; n < IMAGES; n++)
        for (int64_t c = 0; c < DEPTH; c++)
            to[c * IMAGES + n] = n < images && c < channels ? from[n * step + c] : uint16_t(0);
}

void plain_along(const uint16_t* from, int64_t step, int64_t images, int64_t channels,
                 uint16_t* to) {
    for (int64_t n = 0; n < IMAGES; n++)
        for (int64_t c = 0; c < DEPTH; c++)
            to[c / TILE * SIDE + n / 2 * DEPTH + c % TILE * 2 + n % 2] =
                n < images && c < channels ? from[n * step + c] : uint16_t(0);
}

void plain_outer(const uint16_t* const* x, const uint16_t* const* grad, int64_t count,
                 float* sums) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t c = 0; c < DEPTH; c++)
            for (int64_t k = 0; k < RESULTS; k++)
                for (int64_t n = 0; n < IMAGES; n++)
                    sums[c / TILE * 512 + k / TILE * 256 + c % TILE * TILE + k % TILE] +=
                        wide(x[i][c * IMAGES + n]) *
                        wide(grad[i][k / TILE * SIDE + n / 2 * DEPTH + k % TILE * 2 + n % 2]);
}

const MatrixKernels plain_kernels = {[](int64_t images) { images_here = images; },
                                     plain_products,
                                     plain_results,
                                     [] {},
                                     plain_across,
                                     plain_along,
                                     plain_outer};

const MatrixKernels& kernels_for(const char* op, bool plain) {
    require(plain || amx_starts(), op, "processor", "matrix tiles (AMX) for bfloat16", "none");
    return plain ? plain_kernels : amx_kernels;
}

}  // namespace

void matrix_conv_cpu(const MatrixConvArgs& args, int threads) {
    const int64_t count = args.B * args.P * args.Q * args.K;
    if (!count) return;
    const Division d(args, threads);
    const MatrixKernels& kernels = kernels_for("matrix_conv", args.plain);
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

namespace {

// The pixels of some images, 32 channels of 32 images each, as factors of sums over images.
struct Factors {
    int64_t together, rounds, x_blocks, grad_blocks;  // groups of images at a time
    uint16_t *x, *grad;                               // [group][block][row][column][2 * SIDE]
    float* sums;                                      // [block of x][block of grad][tap]

    Factors(Arena& arena, const MatrixWeightGradArgs& a) {
        x_blocks = parts(a.C, DEPTH), grad_blocks = parts(a.K, DEPTH);
        const int64_t x_values = x_blocks * a.H * a.W * 2 * SIDE,
                      grad_values = grad_blocks * a.P * a.Q * 2 * SIDE, groups = parts(a.B, IMAGES);
        together = std::max<int64_t>(
            1, at_most(groups, FACTOR_BYTES / (2 * (x_values + grad_values + 1))));
        rounds = parts(groups, together);
        x = arena.take<uint16_t>(together * x_values);
        grad = arena.take<uint16_t>(together * grad_values);
        sums = arena.take<float>(x_blocks * grad_blocks * a.R * a.S * TAP_SUMS);
    }
    static constexpr int64_t FACTOR_BYTES = 4 << 20;
};

constexpr int64_t PIXELS =
    4;  // whose factors stay in the level-1 cache while a row's taps take their turns

// One row of one block of a group: to [column][2 * SIDE].
void factor_row(void (*make)(const uint16_t*, int64_t, int64_t, int64_t, uint16_t*),
                const uint16_t* from, int64_t image, int64_t images, int64_t row, int64_t height,
                int64_t width, int64_t channel, int64_t channels, uint16_t* to) {
    from += ((image * height + row) * width) * channels + channel;
    for (int64_t w = 0; w < width; w++)
        make(from + w * channels, height * width * channels, images,
             at_most(channels - channel, DEPTH), to + w * 2 * SIDE);
}

// The sums of the taps in row r for a block of channels and a block of results, over `groups` groups of images.
void tap_sums(const MatrixWeightGradArgs& a, const MatrixConvArgs& forward,
              const MatrixKernels& kernels, const Factors& f, int64_t groups, int64_t c, int64_t k,
              int64_t r, float* sums) {
    for (int64_t group = 0; group < groups; group++)
        for (int64_t p = 0; p < a.P; p++) {
            const int64_t row = source(forward, 0, p, r);
            if (row < 0) continue;
            const uint16_t* x = f.x + ((group * f.x_blocks + c) * a.H + row) * a.W * 2 * SIDE;
            const uint16_t* grad =
                f.grad + ((group * f.grad_blocks + k) * a.P + p) * a.Q * 2 * SIDE;
            for (int64_t q0 = 0; q0 < a.Q; q0 += PIXELS)
                for (int64_t s = 0; s < a.S; s++) {
                    const uint16_t *left[PIXELS], *right[PIXELS];
                    int64_t count = 0;
                    for (int64_t q = q0; q < at_most(a.Q, q0 + PIXELS); q++)
                        if (const int64_t column = source(forward, 1, q, s); column >= 0)
                            left[count] = x + column * 2 * SIDE,
                            right[count++] = grad + q * 2 * SIDE;
                    if (count) kernels.outer(left, right, count, sums + s * TAP_SUMS);
                }
        }
}

}  // namespace

int64_t matrix_weight_grad_workspace_cpu(const MatrixWeightGradArgs& args) {
    Arena arena(nullptr);
    Factors(arena, args);
    return arena.used();
}

void matrix_weight_grad_cpu(const MatrixWeightGradArgs& a, int threads) {
    const MatrixKernels& kernels = kernels_for("matrix_weight_grad", a.plain);
    Arena arena(a.workspace);
    const Factors f(arena, a);
    MatrixConvArgs forward{};
    forward.H = a.H, forward.W = a.W;
    for (int d = 0; d < 2; d++)
        forward.stride[d] = a.stride[d], forward.padding[d] = a.padding[d],
        forward.dilation[d] = a.dilation[d];
    const int64_t row_taps = a.S * TAP_SUMS;
    std::memset(f.sums, 0, size_t(f.x_blocks * f.grad_blocks * a.R * row_taps) * sizeof(float));
    for (int64_t round = 0; round < f.rounds; round++) {
        const int64_t first = round * f.together * IMAGES,
                      groups = at_most(parts(a.B - first, IMAGES), f.together);
        const int64_t x_rows = groups * f.x_blocks * a.H,
                      rows = x_rows + groups * f.grad_blocks * a.P;
        Queue inputs(rows), jobs(f.x_blocks * f.grad_blocks * a.R);
        parallel(threads, [&](int) {
            kernels.begin(IMAGES);
            inputs.drain([&](int64_t at) {
                const auto make = [&](auto kernel, const uint16_t* from, int64_t height,
                                      int64_t width, int64_t channels, int64_t row, uint16_t* to) {
                    const int64_t blocks = parts(channels, DEPTH),
                                  image = first + row / height / blocks * IMAGES;
                    factor_row(kernel, from, image, at_most(a.B - image, IMAGES), row % height,
                               height, width, row / height % blocks * DEPTH, channels,
                               to + row * width * 2 * SIDE);
                };
                at < x_rows ? make(kernels.across, a.x, a.H, a.W, a.C, at, f.x)
                            : make(kernels.along, a.grad, a.P, a.Q, a.K, at - x_rows, f.grad);
            });
            wait_for_all();
            jobs.drain([&](int64_t job) {
                const int64_t pair = job / a.R;
                tap_sums(a, forward, kernels, f, groups, pair / f.grad_blocks, pair % f.grad_blocks,
                         job % a.R, f.sums + job * row_taps);
            });
            kernels.end();
        });
    }
    Queue results(a.K);
    parallel(at_most(threads, a.K), [&](int) {
        results.drain([&](int64_t k) {
            for (int64_t tap = 0; tap < a.R * a.S; tap++)
                for (int64_t c = 0; c < a.C; c++) {
                    const int64_t pair = c / DEPTH * f.grad_blocks + k / DEPTH;
                    a.grad_weight[(k * a.R * a.S + tap) * a.C + c] =
                        f.sums[(pair * a.R * a.S + tap) * TAP_SUMS + c % DEPTH / TILE * 512 +
                               k % DEPTH / TILE * 256 + c % TILE * TILE + k % TILE];
                }
        });
    });
}

}  // namespace miue
