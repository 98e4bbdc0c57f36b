// Runs every kernel once or more under a sanitizer, without Python. Buffers are exactly as large as
// ops.h says; results must repeat.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

#include "ops.h"

using namespace miue;

namespace {

int failures = 0;
uint32_t state = 1;
float uniform() { return (state = state * 1664525u + 1013904223u) / 4294967296.0f; }

int bytes_of(DType t) { return t == DType::f32 ? 4 : t == DType::f16 || t == DType::bf16 ? 2 : 1; }

std::vector<char> numbers(int64_t count, DType t, float low, float high) {
    std::vector<char> data(count * bytes_of(t));
    for (int64_t k = 0; k < count; ++k) {
        const float x = low + (high - low) * uniform();
        const uint32_t bits = std::bit_cast<uint32_t>(x);
        const uint16_t brain = bits >> 16, half = __half_as_ushort(__float2half_rn(x));
        const int8_t byte = static_cast<int8_t>(x);
        const uint8_t pixel = static_cast<uint8_t>(x);
        const void* from = &x;
        if (t == DType::f16) from = &half;
        if (t == DType::bf16) from = &brain;
        if (t == DType::i8) from = &byte;
        if (t == DType::u8) from = &pixel;
        std::memcpy(&data[k * bytes_of(t)], from, bytes_of(t));
    }
    return data;
}

std::vector<int64_t> labels_of(int64_t count, int classes) {
    std::vector<int64_t> labels(count);
    for (auto& label : labels) label = static_cast<int64_t>(uniform() * classes) - 1;
    return labels;
}

// Twice into NaN-filled memory: same bits, all of it written.
void twice(const char* what, int64_t bytes, const std::function<void(char*)>& op) {
    std::vector<char> first(bytes, static_cast<char>(0xff)), second(first);
    op(first.data());
    op(second.data());
    bool ok = first == second;
    for (int64_t k = 0; k + 4 <= bytes && ok; k += 4)
        ok = std::memcmp(&first[k], "\xff\xff\xff\xff", 4) != 0;
    if (!ok) ++failures;
    std::printf("%s %s\n", ok ? "ok  " : "FAIL", what);
}

void losses(int64_t B, int64_t D, int classes, DType t) {
    const auto features = numbers(B * D, t, 0, 1);
    const auto labels = labels_of(B, classes);
    const int64_t grad_bytes = B * D * 4;
    for (const bool negatives : {false, true}) {
        twice(negatives ? "nt_xent negatives" : "nt_xent", grad_bytes + 4, [&](char* out) {
            std::vector<char> space(nt_xent_workspace_cuda(B, D, t, true) + 64,
                                    static_cast<char>(0xff));
            void* workspace =
                reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(space.data()) + 63) / 64 * 64);
            nt_xent_cuda({features.data(), t, D, labels.data(), B, D, 0.1, negatives,
                          out + grad_bytes, out, workspace},
                         nullptr);
        });
    }
    twice("intra_class_distance", grad_bytes + 4, [&](char* out) {
        std::vector<char> space(intra_class_distance_workspace_cuda(B, D, t, true) + 64,
                                static_cast<char>(0xff));
        void* workspace =
            reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(space.data()) + 63) / 64 * 64);
        void* loss = out + grad_bytes;
        // then added to its own result in place
        for (void* addend : {static_cast<void*>(nullptr), static_cast<void*>(out)})
            intra_class_distance_cuda({features.data(), t, D, labels.data(), B, D, true, 0.5,
                                       addend ? loss : nullptr, addend, loss, out, workspace},
                                      nullptr);
    });
}

void covariances(int64_t B, int64_t D, int classes, DType t) {
    const auto features = numbers(B * D, t, 0, 1);
    const auto labels = labels_of(B, classes + 1);  // some are -1: of no class
    const int64_t K = classes, matrices = K * D * D * 4, means = K * D * 4;
    twice("class_covariance", 8 * K + matrices + means, [&](char* out) {
        std::vector<int64_t> space(class_covariance_workspace_cuda(B, D, t, K) / 8 + 1, -1);
        class_covariance_cuda(
            {features.data(), t, D, labels.data(), B, D, K, reinterpret_cast<int64_t*>(out),
             out + 8 * K, out + 8 * K + means, space.data()},
            nullptr);
    });
}

void pixels(int64_t H, int64_t W, DType store, DType image, DType grad, bool channels_last) {
    const int64_t N = 5, B = 3, C = 3, plane = H * W, count = C * plane;
    const auto images = numbers(N * count, image, 0, image == DType::u8 ? 256 : 1),
               deltas = numbers(N * count, store, -0.03f, 0.03f);
    const auto grads = numbers(B * count, grad, -1, 1);
    const std::vector<int64_t> index{4, 7, 0};  // 7 is not there
    const std::vector<uint8_t> flip{1, 1, 0};
    const std::vector<int32_t> view{1, -2, 1, 0, 0, 0, -1, 1, 0};
    const float mean[3] = {0.5f, 0.4f, 0.3f}, inv_std[3] = {2, 3, 4};
    twice("projected_step_", 8 + static_cast<int64_t>(deltas.size()) / 4 * 4, [&](char* out) {
        auto delta = deltas;
        alignas(8) int64_t nonfinite = 0;
        ProjectedStepInplaceArgs args{delta.data(),
                                      store,
                                      index.data(),
                                      grads.data(),
                                      grad,
                                      {count, plane, W, 1},
                                      images.data(),
                                      image,
                                      flip.data(),
                                      B,
                                      C,
                                      H,
                                      W,
                                      N,
                                      0.001,
                                      8 / 255.0,
                                      &nonfinite,
                                      channels_last ? view.data() : nullptr,
                                      channels_last ? 1 : 3};
        if (channels_last)
            args.grad_stride[1] = 1, args.grad_stride[2] = W * C, args.grad_stride[3] = C;
        projected_step_inplace_cuda(args, nullptr);
        std::memcpy(out, &nonfinite, 8);
        std::memcpy(out + 8, delta.data(), deltas.size() / 4 * 4);
    });
    twice("perturbed_input", B * count * bytes_of(grad), [&](char* out) {
        perturbed_input_cuda({out, grad, channels_last, images.data(), image, deltas.data(), store,
                              8 / 255.0, index.data(), flip.data(), mean, inv_std, B, C, H, W, N,
                              channels_last ? view.data() : nullptr},
                             nullptr);
    });
    if (store != DType::i8) {
        const auto all = numbers(N * count, store, 0, 1);
        twice("projected_step", N * count * bytes_of(store), [&](char* out) {
            projected_step_cuda(
                {out, deltas.data(), all.data(), all.data(), store, N * count, 0.001, 8 / 255.0},
                nullptr);
        });
    }
}

void epilogues(int64_t rows, int64_t channels, DType t) {
    const int64_t count = rows * channels, bytes = count * bytes_of(t), words = (count + 63) / 64;
    const auto values = numbers(count, t, -1, 1), others = numbers(count, t, -1, 1),
               bias = numbers(channels, DType::f32, -1, 1);
    std::vector<uint64_t> mask(words);
    twice("conv_epilogue_", bytes / 4 * 4, [&](char* out) {
        auto y = values;
        auto* bits = reinterpret_cast<uint8_t*>(mask.data());
        conv_epilogue_cuda({y.data(), t, bias.data(), others.data(), true, bits, channels, count},
                           nullptr);
        std::memcpy(out, y.data(), bytes / 4 * 4);
    });
    twice("conv_grad_epilogue_", bytes / 4 * 4, [&](char* out) {
        auto grad = values;
        conv_grad_epilogue_cuda(
            {grad.data(), t, others.data(), reinterpret_cast<uint8_t*>(mask.data()), count},
            nullptr);
        std::memcpy(out, grad.data(), bytes / 4 * 4);
    });
}

void convolutions(int64_t B, int64_t H, int64_t W, DType t) {
    const int64_t pixels = B * H * W, bytes = pixels * 64 * 2;
    const auto x = numbers(pixels * 64, t, -1, 1), other = numbers(pixels * 64, t, -1, 1),
               weight = numbers(64 * 9 * 64, t, -0.1f, 0.1f);
    const auto bias = numbers(64, DType::f32, -1, 1);
    std::vector<uint8_t> mask(pixels * 8);
    twice("conv64 forward", bytes, [&](char* out) {
        conv64_cuda({out, t, x.data(), weight.data(), false, false,
                     reinterpret_cast<const float*>(bias.data()), other.data(), true, mask.data(),
                     nullptr, B, H, W},
                    nullptr);
    });
    twice("conv64 input gradient", bytes, [&](char* out) {
        conv64_cuda({out, t, x.data(), weight.data(), true, true, nullptr, other.data(), false,
                     nullptr, mask.data(), B, H, W},
                    nullptr);
    });
}

}  // namespace

int main() {
    losses(70, 40, 9, DType::f32);
    losses(130, 65, 30, DType::bf16);
    // as a large batch: two spans of two tiles, four tiles of sums in three buffers
    losses(200, 100, 9, DType::f16);
    losses(7, 150, 4, DType::f16);   // too few rows for a large batch
    losses(20, 600, 4, DType::f16);  // too wide for one
    covariances(70, 40, 9, DType::f32);
    covariances(150, 70, 3, DType::bf16);  // two tiles each way
    pixels(8, 8, DType::f16, DType::u8, DType::bf16, true);
    pixels(40, 40, DType::i8, DType::u8, DType::f32, true);  // two tiles
    pixels(16, 8, DType::f32, DType::f32, DType::f32, false);
    pixels(5, 7, DType::f32, DType::u8, DType::f16, false);
    pixels(5, 7, DType::i8, DType::f32, DType::bf16, true);
    epilogues(70, 48, DType::f32);
    epilogues(41, 130, DType::bf16);
    epilogues(33, 7, DType::f16);
    convolutions(3, 7, 33, DType::f16);  // three tiles for each warpgroup: a buffer is used again
    convolutions(5, 2, 5, DType::bf16);  // whole images
    std::printf("%d failures\n", failures);
    return failures != 0;
}
