// The tiles of matrix_amx.cpp in plain C++: with them the tests see how the work is divided on every processor.
#include <cstring>

#include "../check.h"
#include "matrix.h"

namespace miue {
namespace {

float wide(uint16_t h) {
    const uint32_t u = uint32_t(h) << 16;
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}
uint16_t narrow(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return x != x ? uint16_t(0x7fc0) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

thread_local int64_t images_here;

void plain_products(const MatrixProducts& a) {
    if (!a.add) std::memset(a.sums, 0, IMAGES * RESULTS * sizeof(float));
    for (int64_t block = 0; block < a.blocks; block++)
        for (int64_t t = 0; t < a.taps; t++)
            for (int64_t n = 0; n < images_here; n++)
                for (int64_t k = 0; k < (a.wide ? RESULTS : TILE); k++) {
                    const uint16_t* x = a.tap[t].pixel + block * a.pixel_step + n * DEPTH;
                    const uint16_t* w = a.panel + block * a.panel_step +
                                        (2 * a.tap[t].number + k / TILE) * SIDE + 2 * (k % TILE);
                    float& sum = a.sums[n / TILE * 512 + k / TILE * 256 + n % TILE * 16 + k % TILE];
                    for (int64_t c = 0; c < DEPTH; c++)
                        sum += wide(x[c]) * wide(w[c / 2 * DEPTH + c % 2]);
                }
}

void plain_results(const MatrixConvArgs& a, const float* bias, const MatrixResults& r) {
    for (int64_t p = 0; p < r.pixels; p++)
        for (int64_t k = 0; k < r.results; k++) {
            const int64_t place = r.place + p * a.K + k;
            float v = r.sums[p * SUMS_STEP + k / RESULTS * r.panel_step + k % RESULTS / TILE * 256 +
                             k % TILE];
            if (bias) v += bias[k];
            if (a.residual) v += wide(a.residual[place]);
            const bool bit = a.mask_in ? a.mask_in[place / 8] >> place % 8 & 1
                                       : !a.relu || !(wide(narrow(v)) <= 0);
            a.y[place] = bit ? narrow(v) : uint16_t(0);
            if (!a.mask_out) continue;
            uint8_t& byte = a.mask_out[place / 8];
            if (place % 8 == 0) byte = 0;
            byte = uint8_t(byte | bit << place % 8);
        }
}

void plain_across(const uint16_t* from, int64_t step, int64_t images, int64_t channels,
                  uint16_t* to) {
    for (int64_t n = 0; n < IMAGES; n++)
        for (int64_t c = 0; c < DEPTH; c++)
            to[c * IMAGES + n] = n < images && c < channels ? from[n * step + c] : uint16_t(0);
}

void plain_along(const uint16_t* from, int64_t step, int64_t images, int64_t channels,
                 uint16_t* to) {
    for (int64_t n = 0; n < IMAGES; n++)
        for (int64_t c = 0; c < DEPTH; c++)
            to[c / TILE * SIDE + n / 2 * DEPTH + c % TILE * 2 + n % 2] =
                n < images && c < channels ? from[n * step + c] : uint16_t(0);
}

void plain_outer(const uint16_t* const* x, const uint16_t* const* grad, int64_t count,
                 float* sums) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t c = 0; c < DEPTH; c++)
            for (int64_t k = 0; k < RESULTS; k++)
                for (int64_t n = 0; n < IMAGES; n++)
                    sums[c / TILE * 512 + k / TILE * 256 + c % TILE * TILE + k % TILE] +=
                        wide(x[i][c * IMAGES + n]) *
                        wide(grad[i][k / TILE * SIDE + n / 2 * DEPTH + k % TILE * 2 + n % 2]);
}

}  // namespace

extern const MatrixKernels plain_kernels = {[](int64_t images) { images_here = images; },
                                            plain_products,
                                            plain_results,
                                            [] {},
                                            plain_across,
                                            plain_along,
                                            plain_outer};

const MatrixKernels& matrix_kernels(const char* op, bool plain) {
    require(plain || amx_starts(), op, "processor", "matrix tiles (AMX) for bfloat16", "none");
    return plain ? plain_kernels : amx_kernels;
}

const char* matrix_missing_cpu() {
    return amx_starts() ? nullptr : "this processor, or its system, has no bf16 matrix tiles (AMX)";
}

}  // namespace miue
