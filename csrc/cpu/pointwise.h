// Kernels of projected_step and perturbed_input: dtypes are widened into short float buffers, one plain loop does the arithmetic.
constexpr int64_t CHUNK = 1024;

template <class T>
static void step_loop(T* __restrict out, const T* __restrict delta, const T* __restrict grad, const T* __restrict image, int64_t n, T alpha,
                      T eps) {
    for (int64_t i = 0; i < n; i++) {
        const T g = grad[i], move = g > 0 ? alpha : g < 0 ? -alpha : T(0);
        T d = delta[i] - move;
        d = d < -eps ? -eps : d;
        d = d > eps ? eps : d;
        T x = image[i] + d;
        x = x < 0 ? T(0) : x;
        x = x > 1 ? T(1) : x;
        out[i] = x - image[i];
    }
}

static void step(const ProjectedStepArgs& args, int64_t from, int64_t to) {
    if (args.dtype == DType::f64 || args.dtype == DType::f32) {
        const auto run = [&](auto zero) {
            using T = decltype(zero);
            step_loop(static_cast<T*>(args.out) + from, static_cast<const T*>(args.delta) + from, static_cast<const T*>(args.grad) + from,
                      static_cast<const T*>(args.image) + from, to - from, T(args.alpha), T(args.eps));
        };
        args.dtype == DType::f64 ? run(0.0) : run(0.0f);
        return;
    }
    const auto half = [](const void* base, int64_t at) { return static_cast<const uint16_t*>(base) + at; };
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
static void load_pixels(float* __restrict out, const void* plane, DType dtype, int64_t W, int64_t from, int64_t n, bool flip) {
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
        const int64_t w = (from + i) % W, row = from + i - w, run = W - w < n - i ? W - w : n - i, last = row + W - 1 - w;
        if (dtype == DType::u8)
            for (int64_t k = 0; k < run; k++) out[i + k] = float(bytes[last - k]) / 255.0f;
        else
            for (int64_t k = 0; k < run; k++) out[i + k] = floats[last - k];
        i += run;
    }
}

static void load_delta(float* __restrict out, const void* store, DType dtype, int64_t at, int64_t n, float unit) {
    if (dtype == DType::i8) {
        const int8_t* levels = static_cast<const int8_t*>(store) + at;
        for (int64_t i = 0; i < n; i++) out[i] = float(levels[i]) * unit;
    } else {
        widen(out, static_cast<const char*>(store) + at * size_of(dtype), dtype, n);
    }
}

static void store_delta(void* store, DType dtype, int64_t at, float* __restrict values, int64_t n, float per_unit) {
    if (dtype == DType::i8) {
        int8_t* levels = static_cast<int8_t*>(store) + at;
        for (int64_t i = 0; i < n; i++) {
            float level = values[i] * per_unit + 12582912.0f - 12582912.0f;  // rounds half to even below 2^22
            level = level < -127 ? -127 : level;
            level = level > 127 ? 127 : level;
            levels[i] = int8_t(int(level == level ? level : 0));
        }
    } else {
        narrow(static_cast<char*>(store) + at * size_of(dtype), dtype, values, n);
    }
}

template <class U, int STEP>
static void gather(U* __restrict out, const U* __restrict in, int64_t n, int64_t step) {
    for (int64_t i = 0; i < n; i++) out[i] = in[i * (STEP ? STEP : step)];
}

// Pixels [from, from + n) of one channel of the gradient; `base` is the channel's first element, strides in elements.
template <class U>
static const U* pixels_of(const U* base, int64_t row_stride, int64_t stride, int64_t W, int64_t from, int64_t n, U* buffer) {
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

static int64_t step_inplace(const ProjectedStepInplaceArgs& args, int64_t b, int64_t from, int64_t to) {
    const int64_t plane = args.H * args.W, row = args.index ? args.index[b] : b;
    const float unit = float(args.eps / 127), per_unit = float(127 / args.eps);
    const bool flip = args.flip && args.flip[b];
    float out[CHUNK], delta[CHUNK], grad[CHUNK], image[CHUNK];
    uint16_t half[CHUNK];
    int64_t nonfinite = 0;
    for (int64_t at = from; at < to; at += CHUNK)
        for (int64_t c = 0; c < args.C; c++) {
            const int64_t n = to - at < CHUNK ? to - at : CHUNK, first = (row * args.C + c) * plane;
            const int64_t base = b * args.grad_stride[0] + c * args.grad_stride[1];
            const float* g = grad;
            if (args.grad_dtype == DType::f32)
                g = pixels_of(static_cast<const float*>(args.grad) + base, args.grad_stride[2], args.grad_stride[3], args.W, at, n, grad);
            else
                widen(grad, pixels_of(static_cast<const uint16_t*>(args.grad) + base, args.grad_stride[2], args.grad_stride[3], args.W, at, n,
                                      half),
                      args.grad_dtype, n);
            if (args.nonfinite) {
                int32_t count = 0;
                for (int64_t i = 0; i < n; i++) count += (bits(g[i]) & 0x7f800000) == 0x7f800000;
                nonfinite += count;
            }
            const char* images = static_cast<const char*>(args.images) + first * size_of(args.image_dtype);
            load_pixels(image, images, args.image_dtype, args.W, at, n, flip);
            load_delta(delta, args.delta, args.delta_dtype, first + at, n, unit);
            step_loop(out, delta, g, image, n, float(args.alpha), float(args.eps));
            store_delta(args.delta, args.delta_dtype, first + at, out, n, per_unit);
        }
    return nonfinite;
}

template <class U, int C>
static void interleave(U* __restrict out, const U* __restrict in, int64_t n, int64_t c, int64_t channels) {
    if (C == 0)
        for (int64_t i = 0; i < n; i++) out[i * channels + c] = in[i];
    else
        for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 4
            for (int k = 0; k < C; k++) out[i * C + k] = in[k * CHUNK + i];
}

template <class U>
static void write_input(const PerturbedInputArgs& args, int64_t b, int64_t at, int64_t n, const U* in, int64_t c, int64_t buffered) {
    U* image = static_cast<U*>(args.out) + b * args.C * args.H * args.W;
    if (!args.channels_last)
        __builtin_memcpy(image + c * args.H * args.W + at, in, n * sizeof(U));
    else if (buffered == 3)
        interleave<U, 3>(image + at * 3, in, n, 0, 3);
    else
        interleave<U, 0>(image + at * args.C, in, n, c, args.C);
}

static void input(const PerturbedInputArgs& args, int64_t b, int64_t from, int64_t to) {
    const int64_t plane = args.H * args.W, row = args.index ? args.index[b] : b;
    const float unit = float(args.eps / 127);
    const bool flip = args.flip && args.flip[b], together = args.channels_last && args.C == 3;
    float x[3 * CHUNK], delta[CHUNK];
    uint16_t half[3 * CHUNK];
    for (int64_t at = from; at < to; at += CHUNK)
        for (int64_t c = 0; c < args.C; c++) {
            const int64_t n = to - at < CHUNK ? to - at : CHUNK, first = (row * args.C + c) * plane, slot = together ? c * CHUNK : 0;
            float* y = x + slot;
            load_pixels(y, static_cast<const char*>(args.images) + first * size_of(args.image_dtype), args.image_dtype, args.W,
                        at, n, flip);
            if (args.delta) {
                load_delta(delta, args.delta, args.delta_dtype, first + at, n, unit);
                for (int64_t i = 0; i < n; i++) y[i] = y[i] + delta[i];
            }
            if (args.mean) {
                const float mean = args.mean[c], inv_std = args.inv_std[c];
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
