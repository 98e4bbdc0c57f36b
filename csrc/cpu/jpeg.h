// JPEG's round trip of one image, and the transpose of its linear parts: the formulas of
// miue_fast/reference/jpeg_round_trip.py term by term, in the same order, so that the bits are the
// same.
constexpr float R_Y = float(0.299), G_Y = float(0.587), B_Y = float(0.114);
constexpr float R_CR = float(2 * (1 - 0.299)), B_CB = float(2 * (1 - 0.114));
constexpr float R_CB = float(0.299 / (2 * (1 - 0.114))), G_CB = float(0.587 / (2 * (1 - 0.114)));
constexpr float G_CR = float(0.587 / (2 * (1 - 0.299))), B_CR = float(0.114 / (2 * (1 - 0.299)));
constexpr float CB_G = float(0.114 * (2 * (1 - 0.114)) / 0.587);
constexpr float CR_G = float(0.299 * (2 * (1 - 0.299)) / 0.587);
constexpr float LEVEL = float(1.0 / 255);
constexpr int64_t MCU = 16;  // the side of what one unit of the code covers with halved chroma

MIUE_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

typedef float row8 __attribute__((vector_size(32)));
MIUE_INLINE row8 row_at(const float* from) {
    row8 v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
}

// to[r] = sum_k matrix[r][k] * from[k], rows of 8.
MIUE_INLINE void times_rows(const float* matrix, const float* from, int64_t stride, float* to) {
    row8 in[8];
    for (int k = 0; k < 8; k++) in[k] = row_at(from + k * stride);
    for (int r = 0; r < 8; r++) {
        row8 sum = matrix[r * 8] * in[0];
        for (int k = 1; k < 8; k++) sum = sum + matrix[r * 8 + k] * in[k];
        __builtin_memcpy(to + r * 8, &sum, sizeof sum);
    }
}
// Row r of the result: sum_k transposed[k] * from[r][k].
MIUE_INLINE row8 times_columns(const row8 (&transposed)[8], const float* from) {
    row8 sum = transposed[0] * from[0];
    for (int k = 1; k < 8; k++) sum = sum + transposed[k] * from[k];
    return sum;
}

// The block of 8 x 8 values at `from` after its coefficients were rounded to multiples of the
// steps: `rows` x `columns` of it to `to`.
static void code_block(const JpegRoundTripArgs& args, const float* steps, const float* from,
                       int64_t stride, float* to, int64_t to_stride, int64_t rows,
                       int64_t columns) {
    // Adding and taking away 1.5 * 2^23 rounds to whole numbers, halves to even ones.
    constexpr float WHOLE = 12582912;
    float half[64], rounded[64];
    row8 cosines[8], inverse[8];
    for (int k = 0; k < 8; k++)
        cosines[k] = row_at(args.cosines + k * 8), inverse[k] = row_at(args.inverse + k * 8);
    times_rows(args.cosines, from, stride, half);
    for (int r = 0; r < 8; r++) {
        const row8 step = row_at(steps + r * 8);
        const row8 times = times_columns(inverse, half + r * 8) / step;
        const row8 whole = (times + WHOLE - WHOLE) * step;
        __builtin_memcpy(rounded + r * 8, &whole, sizeof whole);
    }
    times_rows(args.inverse, rounded, 8, half);
    for (int r = 0; r < rows; r++) {
        const row8 line = times_columns(cosines, half + r * 8);
        float values[8];
        __builtin_memcpy(values, &line, sizeof line);
        for (int k = 0; k < 8; k++) {
            values[k] = values[k] < -128 ? -128 : values[k];
            values[k] = values[k] > 127 ? 127 : values[k];
        }
        if (columns == 8)
            __builtin_memcpy(to + r * to_stride, values, sizeof values);
        else
            for (int64_t k = 0; k < columns; k++) to[r * to_stride + k] = values[k];
    }
}

// MCU pixels of each channel from `left` on, the last column repeated, to luma and chroma around 0.
MIUE_INLINE void to_ycc(const float* image, int64_t plane, int64_t W, int64_t left,
                        float* __restrict y, float* __restrict cb, float* __restrict cr) {
    float rgb[3][MCU];
    for (int c = 0; c < 3; c++) {
        const float* row = image + c * plane;
        for (int64_t k = 0; k < MCU; k++) {
            float v = row[left + MCU <= W ? left + k : at_most(left + k, W - 1)];
            v = v < 0 ? 0 : v;
            v = v > 1 ? 1 : v;
            rgb[c][k] = v * 255;
        }
    }
    for (int64_t k = 0; k < MCU; k++) {
        const float r = rgb[0][k], g = rgb[1][k], b = rgb[2][k];
        y[k] = ((R_Y * r + G_Y * g) + B_Y * b) - 128;
        cb[k] = (0.5f * b - R_CB * r) - G_CB * g;
        cr[k] = (0.5f * r - G_CR * g) - B_CR * b;
    }
}

// Means of 2 x 2 values of MCU rows: `real` rows of means, whose last one is repeated.
MIUE_INLINE void halve(float* __restrict to, const float* __restrict from, int64_t real) {
    for (int64_t r = 0; r < MCU / 2; r++) {
        const float *upper = from + 2 * r * MCU, *lower = upper + MCU;
        for (int64_t k = 0; k < MCU / 2; k++) {
            const float left = upper[2 * k] + lower[2 * k],
                        right = upper[2 * k + 1] + lower[2 * k + 1];
            to[r * 8 + k] = r < real ? (left + right) * 0.25f : to[(r - 1) * 8 + k];
        }
    }
}

// The MCU at (top, left): luma to `y` [H][W], chroma to `cb` and `cr` of its own size.
static void code_mcu(const JpegRoundTripArgs& args, const float* image, int64_t top, int64_t left,
                     float* y, float* cb, float* cr) {
    const int64_t H = args.H, W = args.W, plane = H * W;
    const float *luma = args.steps, *chroma = args.steps + 64;
    float ycc[3][MCU * MCU], means[64];
    for (int64_t r = 0; r < MCU; r++)
        to_ycc(image + at_most(top + r, H - 1) * W, plane, W, left, ycc[0] + r * MCU,
               ycc[1] + r * MCU, ycc[2] + r * MCU);
    float* to[3] = {y, cb, cr};
    for (int c = 0; c < 3; c++) {
        if (c && args.halved) {
            const int64_t h = (H + 1) / 2, w = (W + 1) / 2, i = top / 2, j = left / 2;
            halve(means, ycc[c], h - i);
            code_block(args, chroma, means, 8, to[c] + i * w + j, w, at_most(8, h - i),
                       at_most(8, w - j));
            continue;
        }
        for (int64_t i = top; i < at_most(top + MCU, H); i += 8)
            for (int64_t j = left; j < at_most(left + MCU, W); j += 8)
                code_block(args, c ? chroma : luma, ycc[c] + (i - top) * MCU + j - left, MCU,
                           to[c] + i * W + j, W, at_most(8, H - i), at_most(8, W - j));
    }
}

// Row `row` of the doubled chroma, `w` values of 2 * w at `to`. `line` has room for w + 2.
static void double_row(float* __restrict to, float* __restrict line, const float* plane, int64_t h,
                       int64_t w, int64_t row, bool narrow) {
    const int64_t i = row / 2;
    const float* near = plane + i * w;
    if (narrow) {
        for (int64_t k = 0; k < w; k++) to[2 * k] = to[2 * k + 1] = near[k];
        return;
    }
    const int64_t other = row % 2 ? at_most(i + 1, h - 1) : i ? i - 1 : 0;
    const float* far = plane + other * w;
    for (int64_t k = 0; k < w; k++) line[k + 1] = 0.75f * near[k] + 0.25f * far[k];
    line[0] = line[1], line[w + 1] = line[w];
    for (int64_t k = 0; k < w; k++) {
        to[2 * k] = 0.75f * line[k + 1] + 0.25f * line[k];
        to[2 * k + 1] = 0.75f * line[k + 1] + 0.25f * line[k + 2];
    }
}

MIUE_INLINE float pixel(float v) {
    v = v * LEVEL;
    v = v < 0 ? 0 : v;
    return v > 1 ? 1 : v;
}

// Row b of the batch; scratch as in Kernels.
static void jpeg(const JpegRoundTripArgs& args, int64_t b, float* scratch) {
    const int64_t H = args.H, W = args.W, plane = H * W, h = (H + 1) / 2, w = (W + 1) / 2;
    float* out = args.out + b * 3 * plane;
    float *cb = args.halved ? scratch : out + plane,
          *cr = args.halved ? scratch + h * w : out + 2 * plane;
    for (int64_t top = 0; top < H; top += MCU)
        for (int64_t left = 0; left < W; left += MCU)
            code_mcu(args, args.images + b * 3 * plane, top, left, out, cb, cr);
    float *line = scratch + 2 * h * w, *wide[2] = {line + w + 2, line + 3 * w + 2};
    for (int64_t i = 0; i < H; i++) {
        float *red = out + i * W, *green = red + plane, *blue = green + plane;
        const float *to_cb = green, *to_cr = blue;
        if (args.halved) {
            double_row(wide[0], line, cb, h, w, i, W <= JPEG_NARROW);
            double_row(wide[1], line, cr, h, w, i, W <= JPEG_NARROW);
            to_cb = wide[0], to_cr = wide[1];
        }
#pragma GCC ivdep
        for (int64_t k = 0; k < W; k++) {
            const float y = red[k] + 128, u = to_cb[k], v = to_cr[k];
            red[k] = pixel(y + R_CR * v);
            green[k] = pixel((y - CB_G * u) - CR_G * v);
            blue[k] = pixel(y + B_CB * u);
        }
    }
}

// The transpose of doubling along a row: `w` sums of the 2 * w values at from[1]. from[0] and
// from[2 * w + 1] are written.
static void fold_row(float* __restrict to, float* __restrict from, int64_t w, bool narrow) {
    from[0] = from[1], from[2 * w + 1] = from[2 * w];
    for (int64_t k = 0; k < w; k++) {
        const float own = from[2 * k + 1] + from[2 * k + 2], others = from[2 * k] + from[2 * k + 3];
        to[k] = narrow ? own : 0.75f * own + 0.25f * others;
    }
}

// Row b of the batch; scratch as in Kernels.
static void jpeg_grad(const JpegRoundTripGradArgs& args, int64_t b, float* scratch) {
    const int64_t H = args.H, W = args.W, plane = H * W, h = (H + 1) / 2, w = (W + 1) / 2;
    const bool narrow = W <= JPEG_NARROW;
    const float* grad = args.grad + b * 3 * plane;
    float* out = args.out + b * 3 * plane;
    // folded: [2][2 * h][w]; lines: [2][2 * w + 2]
    float *folded[2] = {scratch, scratch + 2 * h * w}, *lines[2] = {scratch + 4 * h * w};
    lines[1] = lines[0] + 2 * w + 2;
    for (int64_t i = 0; i < 2 * h; i++) {
        const float *red = grad + i * W, *green = red + plane, *blue = green + plane;
        for (float* line : lines) line[2 * w] = 0;
        for (int64_t k = 0; k < W; k++) {
            lines[0][k + 1] = i < H ? B_CB * blue[k] - CB_G * green[k] : 0;
            lines[1][k + 1] = i < H ? R_CR * red[k] - CR_G * green[k] : 0;
        }
        for (int c = 0; c < 2; c++) fold_row(folded[c] + i * w, lines[c], w, narrow);
    }
    for (int64_t i = 0; i < h; i++) {
        for (int c = 0; c < 2; c++) {
            const float *even = folded[c] + 2 * i * w, *odd = even + w;
            const float *before = i ? even - w : even, *after = i < h - 1 ? odd + w : odd;
            for (int64_t k = 0; k < w; k++) {
                const float own = even[k] + odd[k], others = before[k] + after[k];
                const float mean = (narrow ? own : 0.75f * own + 0.25f * others) * 0.25f;
                lines[c][2 * k] = lines[c][2 * k + 1] = 2 * i + 1 < H ? mean : mean * 2;
            }
            if (W % 2) lines[c][W - 1] *= 2;
        }
        for (int64_t row = 2 * i; row < at_most(2 * i + 2, H); row++)
            for (int64_t k = 0; k < W; k++) {
                const int64_t at = row * W + k;
                const float red = grad[at], green = grad[at + plane], blue = grad[at + 2 * plane];
                const float y = (red + green) + blue, cb = lines[0][k], cr = lines[1][k];
                out[at] = (R_Y * y - R_CB * cb) + 0.5f * cr;
                out[at + plane] = (G_Y * y - G_CB * cb) - G_CR * cr;
                out[at + 2 * plane] = (B_Y * y + 0.5f * cb) - B_CR * cr;
            }
    }
}
