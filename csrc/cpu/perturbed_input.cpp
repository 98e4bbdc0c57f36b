#include "kernels.h"
#include "pixels.h"

namespace miue {

void perturbed_input_cpu(const PerturbedInputArgs& args, int threads) {
    check_index("perturbed_input", args.index, args.B, args.N);
    const auto input = kernels().input;
    over_pixels(args.B, args.C, args.H * args.W, threads,
                [&](int64_t b, int64_t from, int64_t to) { input(args, b, from, to); });
}

}  // namespace miue
