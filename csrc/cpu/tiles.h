// Kernels of the packed convolutions: input transform, products, output transform with its epilogue
// (packed_conv.cpp divides the work). A convolution is a family F of transforms.h.

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
