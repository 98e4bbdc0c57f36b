// NT-Xent: pack unit rows, similarities, row sums, gradient; one parallel region, panels of rows as
// units of work. Small batches keep the symmetric similarity matrix (half of it computed); large
// ones recompute it slice by slice.
#include <atomic>
#include <limits>

#include "arena.h"
#include "kernels.h"
#include "labels.h"
#include "parallel.h"

namespace miue {
namespace {

constexpr int64_t KEEP = 26 << 20;  // bytes of S
constexpr int64_t MAX_WORKERS = 64;
// multiply-adds per product below which a second thread does not pay
constexpr double ALONE = 1 << 20;
// ... up to which doubles cost nothing that matters: rounding of s is amplified 1/t times
constexpr double PRECISE = 1 << 21;

bool in_double(int64_t B, int64_t D, DType dtype) {
    return dtype == DType::f64 || double(B) * double(B) * double(D) <= PRECISE;
}

int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class T>
struct Plan {
    NtXentJob<T> job{};
    T *ids, *slices, *grads;
    int64_t *classes, *table;
    int64_t workers, slice_size, grad_size;
};

// With `panel` = PAD and base = null: how much any level needs.
template <class T>
int64_t lay_out(Plan<T>& plan, int64_t B, int64_t D, bool want_grad, int64_t panel, void* base) {
    NtXentJob<T>& job = plan.job;
    const int64_t rows = padded(B, PAD), width = padded(D, PAD);
    job.B = B;
    job.D = D;
    job.panels = padded(B, panel) / panel;
    job.width_padded = padded(D, panel);
    job.kept = rows * rows * int64_t(sizeof(T)) <= KEEP;
    Arena arena(base);
    plan.ids = arena.take<T>(rows);
    job.ids = plan.ids;
    job.norm = arena.take<T>(rows);
    job.own = arena.take<T>(rows);
    job.top = arena.take<T>(rows);
    job.same_weight = arena.take<T>(rows);
    job.other_weight = arena.take<T>(rows);
    job.row_loss = arena.take<double>(rows);
    plan.classes = arena.take<int64_t>(B);
    plan.table = arena.take<int64_t>(label_slots(B));
    job.columns = arena.take<T>(rows * width);
    job.rows = arena.take<T>(rows * width);
    job.similarity = arena.take<T>(job.kept ? rows * rows : 0);
    plan.workers = at_most(MAX_WORKERS, (B + PAD - 1) / PAD);
    plan.slice_size = job.kept ? 0 : SLICE * PAD;
    plan.grad_size = want_grad ? PAD * width : 0;
    plan.slices = arena.take<T>(plan.workers * plan.slice_size);
    plan.grads = arena.take<T>(plan.workers * plan.grad_size);
    return arena.used();
}

template <class T>
void run(const NtXentArgs& args, int threads) {
    const LossKernels<T>& kernel = loss_kernels<T>(kernels());
    Plan<T> plan;
    lay_out(plan, args.B, args.D, args.grad != nullptr, kernel.panel, args.workspace);
    NtXentJob<T>& job = plan.job;
    job.args = &args;
    number_classes(args.labels, args.B, plan.classes, plan.table);
    for (int64_t i = 0; i < job.panels * kernel.panel; i++)
        plan.ids[i] = i < args.B ? T(plan.classes[i]) : T(-1);

    const bool alone = double(args.B) * double(args.B) * double(args.D) < ALONE;
    const int64_t pairs = job.kept ? job.panels * (job.panels + 1) / 2 : 0;
    Queue pack(job.panels), multiply(pairs), sum(job.panels), gradient(args.grad ? job.panels : 0);
    std::atomic<bool> all_unit{true};
    parallel(alone ? 1 : at_most(threads, plan.workers), [&](int thread) {
        pack.drain([&](int64_t p) {
            if (!kernel.pack(job, p)) all_unit.store(false, std::memory_order_relaxed);
        });
        wait_for_all();
        NtXentJob<T> mine = job;
        mine.uniform = all_unit.load(std::memory_order_relaxed) && !args.negatives;
        // pairs are numbered (0,0) (0,1) (1,1) (0,2) ...; a thread's numbers only grow
        int64_t q = 0, first = 0;
        multiply.drain([&](int64_t pair) {
            while (pair > first + q) first += ++q;
            kernel.similarity(mine, pair - first, q);
        });
        wait_for_all();
        T* slice = plan.slices + thread * plan.slice_size;
        sum.drain([&](int64_t p) { kernel.sums(mine, p, slice); });
        wait_for_all();
        gradient.drain([&](int64_t p) {
            kernel.gradient(mine, p, slice, plan.grads + thread * plan.grad_size);
        });
    });

    double total = 0;
    for (int64_t i = 0; i < args.B; i++) total += job.row_loss[i];
    const double loss = args.B ? total / double(args.B) : std::numeric_limits<double>::quiet_NaN();
    if (args.dtype == DType::f64)
        *static_cast<double*>(args.loss) = loss;
    else
        *static_cast<float*>(args.loss) = float(loss);
}

}  // namespace

int64_t nt_xent_workspace_cpu(int64_t B, int64_t D, DType dtype, bool want_grad) {
    Plan<float> single;
    Plan<double> twice;
    return in_double(B, D, dtype) ? lay_out(twice, B, D, want_grad, PAD, nullptr)
                                  : lay_out(single, B, D, want_grad, PAD, nullptr);
}

void nt_xent_cpu(const NtXentArgs& args, int threads) {
    in_double(args.B, args.D, args.dtype) ? run<double>(args, threads) : run<float>(args, threads);
}

}  // namespace miue
