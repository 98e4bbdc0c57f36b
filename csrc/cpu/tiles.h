// Kernels of the packed convolutions: input transform, products, output transform with its epilogue (packed_conv.cpp divides the
// work). A convolution is a family F of one-dimensional transforms, applied to columns and then to rows of a tile:
//   IN inputs at a distance of IS tiles from the next ones, the first of them OFF before the tile's place; AL products; OUT results.
// Winograd's transforms need fewer products than results times taps (S. Winograd 1980; A. Lavin and S. Gray 2016). Points and
// infinity are chosen for a small rounding error: 0, +-1/sqrt 2, +-sqrt 2 for three taps, +-1/2, +-5/4 for two.

constexpr float TA = 0.70710678118654752440f,
                TB = 1.41421356237309504880f;  // their squares are 1/2 and 2

MIUE_INLINE f32v times(float a, f32v b) { return all(a) * b; }
MIUE_INLINE f32v plus(f32v a, float b, f32v c) {  // a + b c
    return fma(all(b), c, a);
}

struct Three4 {  // three taps, stride 1, four results from six inputs
    static constexpr int IN = 6, AL = 6, OUT = 4, IS = 4, OS = 4, OFF = -1;
    MIUE_INLINE void in(const f32v* d, f32v* t) {
        f32v even = plus(d[4], -2.0f, d[2]), odd = plus(d[3], -2.0f, d[1]);
        t[1] = plus(even, TA, odd);
        t[2] = plus(even, -TA, odd);
        even = plus(d[4], -0.5f, d[2]), odd = plus(d[3], -0.5f, d[1]);
        t[3] = plus(even, TB, odd);
        t[4] = plus(even, -TB, odd);
        t[0] = plus(d[0] + d[4], -2.5f, d[2]);
        t[5] = plus(d[1] + d[5], -2.5f, d[3]);
    }
    MIUE_INLINE void out(const f32v* m, f32v* y) {
        const f32v s = m[1] + m[2], d = m[1] - m[2], S = m[3] + m[4], D = m[3] - m[4];
        y[0] = m[0] + (s + S);
        y[1] = plus(times(TB, D), TA, d);
        y[2] = plus(times(2.0f, S), 0.5f, s);
        y[3] = plus(plus(m[5], 2 * TB, D), 0.5f * TA, d);
    }
};

struct
    Three2 {  // three taps, stride 1, two results from four inputs: less than half of the weights' memory
    static constexpr int IN = 4, AL = 4, OUT = 2, IS = 2, OS = 2, OFF = -1;
    MIUE_INLINE void in(const f32v* d, f32v* t) {
        t[0] = d[0] - d[2];
        t[1] = d[1] + d[2];
        t[2] = d[2] - d[1];
        t[3] = d[3] - d[1];
    }
    MIUE_INLINE void out(const f32v* m, f32v* y) {
        y[0] = m[0] + (m[1] + m[2]);
        y[1] = (m[1] - m[2]) + m[3];
    }
};

struct Two4 {  // two taps, four results from five inputs: part of the strided ones below
    static constexpr float QA = 0.5f, QB = 1.25f, A2 = QA * QA, B2 = QB * QB;
    MIUE_INLINE void in(f32v d0, f32v d1, f32v d2, f32v d3, f32v d4, f32v* t) {
        f32v even = plus(d2, -B2, d0), odd = plus(d3, -B2, d1);
        t[0] = plus(odd, QA, even);
        t[1] = plus(odd, -QA, even);
        even = plus(d2, -A2, d0), odd = plus(d3, -A2, d1);
        t[2] = plus(odd, QB, even);
        t[3] = plus(odd, -QB, even);
        t[4] = plus(plus(d4, -(A2 + B2), d2), A2 * B2, d0);
    }
    MIUE_INLINE void out(const f32v* m, f32v* y) {
        const f32v s = m[0] + m[1], d = m[0] - m[1], S = m[2] + m[3], D = m[2] - m[3];
        y[0] = s + S;
        y[1] = plus(times(QB, D), QA, d);
        y[2] = plus(times(B2, S), A2, s);
        y[3] = plus(plus(m[4], QB * B2, D), QA * A2, d);
    }
};

struct
    Strided {  // three taps, stride 2: the outer taps meet the odd places, the middle one the even places
    static constexpr int IN = 9, AL = 9, OUT = 4, IS = 8, OS = 4, OFF = -1;
    MIUE_INLINE void in(const f32v* d, f32v* t) {
        Two4::in(d[0], d[2], d[4], d[6], d[8], t);
        for (int i = 0; i < 4; i++) t[5 + i] = d[2 * i + 1];
    }
    MIUE_INLINE void out(const f32v* m, f32v* y) {
        Two4::out(m, y);
        for (int i = 0; i < 4; i++) y[i] += m[5 + i];
    }
};

struct
    StridedBack {  // its input gradient: results at odd places have two taps, those at even places one
    static constexpr int IN = 5, AL = 9, OUT = 8, IS = 4, OS = 8, OFF = 0;
    MIUE_INLINE void in(const f32v* d, f32v* t) {
        Two4::in(d[0], d[1], d[2], d[3], d[4], t);
        for (int i = 0; i < 4; i++) t[5 + i] = d[i];
    }
    MIUE_INLINE void out(const f32v* m, f32v* y) {
        f32v odd[4];
        Two4::out(m, odd);
        for (int i = 0; i < 4; i++) y[2 * i] = m[5 + i], y[2 * i + 1] = odd[i];
    }
};

template <int STRIDE>
struct One {  // one tap
    static constexpr int IN = 1, AL = 1, OUT = 1, IS = STRIDE, OS = 1, OFF = 0;
    MIUE_INLINE void in(const f32v* d, f32v* t) { t[0] = d[0]; }
    MIUE_INLINE void out(const f32v* m, f32v* y) { y[0] = m[0]; }
};

struct OneBack {  // the input gradient of one tap at stride 2: nothing reaches the places between
    static constexpr int IN = 1, AL = 1, OUT = 2, IS = 1, OS = 2, OFF = 0;
    MIUE_INLINE void in(const f32v* d, f32v* t) { t[0] = d[0]; }
    MIUE_INLINE void out(const f32v* m, f32v* y) {
        y[0] = m[0];
        y[1] = f32v{};
    }
};

// The first n < LANES values; the others are 0.
MIUE_INLINE f32v load_part(const float* from, int64_t n) {
#if MIUE_BYTES == 64
    return f32v(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), from));
#else
    float v[LANES<float>] = {};
    for (int64_t i = 0; i < n; i++) v[i] = from[i];
    return load(v);
#endif
}
MIUE_INLINE void store_part(float* to, f32v v, int64_t n) {
#if MIUE_BYTES == 64
    _mm512_mask_storeu_ps(to, __mmask16((1u << n) - 1), __m512(v));
#else
    for (int64_t i = 0; i < n; i++) to[i] = v[i];
#endif
}

#if MIUE_BYTES >= 32
// The bits of LANES values in NHWC order, from the first of which `place` values were before: whole bytes.
MIUE_INLINE uint64_t bits_from(const uint8_t* mask, int64_t place) {
    if (LANES<float> == 8) return mask[place / 8];
    uint16_t bits;
    __builtin_memcpy(&bits, mask + place / 8, sizeof bits);
    return bits;
}
MIUE_INLINE void bits_to(uint8_t* mask, int64_t place, Flags<float> flags) {
    const uint16_t bits = uint16_t(to_bits(flags));
    __builtin_memcpy(mask + place / 8, &bits, LANES<float> / 8);
}
#else
MIUE_INLINE uint64_t bits_from(const uint8_t*,
                               int64_t) {  // four values are half a byte: never called, see TileJob
    return 0;
}
MIUE_INLINE void bits_to(uint8_t*, int64_t, Flags<float>) {}
#endif

// Tiles [first, first + count) of the input, transformed: in[product][tile][channel]. Channels are padded with zeros.
template <class F>
static void tiles_in(const TileJob& a, int64_t first, int64_t count, float* to) {
    constexpr int64_t L = LANES<float>;
    for (int64_t tile = 0; tile < count; tile++, to += a.depth) {
        const int64_t at = first + tile, b = at / (a.tiles_h * a.tiles_w),
                      place = at % (a.tiles_h * a.tiles_w);
        const int64_t i0 = place / a.tiles_w * F::IS + F::OFF,
                      j0 = place % a.tiles_w * F::IS + F::OFF;
        const float* base = a.x + ((b * a.H + i0) * a.W + j0) * a.C;
        const bool wide = j0 >= 0 && j0 + F::IN <= a.W;
        for (int64_t c = 0; c < a.C; c += L) {
            const int64_t part = a.C - c;
            f32v half[F::IN][F::AL];
#pragma GCC unroll 9
            for (int i = 0; i < F::IN; i++) {
                f32v d[F::IN] = {};
                if (i0 + i >= 0 && i0 + i < a.H) {
                    const float* from = base + i * a.W * a.C + c;
                    if (wide && part >= L) {
#pragma GCC unroll 9
                        for (int j = 0; j < F::IN; j++) d[j] = load(from + j * a.C);
                    } else {
                        for (int j = 0; j < F::IN; j++)
                            if (j0 + j >= 0 && j0 + j < a.W)
                                d[j] = part >= L ? load(from + j * a.C)
                                                 : load_part(from + j * a.C, part);
                    }
                }
                F::in(d, half[i]);
            }
#pragma GCC unroll 9
            for (int j = 0; j < F::AL; j++) {
                f32v d[F::IN], t[F::AL];
#pragma GCC unroll 9
                for (int i = 0; i < F::IN; i++) d[i] = half[i][j];
                F::in(d, t);
#pragma GCC unroll 9
                for (int i = 0; i < F::AL; i++) store(to + (i * F::AL + j) * a.in_step + c, t[i]);
            }
        }
    }
}

// Results of tiles [first, first + count), channels [channel, channel + width) of them, from out[product][tile][channel].
template <class F>
static void tiles_out(const TileJob& a, int64_t first, int64_t count, int64_t channel,
                      int64_t width, const float* from) {
    constexpr int64_t L = LANES<float>;
    for (int64_t tile = 0; tile < count; tile++, from += a.group) {
        const int64_t at = first + tile, b = at / (a.tiles_h * a.tiles_w),
                      place = at % (a.tiles_h * a.tiles_w);
        const int64_t i0 = place / a.tiles_w * F::OS, j0 = place % a.tiles_w * F::OS;
        const int64_t rows = a.P - i0 < F::OUT ? a.P - i0 : F::OUT,
                      columns = a.Q - j0 < F::OUT ? a.Q - j0 : F::OUT;
        for (int64_t k = 0; k < width; k += L) {
            const int64_t part = width - k;
            f32v half[F::OUT][F::AL];
#pragma GCC unroll 9
            for (int j = 0; j < F::AL; j++) {
                f32v m[F::AL], y[F::OUT];
#pragma GCC unroll 9
                for (int i = 0; i < F::AL; i++)
                    m[i] = load(from + (i * F::AL + j) * a.out_step + k);
                F::out(m, y);
#pragma GCC unroll 9
                for (int i = 0; i < F::OUT; i++) half[i][j] = y[i];
            }
            f32v bias{};
            if (a.bias)
                bias =
                    part >= L ? load(a.bias + channel + k) : load_part(a.bias + channel + k, part);
            for (int64_t i = 0; i < rows; i++) {
                f32v y[F::OUT];
                F::out(half[i], y);
                const int64_t row = ((b * a.P + i0 + i) * a.Q + j0) * a.K + channel + k;
                for (int64_t j = 0; j < columns; j++) {
                    const int64_t place = row + j * a.K;
                    f32v v = y[j] + bias;
                    if (part < L) {  // without an epilogue: see TileJob
                        store_part(a.y + place, v, part);
                        continue;
                    }
                    if (a.residual) v += load(a.residual + place);
                    if (a.mask_in)
                        v = zero_unless(flags_at<float>(bits_from(a.mask_in, place), 0), v);
                    if (a.relu) {
                        const Flags<float> flags = positive(v);
                        v = zero_unless(flags, v);
                        if (a.mask_out) bits_to(a.mask_out, place, flags);
                    }
                    store(a.y + place, v);
                }
            }
        }
    }
}

// The register tile of the products: rows are tiles of the input, columns a panel of result channels.
#if MIUE_BYTES == 64
constexpr int TILE_ROWS = 8, TILE_VECTORS = 2;
#elif MIUE_BYTES == 32
constexpr int TILE_ROWS = 6, TILE_VECTORS = 2;
#else
constexpr int TILE_ROWS = 4, TILE_VECTORS = 2;
#endif

// out[row, column] = sum over channels, in their order, of in[row, channel] weights[channel, column]. Between the products lines of
// memory are asked for that are needed soon: the next panel of weights, and `ahead`.
template <int VECTORS>
static void tile_product(const float* in, int64_t in_ld, const float* weights, int64_t channels,
                         float* out, int64_t out_ld, const char* next, const char* ahead) {
    constexpr int64_t L = LANES<float>;
    constexpr int ROWS = TILE_ROWS * TILE_VECTORS / VECTORS;  // as many sums either way
    f32v sum[ROWS][VECTORS] = {};
    const auto step = [&](int64_t c) __attribute__((always_inline)) {
        f32v w[VECTORS];
#pragma GCC unroll 4
        for (int n = 0; n < VECTORS; n++) w[n] = load(weights + (c * VECTORS + n) * L);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            const f32v x = all(in[r * in_ld + c]);
#pragma GCC unroll 4
            for (int n = 0; n < VECTORS; n++) sum[r][n] = fma(x, w[n], sum[r][n]);
        }
    };
    int64_t c = 0;
    for (; c + 4 <= channels; c += 4) {
        __builtin_prefetch(next + c * 16, 0, 3);
        __builtin_prefetch(ahead + c * 16, 0, 2);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) step(c + i);
    }
    for (; c < channels; c++) step(c);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int n = 0; n < VECTORS; n++) store(out + r * out_ld + n * L, sum[r][n]);
}

// Every product of `count` tiles with `panels` panels of weights, which lie in the order in which they are read.
template <int VECTORS>
static void products_of(const TileJob& a, int64_t products, int64_t count, int64_t panels,
                        const float* in, const float* weights, float* out, Ahead& ahead) {
    constexpr int64_t WIDTH = VECTORS * LANES<float>, ROWS = TILE_ROWS * TILE_VECTORS / VECTORS;
    for (int64_t x = 0; x < products; x++)
        for (int64_t p = 0; p < panels; p++, weights += a.C * WIDTH)
            for (int64_t t = 0; t < count; t += ROWS) {
                const char* next = reinterpret_cast<const char*>(weights + a.C * WIDTH) +
                                   t / ROWS * (a.C / 4) * 64;
                tile_product<VECTORS>(in + x * a.in_step + t * a.depth, a.depth, weights, a.C,
                                      out + x * a.out_step + t * a.group + p * WIDTH, a.group, next,
                                      ahead.take(a.C * 16, next));
            }
}

static void products(const TileJob& a, int64_t products, int64_t count, int64_t panels,
                     const float* in, const float* weights, float* out, Ahead& ahead) {
    a.panel == LANES<float>
        ? products_of<1>(a, products, count, panels, in, weights, out, ahead)
        : products_of<TILE_VECTORS>(a, products, count, panels, in, weights, out, ahead);
}

// The weight gradient of Three4: per product, the outer products of the input's transforms and those of the result's gradient, summed
// over tiles; then the transposed transform of the weights.
MIUE_INLINE void three4_grad(const f32v* y, f32v* t) {  // the transpose of Three4::out
    f32v even = plus(y[0], 0.5f, y[2]), odd = plus(y[1], 0.5f, y[3]);
    t[0] = y[0];
    t[1] = plus(even, TA, odd);
    t[2] = plus(even, -TA, odd);
    even = plus(y[0], 2.0f, y[2]), odd = plus(y[1], 2.0f, y[3]);
    t[3] = plus(even, TB, odd);
    t[4] = plus(even, -TB, odd);
    t[5] = y[3];
}

// Tiles [first, first + count) of the result's gradient a.residual [B, P, Q, K]: to[product][tile][channel], a.group channels per tile.
static void grad_in(const TileJob& a, int64_t first, int64_t count, float* to) {
    constexpr int64_t L = LANES<float>;
    for (int64_t tile = 0; tile < count; tile++, to += a.group) {
        const int64_t at = first + tile, b = at / (a.tiles_h * a.tiles_w),
                      place = at % (a.tiles_h * a.tiles_w);
        const int64_t i0 = place / a.tiles_w * 4, j0 = place % a.tiles_w * 4;
        const float* base = a.residual + ((b * a.P + i0) * a.Q + j0) * a.K;
        for (int64_t k = 0; k < a.group; k += L) {
            const int64_t part = a.K - k;
            f32v half[4][6];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                f32v y[4] = {};
                for (int j = 0; j < 4 && part > 0; j++)
                    if (i0 + i < a.P && j0 + j < a.Q) {
                        const float* from = base + (i * a.Q + j) * a.K + k;
                        y[j] = part >= L ? load(from) : load_part(from, part);
                    }
                three4_grad(y, half[i]);
            }
#pragma GCC unroll 6
            for (int j = 0; j < 6; j++) {
                const f32v y[4] = {half[0][j], half[1][j], half[2][j], half[3][j]};
                f32v t[6];
                three4_grad(y, t);
#pragma GCC unroll 6
                for (int i = 0; i < 6; i++) store(to + (i * 6 + j) * a.out_step + k, t[i]);
            }
        }
    }
}

// sums[panel][c][column] (+)= sum over `count` tiles of in[tile][c] grad[tile][panel, column], for one product.
static void outer_products(const TileJob& a, int64_t count, const float* in, const float* grad,
                           float* sums, bool add, Ahead& ahead) {
    constexpr int64_t L = LANES<float>, WIDTH = TILE_VECTORS * L;
    for (int64_t k = 0; k < a.group; k += WIDTH)
        for (int64_t c = 0; c < a.C; c += TILE_ROWS, sums += TILE_ROWS * WIDTH) {
            f32v sum[TILE_ROWS][TILE_VECTORS] = {};
            const float *x = in + c, *g = grad + k;
            const char* line = ahead.take(count * 32, reinterpret_cast<const char*>(sums));
            for (int64_t t = 0; t < count; t++, x += a.depth, g += a.group) {
                __builtin_prefetch(line + t * 32, 0, 2);
                f32v w[TILE_VECTORS];
#pragma GCC unroll 4
                for (int n = 0; n < TILE_VECTORS; n++) w[n] = load(g + n * L);
#pragma GCC unroll 8
                for (int r = 0; r < TILE_ROWS; r++) {
                    const f32v v = all(x[r]);
#pragma GCC unroll 4
                    for (int n = 0; n < TILE_VECTORS; n++) sum[r][n] = fma(v, w[n], sum[r][n]);
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 4
                for (int n = 0; n < TILE_VECTORS; n++) {
                    float* at = sums + r * WIDTH + n * L;
                    store(at, add ? load(at) + sum[r][n] : sum[r][n]);
                }
        }
}

// Gradients of the weights [K][3][3][C] of one panel of K, from sums[product][panel][c][column] (`step` values between products).
static void weight_grad(const double (&transform)[9][3], int64_t C, int64_t K, int64_t rows,
                        int64_t panel, const float* sums, int64_t step, float* to) {
    constexpr int64_t L = LANES<float>, WIDTH = TILE_VECTORS * L;
    const int64_t first = panel * WIDTH;
    sums += panel * rows * WIDTH;
    for (int64_t c = 0; c < C; c++)
        for (int64_t l = 0; l < WIDTH && first + l < K; l += L) {
            f32v half[3][6];
            for (int j = 0; j < 6; j++)
                for (int r = 0; r < 3; r++) {
                    half[r][j] = f32v{};
                    for (int i = 0; i < 6; i++)
                        half[r][j] = plus(half[r][j], float(transform[i][r]),
                                          load(sums + (i * 6 + j) * step + c * WIDTH + l));
                }
            for (int r = 0; r < 3; r++)
                for (int s = 0; s < 3; s++) {
                    f32v sum{};
                    for (int j = 0; j < 6; j++) sum = plus(sum, float(transform[j][s]), half[r][j]);
                    for (int64_t k = 0; k < L && first + l + k < K; k++)
                        to[(((first + l + k) * 3 + r) * 3 + s) * C + c] = sum[k];
                }
        }
}

// In double, rounded once.
static void pack_panel(const PackJob& a, int64_t first, int64_t count, float* to, int64_t step) {
    constexpr int64_t L = LANES<double>;
    for (int64_t c = 0; c < a.C; c++)
        for (int64_t l = 0; l < a.panel; l += L) {
            f64v g[3][3] = {}, half[9][3];
            const float* from = a.weight + (first + l) * a.result_stride + c * a.channel_stride;
            for (int64_t r = 0; r < a.taps; r++)
                for (int64_t s = 0; s < a.taps; s++)
                    for (int64_t k = 0; k < L && l + k < count; k++)
                        g[r][s][k] =
                            from[k * a.result_stride + r * a.row_stride + s * a.column_stride];
            for (int64_t x = 0; x < a.products; x++)
                for (int64_t s = 0; s < a.taps; s++) {
                    half[x][s] = f64v{};
                    for (int64_t r = 0; r < a.taps; r++)
                        half[x][s] = half[x][s] + all(a.transform[x][r]) * g[r][s];
                }
            for (int64_t x = 0; x < a.products; x++)
                for (int64_t z = 0; z < a.products; z++) {
                    f64v sum{};
                    for (int64_t s = 0; s < a.taps; s++)
                        sum = sum + half[x][s] * all(a.transform[z][s]);
                    const half_f32v rounded = __builtin_convertvector(sum, half_f32v);
                    __builtin_memcpy(to + (x * a.products + z) * step + c * a.panel + l, &rounded,
                                     sizeof rounded);
                }
        }
}

template <class F>
constexpr TileFamily tile_family() {
    return {F::IN, F::AL, F::OUT, F::IS, F::OS, F::OFF, tiles_in<F>, tiles_out<F>};
}
