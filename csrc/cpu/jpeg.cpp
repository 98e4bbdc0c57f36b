#include <memory>

#include "kernels.h"
#include "parallel.h"

namespace miue {
namespace {

// work(row of the batch, scratch of this thread) for every image.
template <class Args, class Work>
void over_images(const Args& args, int threads, const Work& work) {
    constexpr int64_t UNIT = 16384;
    const int64_t plane = args.H * args.W, w = (args.W + 1) / 2;
    const int64_t size = 4 * ((args.H + 1) / 2) * w + 4 * w + 4;  // what jpeg_grad needs, the more
    const int64_t images = 1 + UNIT / (3 * plane), units = (args.B + images - 1) / images;
    const int64_t used = at_most(threads, units);
    std::unique_ptr<float[]> scratch(new float[used * size]);
    Queue queue(units);
    parallel(used, [&](int thread) {
        queue.drain([&](int64_t unit) {
            for (int64_t b = unit * images; b < at_most(args.B, (unit + 1) * images); b++)
                work(b, scratch.get() + thread * size);
        });
    });
}

}  // namespace

void jpeg_round_trip_cpu(const JpegRoundTripArgs& args, int threads) {
    const auto jpeg = kernels().jpeg;
    over_images(args, threads, [&](int64_t b, float* scratch) { jpeg(args, b, scratch); });
}

void jpeg_round_trip_grad_cpu(const JpegRoundTripGradArgs& args, int threads) {
    const auto jpeg_grad = kernels().jpeg_grad;
    over_images(args, threads, [&](int64_t b, float* scratch) { jpeg_grad(args, b, scratch); });
}

}  // namespace miue
