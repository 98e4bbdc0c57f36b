// Which instruction set is in use.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "../check.h"
#include "kernels.h"

namespace miue {
namespace {

struct Level {
    const Kernels* kernels;
    bool runs_here;
};

const Level* find(const char* name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
    const bool has_avx512 =
        has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    static const Level levels[] = {
        {&avx512_kernels, has_avx512}, {&avx2_kernels, has_avx2}, {&generic_kernels, true}};
#else
    static const Level levels[] = {{&generic_kernels, true}};
#endif
    for (const Level& level : levels)
        if (name ? !std::strcmp(name, level.kernels->name) : level.runs_here) return &level;
    return nullptr;
}

const Kernels* choose(const char* argument, const char* name) {
    const Level* level = find(name);
    const std::string got = name ? std::string("'") + name + "'" : "none";
    require(level, "cpu_level", argument,
            "one of generic, avx2, avx512 (generic only where the processor is not x86-64)", got);
    require(level->runs_here, "cpu_level", argument,
            std::string("a level this processor has (best: ") + find(nullptr)->kernels->name + ")",
            got);
    return level->kernels;
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

const Kernels& kernels() {
    const Kernels* now = current.load(std::memory_order_acquire);
    if (!now) {
        now = choose("MIUE_CPU_LEVEL", std::getenv("MIUE_CPU_LEVEL"));
        current.store(now, std::memory_order_release);
    }
    return *now;
}

const char* cpu_level() { return kernels().name; }

void set_cpu_level(const char* name) {
    current.store(choose("level", name), std::memory_order_release);
}

}  // namespace miue
