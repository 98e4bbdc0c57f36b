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
