// Kernels of projected_step and perturbed_input: dtypes are widened into short float buffers, one
// loop does the arithmetic.
constexpr int64_t CHUNK = 1024;
// A buffer's length. Not a power of two: a load whose address ends in the same 12 bits as an
// earlier store waits for it.
constexpr int64_t SLOT = CHUNK + 64;

template <class T>
MIUE_INLINE V<T> stepped(V<T> delta, V<T> grad, V<T> image, T alpha, T eps) {
    const V<T> zero = {}, one = all(T(1)), low = all(T(0) - eps), high = all(eps);
    V<T> d = delta - (grad > zero ? all(alpha) : grad < zero ? all(-alpha) : zero);
    d = low > d ? low : d;
    d = high < d ? high : d;
    V<T> x = image + d;
    x = zero > x ? zero : x;
    x = one < x ? one : x;
    // an image outside [0, 1], or the rounding of the sum, must not cost the budget; NaN stays
    d = x - image;
    d = low > d ? low : d;
    return high < d ? high : d;
}

// `out` may be `delta`.
template <class T>
static void step_loop(T* out, const T* delta, const T* grad, const T* image, int64_t n, T alpha,
                      T eps) {
    int64_t i = 0;
    for (; i + LANES<T> <= n; i += LANES<T>)
        store(out + i, stepped(load(delta + i), load(grad + i), load(image + i), alpha, eps));
    if (i == n) return;
    T rest[3][LANES<T>] = {};
    for (int64_t k = i; k < n; k++)
        rest[0][k - i] = delta[k], rest[1][k - i] = grad[k], rest[2][k - i] = image[k];
    store(rest[0], stepped(load(rest[0]), load(rest[1]), load(rest[2]), alpha, eps));
    for (int64_t k = i; k < n; k++) out[k] = rest[0][k - i];
}

static void step(const ProjectedStepArgs& args, int64_t from, int64_t to) {
    if (args.dtype == DType::f64 || args.dtype == DType::f32) {
        const auto run = [&](auto zero) {
            using T = decltype(zero);
            step_loop(static_cast<T*>(args.out) + from, static_cast<const T*>(args.delta) + from,
                      static_cast<const T*>(args.grad) + from,
                      static_cast<const T*>(args.image) + from, to - from, T(args.alpha),
                      T(args.eps));
        };
        args.dtype == DType::f64 ? run(0.0) : run(0.0f);
        return;
    }
    const auto half = [](const void* base, int64_t at) {
        return static_cast<const uint16_t*>(base) + at;
    };
    float out[CHUNK], delta[CHUNK], grad[CHUNK], image[CHUNK];
    for (int64_t at = from; at < to; at += CHUNK) {
        const int64_t n = to - at < CHUNK ? to - at : CHUNK;
        widen(delta, half(args.delta, at), args.dtype, n);
        widen(grad, half(args.grad, at), args.dtype, n);
        widen(image, half(args.image, at), args.dtype, n);
        step_loop(out, delta, grad, image, n, float(args.alpha), float(args.eps));
        narrow(static_cast<uint16_t*>(args.out) + at, args.dtype, out, n);
    }
}

// Pixels [from, from + n) of one [H, W] plane on the [0, 1] scale, mirrored along W where `flip`.
static void load_pixels(float* __restrict out, const void* plane, DType dtype, int64_t W,
                        int64_t from, int64_t n, bool flip) {
    const uint8_t* bytes = static_cast<const uint8_t*>(plane);
    const float* floats = static_cast<const float*>(plane);
    if (!flip) {
        if (dtype == DType::u8)
            for (int64_t i = 0; i < n; i++) out[i] = float(bytes[from + i]) / 255.0f;
        else
            __builtin_memcpy(out, floats + from, n * sizeof(float));
        return;
    }
    for (int64_t i = 0; i < n;) {
        const int64_t w = (from + i) % W, row = from + i - w, run = W - w < n - i ? W - w : n - i,
                      last = row + W - 1 - w;
        if (dtype == DType::u8)
            for (int64_t k = 0; k < run; k++) out[i + k] = float(bytes[last - k]) / 255.0f;
        else
            for (int64_t k = 0; k < run; k++) out[i + k] = floats[last - k];
        i += run;
    }
}

// Values [at, at + n) of the perturbations: where they are, or widened into `buffer`.
static const float* load_delta(float* __restrict buffer, const void* store, DType dtype, int64_t at,
                               int64_t n, float unit) {
    if (dtype == DType::f32) return static_cast<const float*>(store) + at;
    if (dtype == DType::i8) {
        const int8_t* levels = static_cast<const int8_t*>(store) + at;
        for (int64_t i = 0; i < n; i++) buffer[i] = float(levels[i]) * unit;
    } else {
        widen(buffer, static_cast<const char*>(store) + at * size_of(dtype), dtype, n);
    }
    return buffer;
}

static void store_delta(void* store, DType dtype, int64_t at, const float* __restrict values,
                        int64_t n, float per_unit) {
    if (dtype == DType::i8) {
        int8_t* levels = static_cast<int8_t*>(store) + at;
        for (int64_t i = 0; i < n; i++) {
            // rounds half to even below 2^22
            float level = values[i] * per_unit + 12582912.0f - 12582912.0f;
            level = level < -127 ? -127 : level;
            level = level > 127 ? 127 : level;
            levels[i] = int8_t(int(level == level ? level : 0));
        }
    } else {
        narrow(static_cast<char*>(store) + at * size_of(dtype), dtype, values, n);
    }
}

// Where the store holds the piece after pixels [at, at + n) of channel c of batch row b: the next
// channel, the next pixels or the next row; -1 if there is none. Rows lie anywhere, where no
// hardware prefetcher looks, so it is asked for while this piece is computed.
template <class Args>
static int64_t next_piece(const Args& args, int64_t b, int64_t c, int64_t at, int64_t n,
                          int64_t to) {
    const int64_t plane = args.H * args.W;
    const bool channel = c + 1 < args.C, pixels = at + n < to;
    if (!channel && !pixels && b + 1 == args.B) return -1;
    const int64_t row = channel || pixels ? b : b + 1;
    return ((args.index ? args.index[row] : row) * args.C + (channel ? c + 1 : 0)) * plane +
           (channel  ? at
            : pixels ? at + n
                     : 0);
}
static void prefetch(const void* store, DType dtype, int64_t at, int64_t n) {
    const char* from = static_cast<const char*>(store) + at * size_of(dtype);
    for (int64_t byte = 0; byte < n * size_of(dtype); byte += 64) __builtin_prefetch(from + byte);
}
// work(i, count) on [0, n) in turns of 64, asking for as much of the perturbations of the next
// piece each time: a core can wait for some twenty lines at once, not for a whole piece.
template <class Args, class Work>
MIUE_INLINE void by_turns(const Args& args, int64_t next, int64_t n, const Work& work) {
    constexpr int64_t TURN = 64;
    for (int64_t i = 0; i < n; i += TURN) {
        const int64_t count = n - i < TURN ? n - i : TURN;
        if (next >= 0) prefetch(args.delta, args.delta_dtype, next + i, count);
        work(i, count);
    }
}

// work(i, source, count, back) on pieces of [0, n): pixels [from + i, from + i + count) of a viewed
// plane are pixels [source, source + count) of the plane itself, read backwards where `back`; they
// are padding where source is -1. No piece leaves its row.
template <class Work>
MIUE_INLINE void by_view(const View& view, int64_t H, int64_t W, int64_t from, int64_t n,
                         const Work& work) {
    for (int64_t i = 0; i < n;) {
        const int64_t h = (from + i) / W - view.down, w = (from + i) % W;
        const int64_t end = W - w < n - i ? W : w + n - i;
        const int64_t last = W + view.right < end ? W + view.right : end;
        int64_t low = h < 0 || h >= H ? end : view.right < w ? w : view.right;
        low = low < end ? low : end;
        const int64_t high = last < low ? low : last;
        if (low > w) work(i, -1, low - w, false);
        const int64_t first = view.mirrored ? W - high + view.right : low - view.right;
        if (high > low) work(i + low - w, h * W + first, high - low, view.mirrored);
        if (end > high) work(i + high - w, -1, end - high, false);
        i += end - w;
    }
}

template <class U, int STEP>
static void gather(U* __restrict out, const U* __restrict in, int64_t n, int64_t step) {
    for (int64_t i = 0; i < n; i++) out[i] = in[i * (STEP ? STEP : step)];
}

// Pixels [from, from + n) of one channel of the gradient; `base` is the channel's first element,
// strides in elements.
template <class U>
static const U* pixels_of(const U* base, int64_t row_stride, int64_t stride, int64_t W,
                          int64_t from, int64_t n, U* buffer) {
    for (int64_t i = 0; i < n;) {
        const int64_t w = (from + i) % W, h = (from + i) / W;
        const int64_t run = row_stride == W * stride ? n - i : W - w < n - i ? W - w : n - i;
        const U* in = base + h * row_stride + w * stride;
        if (stride == 1 && run == n) return in;
        if (stride == 3)
            gather<U, 3>(buffer + i, in, run, 3);
        else if (stride == 1)
            gather<U, 1>(buffer + i, in, run, 1);
        else
            gather<U, 0>(buffer + i, in, run, stride);
        i += run;
    }
    return buffer;
}

// Three channels of n pixels, interleaved, into one slot each.
template <class U>
static void separate(U* __restrict out, const U* __restrict in, int64_t n) {
    for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 3
        for (int c = 0; c < 3; c++) out[c * SLOT + i] = in[i * 3 + c];
}

// Pixels [from, from + n) of one channel of the gradient as the store has them: where `view` puts
// them, in float. `base` is the channel's first element.
template <class U>
static void viewed_back(float* out, const ProjectedStepInplaceArgs& args, const U* base,
                        const View& view, int64_t from, int64_t n) {
    const int64_t *stride = args.grad_stride, W = args.W;
    U buffer[SLOT];
    by_view(view, args.H, W, from, n, [&](int64_t i, int64_t source, int64_t count, bool back) {
        const int64_t at = source + (back ? count - 1 : 0), step = back ? -stride[3] : stride[3];
        if (source < 0) {
            for (int64_t k = 0; k < count; k++) buffer[i + k] = 0;
            return;
        }
        const U* in = base + at / W * stride[2] + at % W * stride[3];
        if (step == 3)
            gather<U, 3>(buffer + i, in, count, step);
        else
            gather<U, 0>(buffer + i, in, count, step);
    });
    widen(out, buffer, args.grad_dtype, n);
}

// The same pixels, each replaced by the sum over its cell: down each column of the cell, then over
// the columns. The rows of a piece that share cells share the sums.
template <class U>
static void cell_sums(float* out, const ProjectedStepInplaceArgs& args, const U* base,
                      const View& view, int64_t from, int64_t n) {
    const int64_t H = args.H, W = args.W, most = H < W ? W : H;
    const int64_t grid = args.grid < most ? args.grid : most;
    float line[SLOT], column[SLOT], sums[SLOT];
    int64_t known[3] = {-1, -1, -1};  // the row of cells, the first and the last cell in `sums`
    for (int64_t i = 0; i < n;) {
        const int64_t h = (from + i) / W, w = (from + i) % W, end = W - w < n - i ? W : w + n - i;
        const int64_t row = h / grid, first = w / grid, last = (end - 1) / grid;
        if (row != known[0] || first != known[1] || last != known[2]) {
            known[0] = row, known[1] = first, known[2] = last;
            for (int64_t cell = first; cell <= last; cell++) sums[cell - first] = 0;
            const int64_t bottom = H < (row + 1) * grid ? H : (row + 1) * grid;
            const int64_t right = W < (last + 1) * grid ? W : (last + 1) * grid;
            for (int64_t x = first * grid; x < right; x += CHUNK) {
                const int64_t count = right - x < CHUNK ? right - x : CHUNK;
                for (int64_t k = 0; k < count; k++) column[k] = 0;
                for (int64_t y = row * grid; y < bottom; y++) {
                    viewed_back(line, args, base, view, y * W + x, count);
                    for (int64_t k = 0; k < count; k++) column[k] += line[k];
                }
                int64_t cell = x / grid - first, next = (x / grid + 1) * grid - x;
                for (int64_t k = 0; k < count; cell++, next += grid) {
                    float sum = sums[cell];
                    for (; k < next && k < count; k++) sum += column[k];
                    sums[cell] = sum;
                }
            }
        }
        int64_t cell = 0, next = (first + 1) * grid;
        for (int64_t x = w; x < end; cell++, next += grid)
            for (; x < next && x < end; x++) out[i + x - w] = sums[cell];
        i += end - w;
    }
}

static int64_t step_inplace(const ProjectedStepInplaceArgs& args, int64_t b, int64_t from,
                            int64_t to) {
    const int64_t plane = args.H * args.W, row = args.index ? args.index[b] : b,
                  *stride = args.grad_stride;
    const float unit = float(args.eps / 127), per_unit = float(127 / args.eps);
    const bool flip = args.flip && args.flip[b], moved = args.view || args.grid > 1;
    const View view = args.view ? transposed(view_of(args.view, b)) : View{0, 0, false};
    const bool together =
        !moved && args.C == 3 && stride[1] == 1 && stride[3] == 3 && stride[2] == 3 * args.W;
    float buffer[SLOT], grad[3 * SLOT], image[SLOT];
    uint16_t half[3 * SLOT];
    // Pixels [at, at + n) of channel c of the gradient; those of three interleaved channels are all
    // read with the first one.
    const auto gradient = [&](auto* slots, int64_t c, int64_t at, int64_t n) {
        using U = std::remove_pointer_t<decltype(slots)>;
        const U* base = static_cast<const U*>(args.grad) + b * stride[0] + c * stride[1];
        if (!together) return pixels_of(base, stride[2], stride[3], args.W, at, n, slots);
        if (c == 0) separate(slots, base + at * 3, n);
        return static_cast<const U*>(slots + c * SLOT);
    };
    // work(the first element of channel c of the gradient)
    const auto of_channel = [&](int64_t c, const auto& work) {
        const int64_t first = b * stride[0] + c * stride[1];
        if (args.grad_dtype == DType::f32)
            work(static_cast<const float*>(args.grad) + first);
        else
            work(static_cast<const uint16_t*>(args.grad) + first);
    };
    int64_t nonfinite = 0;
    for (int64_t at = from; at < to; at += CHUNK)
        for (int64_t c = 0; c < args.C; c++) {
            const int64_t n = to - at < CHUNK ? to - at : CHUNK, first = (row * args.C + c) * plane;
            const int64_t next = next_piece(args, b, c, at, n, to);
            if (next >= 0) prefetch(args.images, args.image_dtype, next, n);
            const float* g = grad;
            if (moved)
                of_channel(c,
                           [&](const auto* base) { viewed_back(grad, args, base, view, at, n); });
            else if (args.grad_dtype == DType::f32)
                g = gradient(grad, c, at, n);
            else
                widen(grad, gradient(half, c, at, n), args.grad_dtype, n);
            if (args.nonfinite) {
                int32_t count = 0;
                for (int64_t i = 0; i < n; i++) count += (bits(g[i]) & 0x7f800000) == 0x7f800000;
                nonfinite += count;
            }
            if (args.grid > 1)
                of_channel(c, [&](const auto* base) { cell_sums(grad, args, base, view, at, n); });
            const char* images =
                static_cast<const char*>(args.images) + first * size_of(args.image_dtype);
            load_pixels(image, images, args.image_dtype, args.W, at, n, flip);
            const float* delta =
                load_delta(buffer, args.delta, args.delta_dtype, first + at, n, unit);
            float* out = args.delta_dtype == DType::f32
                             ? static_cast<float*>(args.delta) + first + at
                             : buffer;
            by_turns(args, next, n, [&](int64_t i, int64_t count) {
                step_loop(out + i, delta + i, g + i, image + i, count, float(args.alpha),
                          float(args.eps));
            });
            if (out == buffer)
                store_delta(args.delta, args.delta_dtype, first + at, buffer, n, per_unit);
        }
    return nonfinite;
}

template <class U, int C>
static void interleave(U* __restrict out, const U* __restrict in, int64_t n, int64_t c,
                       int64_t channels) {
    if (C == 0)
        for (int64_t i = 0; i < n; i++) out[i * channels + c] = in[i];
    else
        for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 4
            for (int k = 0; k < C; k++) out[i * C + k] = in[k * SLOT + i];
}

template <class U>
static void write_input(const PerturbedInputArgs& args, int64_t b, int64_t at, int64_t n,
                        const U* in, int64_t c, int64_t buffered) {
    U* image = static_cast<U*>(args.out) + b * args.C * args.H * args.W;
    if (!args.channels_last)
        __builtin_memcpy(image + c * args.H * args.W + at, in, n * sizeof(U));
    else if (buffered == 3)
        interleave<U, 3>(image + at * 3, in, n, 0, 3);
    else
        interleave<U, 0>(image + at * args.C, in, n, c, args.C);
}

// Pixels [at, at + n) of one channel of image + delta as the view of batch row b has them. The
// channel begins at `image`, and at element `first` of the store.
static void viewed(float* y, const PerturbedInputArgs& args, const void* image, int64_t first,
                   int64_t b, int64_t at, int64_t n) {
    const float unit = float(args.eps / 127);
    const bool flip = args.flip && args.flip[b];
    float row[SLOT], buffer[SLOT];
    by_view(view_of(args.view, b), args.H, args.W, at, n,
            [&](int64_t i, int64_t source, int64_t count, bool back) {
                if (source < 0) {
                    for (int64_t k = i; k < i + count; k++) y[k] = 0;
                    return;
                }
                load_pixels(row, image, args.image_dtype, args.W, source, count, flip);
                if (args.delta) {
                    const float* delta = load_delta(buffer, args.delta, args.delta_dtype,
                                                    first + source, count, unit);
                    for (int64_t k = 0; k < count; k++) row[k] += delta[k];
                }
                for (int64_t k = 0; k < count; k++) y[i + k] = row[back ? count - 1 - k : k];
            });
}

static void input(const PerturbedInputArgs& args, int64_t b, int64_t from, int64_t to) {
    const int64_t plane = args.H * args.W, row = args.index ? args.index[b] : b;
    const float unit = float(args.eps / 127);
    const bool flip = args.flip && args.flip[b], together = args.channels_last && args.C == 3;
    float x[3 * SLOT], buffer[SLOT];
    uint16_t half[3 * SLOT];
    for (int64_t at = from; at < to; at += CHUNK)
        for (int64_t c = 0; c < args.C; c++) {
            const int64_t n = to - at < CHUNK ? to - at : CHUNK, first = (row * args.C + c) * plane,
                          slot = together ? c * SLOT : 0;
            const int64_t next = next_piece(args, b, c, at, n, to);
            if (next >= 0) prefetch(args.images, args.image_dtype, next, n);
            float* y = x + slot;
            const char* image =
                static_cast<const char*>(args.images) + first * size_of(args.image_dtype);
            if (args.view)
                viewed(y, args, image, first, b, at, n);
            else
                load_pixels(y, image, args.image_dtype, args.W, at, n, flip);
            // x - 0 and x * 1 are x
            const float mean = args.mean ? args.mean[c] : 0,
                        inv_std = args.mean ? args.inv_std[c] : 1;
            if (args.delta && !args.view) {
                const float* delta =
                    load_delta(buffer, args.delta, args.delta_dtype, first + at, n, unit);
                by_turns(args, next, n, [&](int64_t i, int64_t count) {
                    for (int64_t k = i; k < i + count; k++)
                        y[k] = (y[k] + delta[k] - mean) * inv_std;
                });
            } else if (args.mean) {
                for (int64_t i = 0; i < n; i++) y[i] = (y[i] - mean) * inv_std;
            }
            if (args.out_dtype != DType::f32) narrow(half + slot, args.out_dtype, y, n);
            if (together && c < 2) continue;
            if (args.out_dtype == DType::f32)
                write_input(args, b, at, n, x, c, together ? 3 : 1);
            else
                write_input(args, b, at, n, half, c, together ? 3 : 1);
        }
}
