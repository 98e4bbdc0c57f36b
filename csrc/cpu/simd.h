// Vectors of the level's width, and the few operations that C++ operators on them do not give.
// Sums over rows go through partial sums of this many: shorter chains of roundings.
constexpr int GROUP = 64;

#define MIUE_INLINE static inline __attribute__((always_inline))

typedef float f32v __attribute__((vector_size(MIUE_BYTES)));
typedef double f64v __attribute__((vector_size(MIUE_BYTES)));
typedef int32_t i32v __attribute__((vector_size(MIUE_BYTES)));
typedef int64_t i64v __attribute__((vector_size(MIUE_BYTES)));
// as many doubles as f32v has floats
typedef double wide_f32v __attribute__((vector_size(2 * MIUE_BYTES)));

template <class T>
struct Simd;
template <>
struct Simd<float> {
    using V = f32v;
    using I = i32v;
    using Wide = wide_f32v;
};
template <>
struct Simd<double> {
    using V = f64v;
    using I = i64v;
    using Wide = f64v;
};
template <class T>
using V = typename Simd<T>::V;
template <class T>
constexpr int LANES = MIUE_BYTES / sizeof(T);

template <class T>
MIUE_INLINE V<T> load(const T* from) {
    V<T> v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
}
typedef float half_f32v __attribute__((vector_size(MIUE_BYTES / 2)));
MIUE_INLINE f64v doubles(const double* from) { return load(from); }
MIUE_INLINE f64v doubles(const float* from) {
    half_f32v v;
    __builtin_memcpy(&v, from, sizeof v);
    return __builtin_convertvector(v, f64v);
}
template <class T>
MIUE_INLINE void store(T* to, V<T> v) {
    __builtin_memcpy(to, &v, sizeof v);
}
template <class T>
MIUE_INLINE V<T> all(T x) {
    return x - V<T>{};
}

#if MIUE_BYTES == 64
MIUE_INLINE f32v fma(f32v a, f32v b, f32v c) {
    return f32v(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
}
MIUE_INLINE f64v fma(f64v a, f64v b, f64v c) {
    return f64v(_mm512_fmadd_pd(__m512d(a), __m512d(b), __m512d(c)));
}
#elif MIUE_BYTES == 32
MIUE_INLINE f32v fma(f32v a, f32v b, f32v c) {
    return f32v(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
}
MIUE_INLINE f64v fma(f64v a, f64v b, f64v c) {
    return f64v(_mm256_fmadd_pd(__m256d(a), __m256d(b), __m256d(c)));
}
#else
MIUE_INLINE f32v fma(f32v a, f32v b, f32v c) { return a * b + c; }
MIUE_INLINE f64v fma(f64v a, f64v b, f64v c) { return a * b + c; }
#endif

template <class U>
MIUE_INLINE double add_lanes(const U& v) {
    double total = 0;
    for (unsigned l = 0; l < sizeof(U) / sizeof(v[0]); l++) total += v[l];
    return total;
}

// exp(x) to about 1 ulp, denormals included; NaN stays NaN. x = n ln 2 + r, Taylor in r, 2^n in two
// factors because n reaches -150.
template <class T>
struct Exp;
template <>
struct Exp<float> {
    static constexpr float low = -104, high = 89, magic = 12582912, log2e = 1.44269504f,
                           ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    static constexpr int mantissa = 23, bias = 127, terms = 8;
};
template <>
struct Exp<double> {
    static constexpr double low = -746, high = 710, magic = 6755399441055744,
                            log2e = 1.4426950408889634, ln2_high = 6.93147180369123816490e-01,
                            ln2_low = 1.90821492927058770002e-10;
    static constexpr int mantissa = 52, bias = 1023, terms = 14;
};
constexpr double INVERSE_FACTORIAL[] = {1,
                                        1,
                                        1. / 2,
                                        1. / 6,
                                        1. / 24,
                                        1. / 120,
                                        1. / 720,
                                        1. / 5040,
                                        1. / 40320,
                                        1. / 362880,
                                        1. / 3628800,
                                        1. / 39916800,
                                        1. / 479001600,
                                        1. / 6227020800};

template <class T>
MIUE_INLINE V<T> exp(V<T> x) {
    using E = Exp<T>;
    using I = typename Simd<T>::I;
    x = x < E::low ? all<T>(E::low) : x;
    x = x > E::high ? all<T>(E::high) : x;
    const V<T> shifted = fma(x, all<T>(E::log2e), all<T>(E::magic));
    const V<T> n = shifted - E::magic;
    const V<T> r = fma(n, all<T>(-E::ln2_low), fma(n, all<T>(-E::ln2_high), x));
    V<T> p = all<T>(T(INVERSE_FACTORIAL[E::terms - 1]));
#pragma GCC unroll 16
    for (int k = E::terms - 2; k >= 0; k--) p = fma(p, r, all<T>(T(INVERSE_FACTORIAL[k])));
    const I power = I(shifted) - I(all<T>(E::magic)), half = power >> 1;
    return p * V<T>((half + E::bias) << E::mantissa) *
           V<T>((power - half + E::bias) << E::mantissa);
}
