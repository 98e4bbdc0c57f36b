// Rows of one dtype to and from rows of float. bf16 and the generic f16 are bit arithmetic; f16
// elsewhere is one instruction.
MIUE_INLINE uint32_t bits(float x) {
    uint32_t u;
    __builtin_memcpy(&u, &x, 4);
    return u;
}
MIUE_INLINE float real(uint32_t u) {
    float x;
    __builtin_memcpy(&x, &u, 4);
    return x;
}

MIUE_INLINE float from_bf16(uint16_t h) { return real(uint32_t(h) << 16); }
MIUE_INLINE uint16_t to_bf16(float x) {
    const uint32_t u = bits(x);
    return x != x ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
MIUE_INLINE float from_f16(uint16_t h) {
    const uint32_t magnitude = uint32_t(h & 0x7fff) << 13;
    // times 2^112 moves the exponent's bias and makes f16 denormals normal
    const uint32_t u =
        magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bits(real(magnitude) * 0x1p112f);
    return real(u | uint32_t(h & 0x8000) << 16);
}
MIUE_INLINE uint16_t to_f16(float x) {
    const uint32_t u = bits(x), magnitude = u & 0x7fffffff;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // 0.5f has the f16 denormals' spacing in its last bit
    const uint32_t denormal = bits(real(magnitude) + 0.5f) - bits(0.5f);
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00 : 0x7c00;
    const uint32_t h = magnitude >= 0x47800000u  ? special
                       : magnitude < 0x38800000u ? denormal
                                                 : normal;
    return uint16_t(h | (u >> 16 & 0x8000));
}

static void f16_to_float(float* __restrict out, const uint16_t* __restrict in, int64_t n) {
    int64_t i = 0;
#if MIUE_BYTES == 64
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(
            out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i))));
#elif MIUE_BYTES == 32
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(
            out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
    for (; i < n; i++) out[i] = from_f16(in[i]);
}
static void float_to_f16(uint16_t* __restrict out, const float* __restrict in, int64_t n) {
    int64_t i = 0;
#if MIUE_BYTES == 64
    for (; i + 16 <= n; i += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                            _mm512_cvtps_ph(_mm512_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#elif MIUE_BYTES == 32
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < n; i++) out[i] = to_f16(in[i]);
}

// memcpy that takes null pointers where there is nothing to copy: an empty tensor has no memory.
MIUE_INLINE void copy(void* out, const void* in, int64_t bytes) {
    if (bytes) __builtin_memcpy(out, in, bytes);
}

// Values of one float dtype to float or double, and back with one rounding per step.
MIUE_INLINE void widen(float* __restrict out, const void* in, DType dtype, int64_t n) {
    const uint16_t* half = static_cast<const uint16_t*>(in);
    if (dtype == DType::f16)
        f16_to_float(out, half, n);
    else if (dtype == DType::bf16)
        for (int64_t i = 0; i < n; i++) out[i] = from_bf16(half[i]);
    else
        copy(out, in, n * sizeof(float));
}
MIUE_INLINE void narrow(void* out, DType dtype, const float* __restrict in, int64_t n) {
    uint16_t* half = static_cast<uint16_t*>(out);
    if (dtype == DType::f16)
        float_to_f16(half, in, n);
    else if (dtype == DType::bf16)
        for (int64_t i = 0; i < n; i++) half[i] = to_bf16(in[i]);
    else
        copy(out, in, n * sizeof(float));
}

MIUE_INLINE int64_t size_of(DType dtype) {
    return dtype == DType::f64                           ? 8
           : dtype == DType::f32                         ? 4
           : dtype == DType::f16 || dtype == DType::bf16 ? 2
                                                         : 1;
}
constexpr int64_t THROUGH = 64;  // doubles pass through float in pieces of this size
MIUE_INLINE void widen(double* __restrict out, const void* in, DType dtype, int64_t n) {
    if (dtype == DType::f64) {
        copy(out, in, n * sizeof(double));
        return;
    }
    float piece[THROUGH];
    for (int64_t from = 0; from < n; from += THROUGH) {
        const int64_t count = n - from < THROUGH ? n - from : THROUGH;
        widen(piece, static_cast<const char*>(in) + from * size_of(dtype), dtype, count);
        for (int64_t i = 0; i < count; i++) out[from + i] = double(piece[i]);
    }
}
MIUE_INLINE void narrow(void* out, DType dtype, const double* __restrict in, int64_t n) {
    if (dtype == DType::f64) {
        copy(out, in, n * sizeof(double));
        return;
    }
    float piece[THROUGH];
    for (int64_t from = 0; from < n; from += THROUGH) {
        const int64_t count = n - from < THROUGH ? n - from : THROUGH;
        for (int64_t i = 0; i < count; i++) piece[i] = float(in[from + i]);
        narrow(static_cast<char*>(out) + from * size_of(dtype), dtype, piece, count);
    }
}

template <class T>
static void convert(T* out, const void* in, DType dtype, int64_t n) {
    widen(out, in, dtype, n);
}
