// Batch norm in training: sums over blocks of rows, then the result, block by block. Blocks do not
// depend on the number of threads, so neither do the bits.
#include <cmath>

#include "arena.h"
#include "kernels.h"
#include "parallel.h"

namespace miue {
namespace {

constexpr int64_t BLOCK = 512;  // rows

struct Room {
    double* sums;  // [block][2][channels]
    float *centre, *scale, *shift, *slope, *rest;
    int64_t bytes;
    Room(void* base, int64_t rows, int64_t channels) {
        Arena arena(base);
        sums = arena.take<double>((rows + BLOCK - 1) / BLOCK * 2 * channels);
        for (float** each : {&centre, &scale, &shift, &slope, &rest})
            *each = arena.take<float>(channels);
        bytes = arena.used();
    }
};

// What the kernels multiply with and add, where there is a weight and a bias.
void affine(const BatchNormArgs& t, const Room& room, int64_t c) {
    room.scale[c] = t.inverse[c] * (t.weight ? t.weight[c] : 1.0f);
    room.shift[c] = t.bias ? t.bias[c] : 0.0f;
}

// The sums, finish(c, sum, second sum) for every channel, then the result.
template <class Finish>
void two_passes(const BatchNormJob& job, double* sums, int threads, const Finish& finish) {
    const auto& kernels = miue::kernels();
    const int64_t blocks = (job.rows + BLOCK - 1) / BLOCK, C = job.channels;
    Queue first(blocks), second(blocks);
    parallel(at_most(threads, blocks), [&](int thread) {
        first.drain([&](int64_t b) {
            kernels.batch_norm_sums(job, b * BLOCK, at_most(job.rows, (b + 1) * BLOCK),
                                    sums + b * 2 * C);
        });
        wait_for_all();
        if (!thread)
            for (int64_t c = 0; c < C; c++) {
                double one = 0, two = 0;
                for (int64_t b = 0; b < blocks; b++)
                    one += sums[b * 2 * C + c], two += sums[(b * 2 + 1) * C + c];
                finish(c, one, two);
            }
        wait_for_all();
        second.drain([&](int64_t b) {
            kernels.batch_norm_out(job, b * BLOCK, at_most(job.rows, (b + 1) * BLOCK));
        });
    });
}

}  // namespace

int64_t batch_norm_workspace_cpu(int64_t rows, int64_t channels) {
    return Room(nullptr, rows, channels).bytes;
}

void batch_norm_cpu(const BatchNormArgs& t, int threads) {
    const Room room(t.workspace, t.rows, t.channels);
    const double rows = double(t.rows);
    // The sums are those of x less its first row, whose size they do not depend on.
    kernels().f32.convert(room.centre, t.x, t.dtype, t.channels);
    const BatchNormJob job{t.x,   nullptr,     t.out,      t.dtype,    t.rows,  t.channels,
                           false, room.centre, room.scale, room.shift, nullptr, nullptr};
    two_passes(job, room.sums, threads, [&](int64_t c, double sum, double squares) {
        const double far = sum / rows, difference = squares / rows - far * far;
        const double variance = difference < 0 ? 0 : difference;  // NaN stays
        t.mean[c] = float(room.centre[c] + far), t.variance[c] = float(variance);
        t.inverse[c] = float(1 / std::sqrt(variance + t.eps));
        room.centre[c] = t.mean[c];
        affine(t, room, c);
    });
}

void batch_norm_grad_cpu(const BatchNormArgs& t, int threads) {
    const Room room(t.workspace, t.rows, t.channels);
    const double rows = double(t.rows);
    for (int64_t c = 0; c < t.channels; c++) affine(t, room, c);
    const BatchNormJob job{t.x,    t.grad, t.out,      t.dtype,    t.rows,     t.channels,
                           t.relu, t.mean, room.scale, room.shift, room.slope, room.rest};
    two_passes(job, room.sums, threads, [&](int64_t c, double sum, double product) {
        const double scale = room.scale[c], inverse = t.inverse[c];
        room.slope[c] = float(-scale * inverse * inverse * product / rows);
        room.rest[c] = float(-scale * sum / rows);
        t.grad_weight[c] = float(product * inverse), t.grad_bias[c] = float(sum);
    });
}

}  // namespace miue
