// Within-class distance: rows sorted by class, then blocks of rows against their own class. Where
// all distances fit they are computed once per pair; else every block computes its own, once for
// the sums and once for the gradient.
#include <cmath>
#include <limits>

#include "arena.h"
#include "kernels.h"
#include "labels.h"
#include "parallel.h"

namespace miue {
namespace {

constexpr int64_t KEEP = 16 << 20;  // bytes of distances
constexpr int64_t RUN = 512;        // distances per row held at a time where they are not kept
constexpr int64_t MAX_WORKERS = 64;
constexpr int64_t MAX_BLOCK = 4, MAX_LANES = 16;
constexpr int64_t ALONE = 1 << 20;  // subtractions below which a second thread does not pay

struct Block {
    int64_t row, rows, begin, end, distances;  // its class is rows [begin, end) of the sorted batch
};

template <class T>
struct Plan {
    int64_t B, D, stride, capacity, workers;
    int64_t *classes, *table, *starts, *order;
    Block* blocks;
    T *features, *kept, *held, *grads;
    double *row_loss, *share;
};

template <class T>
int64_t lay_out(Plan<T>& plan, int64_t B, int64_t D, bool want_grad, void* base) {
    Arena arena(base);
    plan.B = B;
    plan.D = D;
    plan.stride = (D + MAX_LANES - 1) / MAX_LANES * MAX_LANES;
    plan.capacity = at_most(B * B, KEEP / int64_t(sizeof(T)));
    plan.workers = at_most(MAX_WORKERS, B);
    plan.classes = arena.take<int64_t>(B);
    plan.table = arena.take<int64_t>(label_slots(B));
    plan.starts = arena.take<int64_t>(B + 1);
    plan.order = arena.take<int64_t>(B);
    plan.blocks = arena.take<Block>(B);
    plan.features = arena.take<T>(B * plan.stride);
    plan.share = arena.take<double>(B);
    plan.kept = arena.take<T>(plan.capacity);
    plan.held = arena.take<T>(plan.workers * MAX_BLOCK * RUN);
    plan.grads = arena.take<T>(want_grad ? plan.workers * MAX_BLOCK * plan.stride : 0);
    plan.row_loss = arena.take<double>(B);
    return arena.used();
}

// Stable counting sort by class; returns the number of blocks and, through `pairs`, the sum of
// squared class sizes.
template <class T>
int64_t sort(Plan<T>& plan, const int64_t* labels, int64_t size, int64_t& pairs) {
    const int64_t count = number_classes(labels, plan.B, plan.classes, plan.table);
    for (int64_t c = 0; c <= count; c++) plan.starts[c] = 0;
    for (int64_t i = 0; i < plan.B; i++) plan.starts[plan.classes[i] + 1]++;
    for (int64_t c = 0; c < count; c++) plan.starts[c + 1] += plan.starts[c];
    int64_t* next = plan.table;  // free again
    for (int64_t c = 0; c < count; c++) next[c] = plan.starts[c];
    for (int64_t i = 0; i < plan.B; i++) plan.order[next[plan.classes[i]]++] = i;
    int64_t blocks = 0;
    pairs = 0;
    for (int64_t c = 0; c < count; c++) {
        const int64_t begin = plan.starts[c], end = plan.starts[c + 1];
        for (int64_t row = begin; row < end; row += size)
            plan.blocks[blocks++] = {row, at_most(size, end - row), begin, end,
                                     pairs + (row - begin) * (end - begin)};
        pairs += (end - begin) * (end - begin);
    }
    return blocks;
}

template <class T>
void run(const IntraClassDistanceArgs& args, int threads) {
    const LossKernels<T>& kernel = loss_kernels<T>(kernels());
    Plan<T> plan;
    lay_out(plan, args.B, args.D, args.grad != nullptr, args.workspace);
    int64_t pairs;
    const int64_t blocks = sort(plan, args.labels, kernel.block, pairs), stride = plan.stride;
    const bool kept = pairs <= plan.capacity;
    const double scale = args.normalize_dim && args.D ? 1 / double(args.D) : 1;
    const int64_t in_size = args.dtype == DType::f64 ? 8 : args.dtype == DType::f32 ? 4 : 2;

    const auto set_share = [&](int64_t i, double sum) {
        plan.row_loss[plan.order[i]] = std::log1p(scale * sum);
        plan.share[i] = 1 / (1 + scale * sum);
    };
    Queue copy(args.B), measure(blocks), add(kept ? blocks : 0), gradient(args.grad ? blocks : 0);
    const bool alone = double(pairs) * double(args.D) < ALONE;
    parallel(alone ? 1 : at_most(threads, plan.workers), [&](int thread) {
        T* held = plan.held + thread * MAX_BLOCK * RUN;
        copy.drain([&](int64_t i) {
            T* row = plan.features + i * stride;
            kernel.convert(
                row,
                static_cast<const char*>(args.features) + plan.order[i] * args.row_stride * in_size,
                args.dtype, args.D);
            for (int64_t k = args.D; k < stride; k++) row[k] = 0;
        });
        wait_for_all();
        measure.drain([&](int64_t at) {
            const Block& block = plan.blocks[at];
            const int64_t width = block.end - block.begin;
            if (kept) {
                T* own = plan.kept + block.distances;
                kernel.distances(plan.features, stride, stride, block.row, block.rows, block.row,
                                 block.end - block.row, own + (block.row - block.begin), width);
                // the class's first row
                T* mirror = plan.kept + block.distances - (block.row - block.begin) * width;
                for (int64_t r = 0; r < block.rows; r++)
                    for (int64_t j = block.row - block.begin + block.rows; j < width; j++)
                        mirror[j * width + block.row - block.begin + r] = own[r * width + j];
                return;
            }
            double total[MAX_BLOCK] = {};
            for (int64_t from = block.begin; from < block.end; from += RUN) {
                const int64_t count = at_most(RUN, block.end - from);
                kernel.distances(plan.features, stride, stride, block.row, block.rows, from, count,
                                 held, RUN);
                for (int64_t r = 0; r < block.rows; r++)
                    total[r] += kernel.sum(held + r * RUN, count);
            }
            for (int64_t r = 0; r < block.rows; r++) set_share(block.row + r, total[r]);
        });
        wait_for_all();
        add.drain([&](int64_t at) {
            const Block& block = plan.blocks[at];
            const int64_t width = block.end - block.begin;
            for (int64_t r = 0; r < block.rows; r++)
                set_share(block.row + r,
                          kernel.sum(plan.kept + block.distances + r * width, width));
        });
        wait_for_all();
        gradient.drain([&](int64_t at) {
            const Block& block = plan.blocks[at];
            T* grad = plan.grads + thread * MAX_BLOCK * stride;
            for (int64_t k = 0; k < kernel.block * stride; k++) grad[k] = 0;
            for (int64_t from = block.begin; from < block.end; from += RUN) {
                const int64_t count = at_most(RUN, block.end - from);
                T* weights = kept ? plan.kept + block.distances + (from - block.begin) : held;
                const int64_t ld = kept ? block.end - block.begin : RUN;
                if (!kept)
                    kernel.distances(plan.features, stride, stride, block.row, block.rows, from,
                                     count, held, RUN);
                kernel.pull(plan.features, stride, plan.share, block.row, block.rows, from, count,
                            weights, ld, grad);
            }
            for (int64_t r = 0; r < block.rows; r++) {
                const int64_t out = plan.order[block.row + r] * args.D;
                kernel.finish(
                    static_cast<T*>(args.grad) + out, grad + r * stride,
                    args.addend_grad ? static_cast<const T*>(args.addend_grad) + out : nullptr,
                    T(args.weight), plan.share[block.row + r] * (scale / double(args.B)), args.D);
            }
        });
    });

    double total = 0;
    for (int64_t i = 0; i < args.B; i++) total += plan.row_loss[i];
    const double mean = args.B ? total / double(args.B) : std::numeric_limits<double>::quiet_NaN();
    const double addend = args.addend_loss ? double(*static_cast<const T*>(args.addend_loss)) : 0;
    *static_cast<T*>(args.loss) = T(addend + args.weight * mean);
}

}  // namespace

int64_t intra_class_distance_workspace_cpu(int64_t B, int64_t D, DType dtype, bool want_grad) {
    Plan<float> single;
    Plan<double> twice;
    return dtype == DType::f64 ? lay_out(twice, B, D, want_grad, nullptr)
                               : lay_out(single, B, D, want_grad, nullptr);
}

void intra_class_distance_cpu(const IntraClassDistanceArgs& args, int threads) {
    args.dtype == DType::f64 ? run<double>(args, threads) : run<float>(args, threads);
}

}  // namespace miue
