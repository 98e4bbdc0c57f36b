#include <atomic>

#include "kernels.h"
#include "pixels.h"

namespace miue {

void projected_step_cpu(const ProjectedStepArgs& args, int threads) {
    constexpr int64_t UNIT = 16384;
    const int64_t units = (args.n + UNIT - 1) / UNIT;
    const auto step = kernels().step;
    Queue queue(units);
    parallel(at_most(threads, units), [&](int) {
        queue.drain([&](int64_t u) { step(args, u * UNIT, at_most(args.n, (u + 1) * UNIT)); });
    });
}

void projected_step_inplace_cpu(const ProjectedStepInplaceArgs& args, int threads) {
    check_index("projected_step_", args.index, args.B, args.N);
    const auto step = kernels().step_inplace;
    std::atomic<int64_t> nonfinite{0};  // integers: the sum does not depend on the order
    over_pixels(args.B, args.C, args.H * args.W, threads, [&](int64_t b, int64_t from, int64_t to) {
        const int64_t found = step(args, b, from, to);
        if (found) nonfinite.fetch_add(found, std::memory_order_relaxed);
    });
    if (args.nonfinite) *args.nonfinite += nonfinite.load();
}

}  // namespace miue
