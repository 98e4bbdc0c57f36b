// The convolutions of a frozen network: weights are transformed and packed once, see tiles.h.
#include <array>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "../check.h"
#include "arena.h"
#include "kernels.h"
#include "parallel.h"

namespace miue {
namespace {

int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Rows of Vandermonde matrices for filters: (1, p, p^2, ..) / prod (p - other points), and infinity.
template <size_t TAPS, size_t POINTS>
std::array<std::array<double, TAPS>, POINTS + 1> filter_transform(const double (&points)[POINTS]) {
    std::array<std::array<double, TAPS>, POINTS + 1> g{};
    for (size_t i = 0; i < POINTS; i++) {
        double divisor = 1, power = 1;
        for (size_t j = 0; j < POINTS; j++)
            if (j != i) divisor *= points[i] - points[j];
        for (size_t t = 0; t < TAPS; t++, power *= points[i]) g[i][t] = power / divisor;
    }
    g[POINTS][TAPS - 1] = 1;
    return g;
}

// [products][taps] of one dimension.
std::vector<std::array<double, 3>> filter_rows(ConvFamily family) {
    std::vector<std::array<double, 3>> rows;
    const double a = std::sqrt(0.5), b = std::sqrt(2.0);
    switch (family) {
        case ConvFamily::three4:
            for (const auto& g : filter_transform<3>({0., a, -a, b, -b})) rows.push_back(g);
            break;
        case ConvFamily::three2: rows = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}}; break;
        case ConvFamily::strided:
            for (const auto& g : filter_transform<2>({.5, -.5, 1.25, -1.25}))
                rows.push_back({g[0], 0, g[1]});
            rows.insert(rows.end(), 4, {0, 1, 0});
            break;
        case ConvFamily::strided_back:
            for (const auto& g : filter_transform<2>({.5, -.5, 1.25, -1.25}))
                rows.push_back({g[1], 0, g[0]});
            rows.insert(rows.end(), 4, {0, 1, 0});
            break;
        default: rows = {{1, 0, 0}};
    }
    return rows;
}

int64_t taps_of(ConvFamily family) { return family < ConvFamily::one ? 3 : 1; }
bool goes_back(ConvFamily family) {
    return family == ConvFamily::strided_back || family == ConvFamily::one_back;
}

// How the work of a convolution is divided; nothing in it depends on the number of threads.
struct Division {
    const TileKernels& kernels;
    const TileFamily& family;
    int64_t products, panel, rows, panels, group_panels, groups, block, tiles_h, tiles_w, tiles,
        blocks, depth, in_step, out_step;

    Division(ConvFamily which, int64_t B, int64_t P, int64_t Q, int64_t C, int64_t K)
        : kernels(miue::kernels().tiles), family(kernels.families[int(which)]) {
        products = family.products * family.products;
        panel = K <= kernels.lanes ? kernels.lanes : kernels.lanes * kernels.vectors;
        panels = (K + panel - 1) / panel;
        group_panels = at_most(panels, 64 / panel);
        groups = (panels + group_panels - 1) / group_panels;
        tiles_h = (P + family.results - 1) / family.results,
        tiles_w = (Q + family.results - 1) / family.results;
        tiles = B * tiles_h * tiles_w;
        rows = kernels.rows * (panel == kernels.lanes ? kernels.vectors : 1);
        const int64_t wished = products > 1 && C < 256 ? 32 : 64;
        block = rounded_up(at_most(tiles, wished), rows);
        blocks = tiles ? (tiles + block - 1) / block : 0;
        depth = rounded_up(C, kernels.lanes);
        in_step =
            block * depth + 16;  // 64 bytes more: powers of two would meet in the same cache sets
        out_step = block * group_panels * panel + 16;
    }
    int64_t in_values() const { return rounded_up(products * in_step, 1024); }
    int64_t out_values() const { return rounded_up(products * out_step, 1024); }
    // Few blocks: all threads share a block's input and divide the result's channels, so that each reads its part of the weights once.
    bool shared(int64_t threads) const {
        return threads > 1 && blocks < 2 * threads && groups >= threads;
    }
};

}  // namespace

int64_t packed_weights_floats_cpu(ConvFamily family, int64_t C, int64_t K) {
    const Division d(family, 1, 1, 1, C, K);
    return d.products * d.panels * d.panel * C;
}

void pack_weights_cpu(const PackWeightsArgs& a, int threads) {
    const Division d(a.family, 1, 1, 1, a.C, a.K);
    const auto rows = filter_rows(a.family);
    // For an input gradient the weights are the forward's [C][K][taps][taps], and those at stride 1 meet them back to front.
    const bool flip = a.back && !goes_back(a.family);
    PackJob job{
        a.weight, a.stride[a.back ? 1 : 0], a.stride[a.back ? 0 : 1], a.stride[2], a.stride[3],
        a.C,      taps_of(a.family),        int64_t(rows.size()),     {},          d.panel};
    if (flip) {
        job.weight += (job.taps - 1) * (job.row_stride + job.column_stride);
        job.row_stride = -job.row_stride, job.column_stride = -job.column_stride;
    }
    for (size_t x = 0; x < rows.size(); x++)
        for (int t = 0; t < 3; t++) job.transform[x][t] = rows[x][t];
    Queue queue(d.panels);
    parallel(at_most(threads, d.panels), [&](int) {
        queue.drain([&](int64_t p) {
            const int64_t group = p / d.group_panels,
                          in_group = at_most(d.panels - group * d.group_panels, d.group_panels);
            float* to = a.packed +
                        (group * d.group_panels * d.products + p % d.group_panels) * a.C * d.panel;
            d.kernels.pack(job, p * d.panel, at_most(d.panel, a.K - p * d.panel), to,
                           in_group * a.C * d.panel);
        });
    });
}

int64_t packed_conv_workspace_cpu(ConvFamily family, int64_t B, int64_t P, int64_t Q, int64_t C,
                                  int64_t K, int threads) {
    const Division d(family, B, P, Q, C, K);
    const int64_t count = at_most(threads, d.shared(threads) ? d.groups : d.blocks);
    return 4 * ((d.shared(threads) ? 1 : count) * d.in_values() + count * d.out_values());
}

void packed_conv_cpu(const PackedConvArgs& args, int threads) {
    const Division d(args.family, args.B, args.P, args.Q, args.C, args.K);
    if (!d.tiles) return;
    const bool epilogue = args.residual || args.relu || args.mask_in,
               fused = d.kernels.fused && args.K % d.kernels.lanes == 0;
    const int64_t count = args.B * args.P * args.Q * args.K;
    TileJob job{args.x,
                args.bias,
                args.residual,
                args.y,
                args.relu,
                args.mask_out,
                args.mask_in,
                args.B,
                args.H,
                args.W,
                args.C,
                args.P,
                args.Q,
                args.K,
                d.tiles_h,
                d.tiles_w,
                d.block,
                d.panel,
                d.group_panels * d.panel,
                d.depth,
                d.in_step,
                d.out_step};
    if (epilogue && !fused)
        job.bias = job.residual = nullptr, job.relu = false, job.mask_out = nullptr,
        job.mask_in = nullptr;
    if (job.mask_out) std::memset(args.mask_out + count / 8, 0, (count + 63) / 64 * 8 - count / 8);

    float* space = static_cast<float*>(args.workspace);
    const auto transformed = [&](int64_t block, int64_t from, int64_t to, float* in) {
        d.family.in(job, block * d.block + from, to - from, in + from * d.depth);
    };
    const auto results = [&](int64_t block, int64_t group, const float* in, float* out,
                             Ahead& ahead) {
        const int64_t first = block * d.block, tiles = at_most(d.tiles - first, d.block);
        const int64_t panels = at_most(d.panels - group * d.group_panels, d.group_panels),
                      channel = group * job.group;
        const float* weights = args.packed + group * d.group_panels * d.products * args.C * d.panel;
        d.kernels.products(job, d.products, tiles, panels, in, weights, out, ahead);
        d.family.out(job, first, tiles, channel, at_most(args.K - channel, panels * d.panel), out);
    };
    // The rows of the last register tile that no tile fills are computed too, and read by nobody.
    const auto empty_rows = [&](int64_t tiles, float* in) {
        const int64_t all = rounded_up(tiles, d.rows);
        for (int64_t x = 0; x < d.products && all > tiles; x++)
            std::memset(in + x * d.in_step + tiles * d.depth, 0,
                        size_t((all - tiles) * d.depth * 4));
    };

    if (d.shared(threads)) {
        const int64_t team = at_most(threads, d.groups);
        for (int64_t block = 0; block < d.blocks; block++) {
            const int64_t tiles = at_most(d.tiles - block * d.block, d.block);
            empty_rows(tiles, space);
            Queue inputs((tiles + 3) / 4), groups(d.groups);
            parallel(team, [&](int me) {
                inputs.drain([&](int64_t i) {
                    transformed(block, 4 * i, at_most(tiles, 4 * i + 4), space);
                });
                wait_for_all();
                Ahead nothing;
                groups.drain([&](int64_t g) {
                    results(block, g, space, space + d.in_values() + me * d.out_values(), nothing);
                });
            });
        }
    } else {
        Queue blocks(d.blocks);
        parallel(at_most(threads, d.blocks), [&](int me) {
            float *in = space + me * (d.in_values() + d.out_values()), *out = in + d.in_values();
            blocks.drain([&](int64_t block) {
                const int64_t first = block * d.block, tiles = at_most(d.tiles - first, d.block);
                transformed(block, 0, tiles, in);
                empty_rows(tiles, in);
                Ahead ahead;  // this block's results, and the next one's input
                const int64_t to = d.family.result_step * d.family.result_step * args.K,
                              from = d.family.input_step * d.family.input_step * args.C;
                const int64_t all = args.B * args.H * args.W * args.C,
                              next = at_most((first + d.block) * from + (1 + args.W) * args.C, all);
                const int64_t results_left = at_most(tiles * to, count - first * to);
                ahead.range(args.y + first * to, 4 * results_left);
                ahead.range(job.residual ? job.residual + first * to : nullptr, 4 * results_left);
                ahead.range(args.x + next, 4 * at_most(tiles * from, all - next));
                for (int64_t group = 0; group < d.groups; group++)
                    results(block, group, in, out, ahead);
            });
        });
    }
    if (!epilogue || fused) return;
    if (args.relu || args.bias)
        conv_epilogue_cpu(
            {args.y, DType::f32, args.bias, args.residual, args.relu, args.mask_out, args.K, count},
            threads);
    else
        conv_grad_epilogue_cpu({args.y, DType::f32, args.residual, args.mask_in, count}, threads);
}

namespace {

// Blocks of tiles whose sums are added up in their order, whatever the number of threads.
struct GradDivision {
    const TileKernels& kernels = miue::kernels().tiles;
    int64_t depth, rows, panel, panels, width, in_step, grad_step, sum_step;
    static constexpr int64_t BLOCK = 64, PRODUCTS = 36;

    GradDivision(int64_t C, int64_t K) {
        depth = rounded_up(C, kernels.lanes), rows = rounded_up(C, kernels.rows);
        panel = kernels.lanes * kernels.vectors, panels = (K + panel - 1) / panel,
        width = panels * panel;
        in_step = BLOCK * depth + 16, grad_step = BLOCK * width + 16,
        sum_step = panels * rows * panel + 16;
    }
    // A register tile may read past the last channel of the last tile: its sums are nobody's.
    int64_t values() const { return PRODUCTS * (in_step + grad_step + sum_step) + 64; }
};

}  // namespace

int64_t conv_weight_grad_workspace_cpu(int64_t C, int64_t K) {
    return 4 * GradDivision(C, K).values();
}

void conv_weight_grad_cpu(const ConvWeightGradArgs& args, int threads) {
    const GradDivision d(args.C, args.K);
    const int64_t tiles_h = (args.H + 3) / 4, tiles_w = (args.W + 3) / 4,
                  tiles = args.B * tiles_h * tiles_w;
    if (!tiles) {
        std::memset(args.grad_weight, 0, size_t(9 * args.C * args.K) * sizeof(float));
        return;
    }
    float *in = static_cast<float*>(args.workspace), *grad = in + d.PRODUCTS * d.in_step + 64,
          *sums = grad + d.PRODUCTS * d.grad_step;
    std::memset(in, 0, size_t(d.PRODUCTS * d.in_step + 64) * sizeof(float));
    const TileFamily& three4 = d.kernels.families[int(ConvFamily::three4)];
    TileJob job{};
    job.x = args.x, job.residual = args.grad, job.B = args.B, job.H = job.P = args.H,
    job.W = job.Q = args.W, job.C = args.C, job.K = args.K;
    job.tiles_h = tiles_h, job.tiles_w = tiles_w, job.group = d.width, job.depth = d.depth,
    job.in_step = d.in_step, job.out_step = d.grad_step;
    const int64_t blocks = (tiles + d.BLOCK - 1) / d.BLOCK;
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t first = block * d.BLOCK, count = at_most(tiles - first, d.BLOCK);
        Queue inputs((count + 7) / 8), products(d.PRODUCTS);
        parallel(at_most(threads, d.PRODUCTS), [&](int) {
            inputs.drain([&](int64_t i) {
                const int64_t from = 8 * i, n = at_most(count - from, 8);
                three4.in(job, first + from, n, in + from * d.depth);
                d.kernels.grad_in(job, first + from, n, grad + from * d.width);
            });
            wait_for_all();
            products.drain([&](int64_t x) {
                Ahead nothing;
                d.kernels.outer_products(job, count, in + x * d.in_step, grad + x * d.grad_step,
                                         sums + x * d.sum_step, block > 0, nothing);
            });
        });
    }
    double transform[9][3];
    const auto rows = filter_rows(ConvFamily::three4);
    for (size_t x = 0; x < rows.size(); x++)
        for (int t = 0; t < 3; t++) transform[x][t] = rows[x][t];
    Queue panels(d.panels);
    parallel(at_most(threads, d.panels), [&](int) {
        panels.drain([&](int64_t p) {
            d.kernels.weight_grad(transform, args.C, args.K, d.rows, p, sums, d.sum_step,
                                  args.grad_weight);
        });
    });
}

}  // namespace miue
