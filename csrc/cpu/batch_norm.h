// Batch norm in training on rows [from, to) of an NHWC tensor: channels in whole vectors, sums in
// groups of GROUP rows of float that are added up in double.
typedef uint16_t half_bits __attribute__((vector_size(MIUE_BYTES / 2)));
typedef uint32_t float_bits __attribute__((vector_size(MIUE_BYTES)));

MIUE_INLINE f32v load_values(const float* from) { return load(from); }
MIUE_INLINE f32v load_values(const uint16_t* from) {
#if MIUE_BYTES == 64  // GCC makes four instructions of the general form
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return f32v(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
#elif MIUE_BYTES == 32
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return f32v(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
#else
    half_bits h;
    __builtin_memcpy(&h, from, sizeof h);
    return f32v(__builtin_convertvector(h, float_bits) << 16);
#endif
}
MIUE_INLINE void store_values(float* to, f32v v) { store(to, v); }
MIUE_INLINE void store_values(uint16_t* to, f32v v) {  // as to_bf16
    const float_bits u = float_bits(v), rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    const float_bits nan = float_bits(v != v);
    const half_bits h = __builtin_convertvector((rounded & ~nan) | (0x7fc0 & nan), half_bits);
    __builtin_memcpy(to, &h, sizeof h);
}

template <int N>
struct Count {
    static constexpr int value = N;
};

// The result before ReLU; the same bits wherever it is computed.
MIUE_INLINE f32v normalised(f32v x, f32v mean, f32v scale, f32v bias) {
    return fma(x - mean, scale, bias);
}
// 0 where ReLU of the rounded result is 0; a NaN result keeps the gradient.
template <class T>
MIUE_INLINE f32v through_relu(f32v grad, f32v result) {
    // Half of the smallest bfloat16 is rounded to 0. A difference is 0 only between equal numbers.
    return zero_unless(positive(sizeof(T) == 2 ? result - 0x1p-134f : result), grad);
}

// work(c, Count<N>()) on N vectors of channels from c on, until all of them are done.
template <class Work>
MIUE_INLINE void over_channels(int64_t channels, const Work& work) {
    constexpr int64_t L = LANES<float>, MOST = MIUE_BYTES == 64 ? 4 : 2;
    int64_t c = 0;
    for (; c + MOST * L <= channels; c += MOST * L) work(c, Count<MOST>());
    for (; c + L <= channels; c += L) work(c, Count<1>());
}

// sums[0][c] = sum of x - shift, sums[1][c] = sum of (x - shift)^2; or, with a gradient, sums of it
// and of its product with x - mean.
template <class T, bool BACK>
static void batch_norm_sums_of(const BatchNormJob& a, int64_t from, int64_t to, double* sums) {
    constexpr int64_t L = LANES<float>;
    const int64_t C = a.channels;
    const T *x = static_cast<const T*>(a.x), *grad = static_cast<const T*>(a.grad);
    over_channels(C, [&](int64_t c, auto count) __attribute__((always_inline)) {
        constexpr int N = decltype(count)::value;
        f32v centre[N], scale[N], bias[N];
        double total[2][N * L] = {};
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
            centre[n] = load(a.centre + c + n * L);
            if (BACK) scale[n] = load(a.scale + c + n * L), bias[n] = load(a.shift + c + n * L);
        }
        for (int64_t begin = from; begin < to; begin += GROUP) {
            const int64_t end = begin + GROUP < to ? begin + GROUP : to;
            f32v first[N] = {}, second[N] = {};
            for (int64_t row = begin; row < end; row++)
#pragma GCC unroll 4
                for (int n = 0; n < N; n++) {
                    const int64_t at = row * C + c + n * L;
                    const f32v value = load_values(x + at), far = value - centre[n];
                    f32v v = far;
                    if (BACK) {
                        v = load_values(grad + at);
                        if (a.relu)
                            v = through_relu<T>(v, normalised(value, centre[n], scale[n], bias[n]));
                    }
                    first[n] += v;
                    second[n] = fma(v, far, second[n]);
                }
            for (int n = 0; n < N; n++)
                for (int l = 0; l < L; l++)
                    total[0][n * L + l] += first[n][l], total[1][n * L + l] += second[n][l];
        }
        for (int64_t k = 0; k < N * L; k++)
            sums[c + k] = total[0][k], sums[C + c + k] = total[1][k];
    });
}

// out = (x - mean) scale + shift, or 0 where that is negative.
template <class T>
static void batch_norm_out_of(const BatchNormJob& a, int64_t from, int64_t to) {
    constexpr int64_t L = LANES<float>;
    const int64_t C = a.channels;
    const T* x = static_cast<const T*>(a.x);
    T* out = static_cast<T*>(a.out);
    over_channels(C, [&](int64_t c, auto count) __attribute__((always_inline)) {
        constexpr int N = decltype(count)::value;
        f32v mean[N], scale[N], bias[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++)
            mean[n] = load(a.centre + c + n * L), scale[n] = load(a.scale + c + n * L),
            bias[n] = load(a.shift + c + n * L);
        for (int64_t row = from; row < to; row++)
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) {
                const int64_t at = row * C + c + n * L;
                store_values(out + at, normalised(load_values(x + at), mean[n], scale[n], bias[n]));
            }
    });
}

// out = scale (grad - mean of grad) - (x - mean) slope, grad as ReLU lets it through.
template <class T>
static void batch_norm_grad_of(const BatchNormJob& a, int64_t from, int64_t to) {
    constexpr int64_t L = LANES<float>;
    const int64_t C = a.channels;
    const T *x = static_cast<const T*>(a.x), *grad = static_cast<const T*>(a.grad);
    T* out = static_cast<T*>(a.out);
    over_channels(C, [&](int64_t c, auto count) __attribute__((always_inline)) {
        constexpr int N = decltype(count)::value;
        f32v mean[N], scale[N], bias[N], slope[N], rest[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++)
            mean[n] = load(a.centre + c + n * L), scale[n] = load(a.scale + c + n * L),
            bias[n] = load(a.shift + c + n * L), slope[n] = load(a.slope + c + n * L),
            rest[n] = load(a.rest + c + n * L);
        for (int64_t row = from; row < to; row++)
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) {
                const int64_t at = row * C + c + n * L;
                const f32v value = load_values(x + at);
                f32v g = load_values(grad + at);
                if (a.relu) g = through_relu<T>(g, normalised(value, mean[n], scale[n], bias[n]));
                store_values(out + at, fma(value - mean[n], slope[n], fma(g, scale[n], rest[n])));
            }
    });
}

static void batch_norm_sums(const BatchNormJob& a, int64_t from, int64_t to, double* sums) {
    const bool half = a.dtype == DType::bf16;
    if (a.grad)
        half ? batch_norm_sums_of<uint16_t, true>(a, from, to, sums)
             : batch_norm_sums_of<float, true>(a, from, to, sums);
    else
        half ? batch_norm_sums_of<uint16_t, false>(a, from, to, sums)
             : batch_norm_sums_of<float, false>(a, from, to, sums);
}

static void batch_norm_out(const BatchNormJob& a, int64_t from, int64_t to) {
    const bool half = a.dtype == DType::bf16;
    if (a.grad)
        half ? batch_norm_grad_of<uint16_t>(a, from, to) : batch_norm_grad_of<float>(a, from, to);
    else
        half ? batch_norm_out_of<uint16_t>(a, from, to) : batch_norm_out_of<float>(a, from, to);
}
