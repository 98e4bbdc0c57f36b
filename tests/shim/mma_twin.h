// Host twin of mma.sync.m16n8k16 (fp16 in, fp32 out), from the fragment tables of the PTX ISA,
// independent of csrc/cuda/mma.cuh. The product is as inexact as tensor cores are: products are
// exact, then eight of them and the accumulator are cut (not rounded) to one bit below the last bit
// of the largest, and the sum is cut to fp32.
#pragma once

namespace shim {

inline double cut(double x, double unit) { return std::trunc(x / unit) * unit; }

inline float sum_like_tensor_cores(const float* a, const float* b, float c) {
    for (int half = 0; half < 2; ++half) {
        double terms[9], largest = std::fabs(c);
        terms[8] = c;
        for (int k = 0; k < 8; ++k) {
            terms[k] = static_cast<double>(a[8 * half + k]) * b[8 * half + k];
            largest = std::fmax(largest, std::fabs(terms[k]));
        }
        double sum = 0;
        for (double term : terms) sum += term;
        if (largest > 0 && std::isfinite(sum)) {
            const double unit = std::ldexp(1.0, std::ilogb(largest) - 24);
            sum = 0;
            for (double term : terms) sum += cut(term, unit);
            if (sum != 0) sum = cut(sum, std::ldexp(1.0, std::ilogb(sum) - 23));
        }
        c = static_cast<float>(sum);
    }
    return c;
}

template <int N>
void mma_row(float (&d)[N][4], const uint32_t (&a)[4], const uint32_t (&b)[N][2]) {
    struct Fragments {
        uint32_t a[4], b[N][2];
    } mine;
    std::memcpy(mine.a, a, sizeof a);
    std::memcpy(mine.b, b, sizeof b);
    const auto& warp = exchange(mine);
    const auto value = [](uint32_t word, int high) {
        return __half2float({static_cast<uint16_t>(word >> 16 * high)});
    };
    // Element i of A's fragment in a lane: row = group for i = 0, 1, 4, 5 else group + 8; column =
    // 2 * (lane % 4) + i % 2, + 8 for i >= 4.
    float A[16][16], B[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const int group = lane >> 2, in_group = lane % 4;
        if (group == int(threadIdx.x % 32) >> 2) {
            for (int i = 0; i < 8; ++i) {
                const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8,
                          column = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
                A[row][column] = value(warp[lane].a[i / 2], i % 2);
            }
        }
    }
    for (int n = 0; n < N; ++n) {
        // Element i of B's fragment: row = 2 * (lane % 4) + i % 2, + 8 for i >= 2; column = group.
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 4; ++i)
                B[lane % 4 * 2 + (i & 1) + (i < 2 ? 0 : 8)][lane >> 2] =
                    value(warp[lane].b[n][i / 2], i % 2);
        }
        // Element i of D: row = group for i < 2 else group + 8; column = 2 * (lane % 4) + i % 2.
        for (int i = 0; i < 4; ++i) {
            const int row = (int(threadIdx.x % 32) >> 2) + (i < 2 ? 0 : 8),
                      column = threadIdx.x % 4 * 2 + (i & 1);
            float terms[16];
            for (int k = 0; k < 16; ++k) terms[k] = B[k][column];
            d[n][i] = sum_like_tensor_cores(A[row], terms, d[n][i]);
        }
    }
}

}  // namespace shim
