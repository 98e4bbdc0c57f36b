#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace miue {
namespace {

// work(from, to) on [0, count) in units of whole mask words.
template <class Work>
void over_words(int64_t count, int threads, const Work& work) {
    constexpr int64_t UNIT = 16384;
    const int64_t units = (count + UNIT - 1) / UNIT;
    Queue queue(units);
    parallel(at_most(threads, units), [&](int) {
        queue.drain([&](int64_t u) { work(u * UNIT, at_most(count, (u + 1) * UNIT)); });
    });
}

template <class T>
std::vector<T> repeated(const void* bias, int64_t channels) {
    std::vector<T> copy(static_cast<const T*>(bias), static_cast<const T*>(bias) + channels);
    for (int64_t c = 0; c < 63; c++) copy.push_back(copy[c]);
    return copy;
}

}  // namespace

void conv_epilogue_cpu(const ConvEpilogueArgs& args, int threads) {
    if (!args.count) return;
    ConvEpilogueArgs used = args;
    std::vector<float> floats;
    std::vector<double> doubles;
    if (args.bias && args.channels % 64) {  // else no word goes past the end
        if (args.dtype == DType::f64)
            used.bias = (doubles = repeated<double>(args.bias, args.channels)).data();
        else
            used.bias = (floats = repeated<float>(args.bias, args.channels)).data();
    }
    const auto epilogue = kernels().epilogue;
    over_words(args.count, threads, [&](int64_t from, int64_t to) { epilogue(used, from, to); });
}

void conv_grad_epilogue_cpu(const ConvGradEpilogueArgs& args, int threads) {
    if (!args.addend && !args.mask) return;
    const auto epilogue = kernels().grad_epilogue;
    over_words(args.count, threads, [&](int64_t from, int64_t to) { epilogue(args, from, to); });
}

}  // namespace miue
