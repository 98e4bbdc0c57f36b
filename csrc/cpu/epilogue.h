// Kernels of conv_epilogue_ and conv_grad_epilogue_, in words of 64 values with one ReLU bit each.
constexpr int64_t WORD = 64;

// Flags: one per lane of a vector. AVX-512 has them as bits, the other levels as lanes of 0 and -1.
#if MIUE_BYTES == 64
template <class T>
using Flags = uint64_t;
MIUE_INLINE uint64_t positive(f32v v) {
    return _mm512_cmp_ps_mask(__m512(v), _mm512_setzero_ps(), _CMP_NLE_UQ);
}
MIUE_INLINE uint64_t positive(f64v v) {
    return _mm512_cmp_pd_mask(__m512d(v), _mm512_setzero_pd(), _CMP_NLE_UQ);
}
MIUE_INLINE f32v zero_unless(uint64_t flags, f32v v) {
    return f32v(_mm512_maskz_mov_ps(__mmask16(flags), __m512(v)));
}
MIUE_INLINE f64v zero_unless(uint64_t flags, f64v v) {
    return f64v(_mm512_maskz_mov_pd(__mmask8(flags), __m512d(v)));
}
MIUE_INLINE uint64_t to_bits(uint64_t flags) { return flags; }
template <class T>
MIUE_INLINE uint64_t flags_at(uint64_t word, int64_t k) {
    return word >> k;
}
#else
template <class T>
using Flags = typename Simd<T>::I;
template <class U>
MIUE_INLINE auto positive(U v) {  // NaN counts
    return ~(v <= U{});
}
template <class I, class U>
MIUE_INLINE U zero_unless(I flags, U v) {
    return U(I(v) & flags);
}

template <class T>
constexpr int64_t LANE_BITS = 8 * sizeof(T);
// Bits k, k + 1 and so on of a word, one per lane.
template <class T>
MIUE_INLINE Flags<T> bits_at(int64_t k) {
    Flags<T> bits;
#pragma GCC unroll 8
    for (int64_t l = 0; l < LANES<T>; l++) bits[l] = uint64_t(1) << (k + l) % LANE_BITS<T>;
    return bits;
}
template <class T>
MIUE_INLINE Flags<T> flags_at(uint64_t word, int64_t k) {
    Flags<T> spread;
#pragma GCC unroll 8
    for (int64_t l = 0; l < LANES<T>; l++) spread[l] = word >> k / LANE_BITS<T> * LANE_BITS<T>;
    return (spread & bits_at<T>(k)) != 0;
}
#endif

// Collects the flags of 64 values.
#if MIUE_BYTES > 16
#if MIUE_BYTES == 32
MIUE_INLINE uint64_t to_bits(i32v flags) { return unsigned(_mm256_movemask_ps(__m256(flags))); }
MIUE_INLINE uint64_t to_bits(i64v flags) { return unsigned(_mm256_movemask_pd(__m256d(flags))); }
#endif
template <class T>
struct Word {
    uint64_t word = 0;
    inline __attribute__((always_inline)) void set(int64_t k, Flags<T> flags) {
        word |= to_bits(flags) << k;
    }
    inline __attribute__((always_inline)) uint64_t bits() const { return word; }
};
#else
template <class T>
struct Word {
    Flags<T> part[WORD / LANE_BITS<T>] = {};  // each lane of a part has some of its bits
    inline __attribute__((always_inline)) void set(int64_t k, Flags<T> flags) {
        part[k / LANE_BITS<T>] |= flags & bits_at<T>(k);
    }
    inline __attribute__((always_inline)) uint64_t bits() const {
        const i64v first = i64v(part[0]);
        const uint64_t low = first[0] | first[1];
        if (sizeof(T) == 8) return low;
        const i64v last = i64v(part[WORD / LANE_BITS<T> - 1]);
        const uint64_t high = last[0] | last[1];
        return uint32_t(low | low >> 32) | (high | high << 32) >> 32 << 32;
    }
};
#endif

// `bias` may be read WORD - 1 values past its end, where it starts anew; `channel` is the first
// value's.
template <class T>
static void epilogue_words(T* y, const T* residual, const T* bias, int64_t channels,
                           int64_t channel, bool relu, uint8_t* mask, int64_t words) {
    const int64_t step = WORD % channels;
    for (int64_t w = 0; w < words; w++) {
        Word<T> found;
#pragma GCC unroll 32
        for (int64_t k = 0; k < WORD; k += LANES<T>) {
            V<T> v = load(y + w * WORD + k);
            if (bias) v += load(bias + channel + k);
            if (residual) v += load(residual + w * WORD + k);
            const Flags<T> flags = positive(v);
            if (relu) v = zero_unless(flags, v);
            store(y + w * WORD + k, v);
            found.set(k, flags);
        }
        const uint64_t word = found.bits();
        if (mask) __builtin_memcpy(mask + w * sizeof word, &word, sizeof word);
        channel += step;
        if (channel >= channels) channel -= channels;
    }
}

template <class T>
static void grad_words(T* grad, const T* addend, const uint8_t* mask, int64_t words) {
    for (int64_t w = 0; w < words; w++) {
        uint64_t word = ~uint64_t(0);
        if (mask) __builtin_memcpy(&word, mask + w * sizeof word, sizeof word);
#pragma GCC unroll 32
        for (int64_t k = 0; k < WORD; k += LANES<T>) {
            V<T> v = load(grad + w * WORD + k);
            if (addend) v += load(addend + w * WORD + k);
            store(grad + w * WORD + k, zero_unless(flags_at<T>(word, k), v));
        }
    }
}

// Values of any dtype, also less than a word, through buffers of T.
template <class T>
static void epilogue_through(const ConvEpilogueArgs& a, int64_t from, int64_t to) {
    T v[CHUNK], r[CHUNK];
    for (int64_t at = from; at < to; at += CHUNK) {
        const int64_t n = to - at < CHUNK ? to - at : CHUNK, words = (n + WORD - 1) / WORD;
        char* y = static_cast<char*>(a.y) + at * size_of(a.dtype);
        for (int64_t i = n; i < words * WORD; i++) v[i] = r[i] = 0;
        widen(v, y, a.dtype, n);
        if (a.residual)
            widen(r, static_cast<const char*>(a.residual) + at * size_of(a.dtype), a.dtype, n);
        epilogue_words<T>(v, a.residual ? r : nullptr, static_cast<const T*>(a.bias), a.channels,
                          at % a.channels, a.relu, nullptr, words);
        narrow(y, a.dtype, v, n);
        if (!a.mask) continue;
        widen(v, y, a.dtype, n);  // the bits are those of the rounded values
        for (int64_t i = n; i < words * WORD; i++) v[i] = 0;
        epilogue_words<T>(v, nullptr, nullptr, 1, 0, false, a.mask + at / 8, words);
    }
}

template <class T>
static void grad_through(const ConvGradEpilogueArgs& a, int64_t from, int64_t to) {
    T v[CHUNK], r[CHUNK];
    for (int64_t at = from; at < to; at += CHUNK) {
        const int64_t n = to - at < CHUNK ? to - at : CHUNK, words = (n + WORD - 1) / WORD;
        char* grad = static_cast<char*>(a.grad) + at * size_of(a.dtype);
        for (int64_t i = n; i < words * WORD; i++) v[i] = r[i] = 0;
        widen(v, grad, a.dtype, n);
        if (a.addend)
            widen(r, static_cast<const char*>(a.addend) + at * size_of(a.dtype), a.dtype, n);
        grad_words<T>(v, a.addend ? r : nullptr, a.mask ? a.mask + at / 8 : nullptr, words);
        narrow(grad, a.dtype, v, n);
    }
}

// Values [from, to), where `from` begins a word: whole words of float and double in place, the rest
// through buffers.
static void epilogue(const ConvEpilogueArgs& a, int64_t from, int64_t to) {
    const auto run = [&](auto zero, DType own) {
        using T = decltype(zero);
        const int64_t words = a.dtype == own ? (to - from) / WORD : 0;
        const T* residual = static_cast<const T*>(a.residual);
        epilogue_words<T>(static_cast<T*>(a.y) + from, residual ? residual + from : nullptr,
                          static_cast<const T*>(a.bias), a.channels, from % a.channels, a.relu,
                          a.mask ? a.mask + from / 8 : nullptr, words);
        epilogue_through<T>(a, from + words * WORD, to);
    };
    a.dtype == DType::f64 ? run(0.0, DType::f64) : run(0.0f, DType::f32);
}

static void grad_epilogue(const ConvGradEpilogueArgs& a, int64_t from, int64_t to) {
    const auto run = [&](auto zero, DType own) {
        using T = decltype(zero);
        const int64_t words = a.dtype == own ? (to - from) / WORD : 0;
        const T* addend = static_cast<const T*>(a.addend);
        grad_words<T>(static_cast<T*>(a.grad) + from, addend ? addend + from : nullptr,
                      a.mask ? a.mask + from / 8 : nullptr, words);
        grad_through<T>(a, from + words * WORD, to);
    };
    a.dtype == DType::f64 ? run(0.0, DType::f64) : run(0.0f, DType::f32);
}
