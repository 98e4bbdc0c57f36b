// The only place that knows OpenMP. Kernels do not throw, so nothing can leave a parallel region.
#pragma once
#include <omp.h>

#include <atomic>
#include <cstdint>

namespace miue {

// Runs body(thread number) on at most `threads` threads; the work is divided by queues, never by
// the number of threads.
template <class Body>
void parallel(int64_t threads, const Body& body) {
    if (threads <= 1) {
        body(0);
        return;
    }
#pragma omp parallel num_threads(static_cast<int>(threads))
    body(omp_get_thread_num());
}

inline void wait_for_all() {
#pragma omp barrier
}

// Hands out 0 .. count-1, each once.
class Queue {
  public:
    explicit Queue(int64_t count) : count_(count) {}
    template <class Work>
    void drain(const Work& work) {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) work(i);
    }

  private:
    std::atomic<int64_t> next_{0};
    const int64_t count_;
};

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace miue
