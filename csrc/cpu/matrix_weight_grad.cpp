// The weight gradient of a convolution of bf16 values on matrix tiles: sums over images, whose pixels are laid out as factors first.
// The order of a sum, image by image and row by row, depends on the convolution and the batch alone.
#include <algorithm>
#include <cstring>

#include "arena.h"
#include "matrix.h"
#include "parallel.h"

namespace miue {
namespace {

// The pixels of some images, 32 channels of 32 images each, as factors of sums over images.
struct Factors {
    int64_t together, rounds, x_blocks, grad_blocks;  // groups of images at a time
    uint16_t *x, *grad;                               // [group][block][row][column][2 * SIDE]
    float* sums;                                      // [block of x][block of grad][tap]

    Factors(Arena& arena, const MatrixConvShape& a) {
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

// Whose factors stay in the level-1 cache while a row's taps take their turns.
constexpr int64_t PIXELS = 4;

// One row of one block of a group: to [column][2 * SIDE].
void factor_row(void (*make)(const uint16_t*, int64_t, int64_t, int64_t, uint16_t*),
                const uint16_t* from, int64_t image, int64_t images, int64_t row, int64_t height,
                int64_t width, int64_t channel, int64_t channels, uint16_t* to) {
    from += ((image * height + row) * width) * channels + channel;
    for (int64_t w = 0; w < width; w++)
        make(from + w * channels, height * width * channels, images,
             at_most(channels - channel, DEPTH), to + w * 2 * SIDE);
}

// Where the work on a weight gradient looks.
struct Plan {
    const Factors& f;
    const MatrixKernels& kernels;
    std::vector<int64_t> rows, columns;  // tap_sources()
};

// The sums of the taps in row r for a block of channels and a block of results, over `groups` groups of images.
void tap_sums(const MatrixConvShape& a, const Plan& plan, int64_t groups, int64_t c, int64_t k,
              int64_t r, float* sums) {
    const Factors& f = plan.f;
    for (int64_t group = 0; group < groups; group++)
        for (int64_t p = 0; p < a.P; p++) {
            const int64_t row = plan.rows[p * a.R + r];
            if (row < 0) continue;
            const uint16_t* x = f.x + ((group * f.x_blocks + c) * a.H + row) * a.W * 2 * SIDE;
            const uint16_t* grad =
                f.grad + ((group * f.grad_blocks + k) * a.P + p) * a.Q * 2 * SIDE;
            for (int64_t q0 = 0; q0 < a.Q; q0 += PIXELS)
                for (int64_t s = 0; s < a.S; s++) {
                    const uint16_t *left[PIXELS], *right[PIXELS];
                    int64_t count = 0;
                    for (int64_t q = q0; q < at_most(a.Q, q0 + PIXELS); q++)
                        if (const int64_t column = plan.columns[q * a.S + s]; column >= 0)
                            left[count] = x + column * 2 * SIDE,
                            right[count++] = grad + q * 2 * SIDE;
                    if (count) plan.kernels.outer(left, right, count, sums + s * TAP_SUMS);
                }
        }
}

}  // namespace

int64_t matrix_weight_grad_workspace_cpu(const MatrixConvShape& args) {
    Arena arena(nullptr);
    Factors(arena, args);
    return arena.used();
}

void matrix_weight_grad_cpu(const MatrixWeightGradArgs& a, int threads) {
    const MatrixKernels& kernels = matrix_kernels("matrix_weight_grad", a.plain);
    Arena arena(a.workspace);
    const Factors f(arena, a);
    const Plan plan{f, kernels, tap_sources(a, 0), tap_sources(a, 1)};
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
                tap_sums(a, plan, groups, pair / f.grad_blocks, pair % f.grad_blocks, job % a.R,
                         f.sums + job * row_taps);
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
