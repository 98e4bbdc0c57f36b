// Matrix tiles of a processor with AMX and bf16 products.
#include "matrix.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                   \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")
#endif

namespace miue {
namespace {

// Sums in tiles 0 to 3, images in 4 and 5, weights in 6 and 7. begin() gives the second half of the
// images no rows where there is none; its tiles are then not touched, because they may not be.
struct alignas(64) Shapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
};

thread_local bool two;

// The tile intrinsics of some compilers do not say which memory they read and write.
void settle(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

void begin(int64_t images) {
    Shapes shapes;
    const uint8_t first = uint8_t(images < TILE ? images : TILE),
                  second = uint8_t(images < TILE ? 0 : images - TILE);
    two = second > 0;
    const uint8_t rows[8] = {
        first, first, two ? second : first, two ? second : first, first, two ? second : first,
        16,    16};
    for (int t = 0; t < 8; t++) shapes.rows[t] = rows[t];
    settle(&shapes);
    _tile_loadconfig(&shapes);
}

template <bool TWO, bool WIDE>
void multiply(const MatrixProducts& a) {
    float* sums = a.sums;
    settle(sums);
    if (a.add) {
        _tile_loadd(0, sums, 64);
        if (WIDE) _tile_loadd(1, sums + 256, 64);
        if (TWO) _tile_loadd(2, sums + 512, 64);
        if (TWO && WIDE) _tile_loadd(3, sums + 768, 64);
    } else {
        _tile_zero(0);
        if (WIDE) _tile_zero(1);
        if (TWO) _tile_zero(2);
        if (TWO && WIDE) _tile_zero(3);
    }
    for (int64_t block = 0; block < a.blocks; block++) {
        const uint16_t* panel = a.panel + block * a.panel_step;
        for (int64_t t = 0; t < a.taps; t++) {
            const uint16_t *x = a.tap[t].pixel + block * a.pixel_step,
                           *w = panel + a.tap[t].number * 2 * SIDE;
            _tile_loadd(4, x, 64);
            _tile_loadd(6, w, 64);
            _tile_dpbf16ps(0, 4, 6);
            if (WIDE) {
                _tile_loadd(7, w + SIDE, 64);
                _tile_dpbf16ps(1, 4, 7);
            }
            if (TWO) {
                _tile_loadd(5, x + SIDE, 64);
                _tile_dpbf16ps(2, 5, 6);
                if (WIDE) _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    _tile_stored(0, sums, 64);
    if (WIDE) _tile_stored(1, sums + 256, 64);
    if (TWO) _tile_stored(2, sums + 512, 64);
    if (TWO && WIDE) _tile_stored(3, sums + 768, 64);
    settle(sums);
}

void products(const MatrixProducts& a) {
    if (two)
        a.wide ? multiply<true, true>(a) : multiply<true, false>(a);
    else
        a.wide ? multiply<false, true>(a) : multiply<false, false>(a);
}

// 32 results of one pixel and their epilogue; a part of them with ALL = false.
template <bool ALL>
inline __attribute__((always_inline)) void write(const MatrixConvArgs& a, const float* bias,
                                                 const float* sums, int64_t count, int64_t place) {
    const auto lanes = [&](int64_t from) {
        const int64_t n = count - from;
        return __mmask16(n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1);
    };
    const __mmask16 low = ALL ? 0xffff : lanes(0), high = ALL ? 0xffff : lanes(16);
    const __mmask32 both = __mmask32(low) | __mmask32(high) << 16;
    __m512 v0 = _mm512_maskz_loadu_ps(low, sums), v1 = _mm512_maskz_loadu_ps(high, sums + 256);
    if (bias) {
        v0 = _mm512_add_ps(v0, _mm512_maskz_loadu_ps(low, bias));
        v1 = _mm512_add_ps(v1, _mm512_maskz_loadu_ps(high, bias + 16));
    }
    if (a.residual) {
        const __m512i part = _mm512_maskz_loadu_epi16(both, a.residual + place);
        const auto wide = [](__m256i half) {
            return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        };
        v0 = _mm512_add_ps(v0, wide(_mm512_castsi512_si256(part)));
        v1 = _mm512_add_ps(v1, wide(_mm512_extracti64x4_epi64(part, 1)));
    }
    __m512i y = (__m512i)_mm512_cvtne2ps_pbh(v1, v0);
    if (a.mask_in) {
        uint32_t bits = 0;
        __builtin_memcpy(&bits, a.mask_in + place / 8, ALL ? 4 : 2);
        y = _mm512_maskz_mov_epi16(bits, y);
    }
    if (a.relu) {  // a NaN counts as positive: it is no less than zero, and stays
        const __mmask32 nan = _mm512_cmpgt_epu16_mask(_mm512_slli_epi16(y, 1),
                                                      _mm512_set1_epi16(int16_t(0xff00))),
                        positive = _mm512_cmpgt_epi16_mask(y, _mm512_setzero_si512());
        const uint32_t bits = nan | positive;
        y = _mm512_maskz_mov_epi16(bits, y);
        if (a.mask_out) __builtin_memcpy(a.mask_out + place / 8, &bits, ALL ? 4 : 2);
    }
    _mm512_mask_storeu_epi16(a.y + place, both, y);
}

void results(const MatrixConvArgs& a, const float* bias, const MatrixResults& r) {
    for (int64_t p = 0; p < r.pixels; p++) {
        const float* sums = r.sums + p * SUMS_STEP;
        const int64_t place = r.place + p * a.K;
        for (int64_t panel = 0; panel < r.panels; panel++, sums += r.panel_step) {
            const int64_t first = panel * RESULTS, left = r.results - first;
            const float* add = bias ? bias + first : nullptr;
            left >= RESULTS ? write<true>(a, add, sums, RESULTS, place + first)
                            : write<false>(a, add, sums, left, place + first);
        }
    }
}

void end() { _tile_release(); }

// Transposes 16 x 16 values of 32 bits.
inline __attribute__((always_inline)) void transpose(__m512i (&r)[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512i a = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88),
                      b = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd),
                      c = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88),
                      d = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
        t[i] = _mm512_shuffle_i32x4(a, c, 0x88), t[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
        t[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88), t[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

__mmask32 some(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1; }

void across(const uint16_t* from, int64_t step, int64_t images, int64_t channels, uint16_t* to) {
    __m512i first[16], second[16];
    const __mmask32 lanes = some(channels);
#pragma GCC unroll 16
    for (int n = 0; n < 16; n++) {
        first[n] = n < images ? _mm512_maskz_loadu_epi16(lanes, from + n * step) : __m512i{};
        second[n] =
            n + 16 < images ? _mm512_maskz_loadu_epi16(lanes, from + (n + 16) * step) : __m512i{};
    }
    transpose(first);
    transpose(second);
    alignas(64) uint16_t order[2][32];
    for (int n = 0; n < 32; n++) order[0][n] = uint16_t(2 * n), order[1][n] = uint16_t(2 * n + 1);
    const __m512i even = _mm512_load_si512(order[0]), odd = _mm512_load_si512(order[1]);
#pragma GCC unroll 16
    for (int c = 0; c < 16; c++) {
        _mm512_storeu_si512(to + 2 * c * 32, _mm512_permutex2var_epi16(first[c], even, second[c]));
        _mm512_storeu_si512(to + (2 * c + 1) * 32,
                            _mm512_permutex2var_epi16(first[c], odd, second[c]));
    }
}

void along(const uint16_t* from, int64_t step, int64_t images, int64_t channels, uint16_t* to) {
    const __mmask32 lanes = some(channels);
    alignas(64) uint16_t order[2][32];
    for (int i = 0; i < 32; i++)
        order[0][i] = uint16_t(i / 2 + i % 2 * 32), order[1][i] = uint16_t(16 + i / 2 + i % 2 * 32);
    const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
    for (int64_t n = 0; n < 32; n += 2) {
        const auto row = [&](int64_t m) {
            return m < images ? _mm512_maskz_loadu_epi16(lanes, from + m * step) : __m512i{};
        };
        const __m512i a = row(n), b = row(n + 1);
        _mm512_storeu_si512(to + n / 2 * 32, _mm512_permutex2var_epi16(a, low, b));
        _mm512_storeu_si512(to + SIDE + n / 2 * 32, _mm512_permutex2var_epi16(a, high, b));
    }
}

void outer(const uint16_t* const* x, const uint16_t* const* grad, int64_t count, float* sums) {
    settle(sums);
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    _tile_loadd(2, sums + 512, 64);
    _tile_loadd(3, sums + 768, 64);
    for (int64_t i = 0; i < count; i++) {
        _tile_loadd(4, x[i], 64);
        _tile_loadd(6, grad[i], 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, grad[i] + SIDE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, x[i] + SIDE, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
    settle(sums);
}

bool has_tiles() {
    unsigned a, b, c, d;
    constexpr unsigned BF16 = 1u << 22, TILES = 1u << 24, AVX512_BF16 = 1u << 5;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & BF16) || !(d & TILES)) return false;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & AVX512_BF16);
}

}  // namespace

bool amx_starts() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM of arch_prctl
    static const bool starts = has_tiles() && __builtin_cpu_supports("avx512bw") &&
                               !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
    return starts;
}

extern const MatrixKernels amx_kernels = {begin, products, results, end, across, along, outer};
}  // namespace miue
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
namespace miue {
bool amx_starts() { return false; }
extern const MatrixKernels amx_kernels = {};
}  // namespace miue
#endif
