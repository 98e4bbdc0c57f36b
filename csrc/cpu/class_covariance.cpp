// Class covariance: rows sorted by class; then, for some classes at a time, centred panels and
// their products.
#include "arena.h"
#include "kernels.h"
#include "parallel.h"

namespace miue {
namespace {

constexpr int64_t WINDOW = 4 << 20;  // bytes of centred rows at a time, unless one class has more
constexpr double ALONE = 1 << 20;    // multiply-adds below which a second thread does not pay

template <class T>
struct Plan {
    int64_t *starts, *next, *order;
    T* centred;
};

template <class T>
int64_t lay_out(Plan<T>& plan, int64_t B, int64_t D, int64_t K, void* base) {
    Arena arena(base);
    plan.starts = arena.take<int64_t>(K + 1);
    plan.next = arena.take<int64_t>(K);
    plan.order = arena.take<int64_t>(B);
    // only what one window needs is touched
    plan.centred = arena.take<T>(B * ((D + PAD - 1) / PAD * PAD));
    return arena.used();
}

// Stable counting sort.
template <class T>
void sort(const Plan<T>& plan, const ClassCovarianceArgs& args) {
    const auto known = [&](int64_t label) { return label >= 0 && label < args.K; };
    for (int64_t k = 0; k < args.K; k++) args.counts[k] = 0;
    for (int64_t i = 0; i < args.B; i++)
        if (known(args.labels[i])) args.counts[args.labels[i]]++;
    plan.starts[0] = 0;
    for (int64_t k = 0; k < args.K; k++) {
        plan.next[k] = plan.starts[k];
        plan.starts[k + 1] = plan.starts[k] + args.counts[k];
    }
    for (int64_t i = 0; i < args.B; i++)
        if (known(args.labels[i])) plan.order[plan.next[args.labels[i]]++] = i;
}

template <class T>
void run(const ClassCovarianceArgs& args, int threads) {
    const LossKernels<T>& kernel = loss_kernels<T>(kernels());
    Plan<T> plan;
    lay_out(plan, args.B, args.D, args.K, args.workspace);
    sort(plan, args);
    const int64_t panels = (args.D + kernel.panel - 1) / kernel.panel,
                  pairs = panels * (panels + 1) / 2;
    const int64_t rows_at_a_time =
        panels ? WINDOW / (panels * kernel.panel * int64_t(sizeof(T))) : 0;
    const bool alone = double(args.B) * double(args.D) * double(args.D) < ALONE;
    for (int64_t first = 0, last; first < args.K; first = last) {
        const int64_t begin = plan.starts[first];
        for (last = first + 1; last < args.K && plan.starts[last + 1] - begin <= rows_at_a_time;
             last++) {
        }
        const CovarianceJob<T> job{
            &args, plan.starts, plan.order, begin, plan.starts[last] - begin, plan.centred};
        Queue centre((last - first) * panels), multiply((last - first) * pairs);
        parallel(alone ? 1 : threads, [&](int) {
            centre.drain([&](int64_t i) { kernel.centre(job, first + i / panels, i % panels); });
            wait_for_all();
            multiply.drain([&](int64_t i) {
                int64_t p = i % pairs, q = 0;  // pairs are numbered (0,0) (0,1) (1,1) (0,2) ...
                while (p > q) p -= ++q;
                kernel.covariance(job, first + i / pairs, p, q);
            });
        });
    }
}

}  // namespace

int64_t class_covariance_workspace_cpu(int64_t B, int64_t D, DType dtype, int64_t K) {
    Plan<float> single;
    Plan<double> twice;
    return dtype == DType::f64 ? lay_out(twice, B, D, K, nullptr)
                               : lay_out(single, B, D, K, nullptr);
}

void class_covariance_cpu(const ClassCovarianceArgs& args, int threads) {
    args.dtype == DType::f64 ? run<double>(args, threads) : run<float>(args, threads);
}

}  // namespace miue
