// Kernels of intra_class_distance: BLOCK rows against a run of rows of the same class, by direct
// differences.
constexpr int BLOCK = 4;
constexpr int OTHERS = MIUE_BYTES == 64 ? 4 : 2;  // BLOCK * OTHERS sums stay in registers

template <class T>
static double sum(const T* values, int64_t n) {
    typename Simd<T>::Wide total{};
    int64_t j = 0;
    for (; j + LANES<T> <= n; j += LANES<T>)
        total += __builtin_convertvector(load(values + j), typename Simd<T>::Wide);
    double rest = add_lanes(total);
    for (; j < n; j++) rest += double(values[j]);
    return rest;
}

// ||a - b|| where the plain sum of squares may have lost something to overflow or underflow: once
// more, times a power of two.
template <class T>
static double rescaled(const T* a, const T* b, int64_t n, double plain) {
    constexpr int most = sizeof(T) == sizeof(float) ? 126 : 1022;
    V<T> largest{};
    for (int64_t k = 0; k < n; k += LANES<T>) {
        V<T> d = load(a + k) - load(b + k);
        d = d < 0 ? -d : d;
        largest = d > largest ? d : largest;
    }
    double top = 0;
    for (int l = 0; l < LANES<T>; l++) top = largest[l] > top ? largest[l] : top;
    if (top == 0 || plain != plain || !__builtin_isfinite(top)) return __builtin_sqrt(plain);
    int exponent = __builtin_ilogb(top);
    exponent = exponent < -most ? -most : exponent > most ? most : exponent;
    const V<T> scale = all(T(__builtin_ldexp(1, -exponent)));
    V<T> squares{};
    for (int64_t k = 0; k < n; k += LANES<T>) {
        const V<T> d = (load(a + k) - load(b + k)) * scale;
        squares = fma(d, d, squares);
    }
    return __builtin_ldexp(__builtin_sqrt(add_lanes(squares)), exponent);
}

template <class T>
static double distance_of(const T* a, const T* b, int64_t n, double squares) {
    // squares that count are normal numbers from here on
    constexpr double low = sizeof(T) == sizeof(float) ? 0x1p-100 : 0x1p-900;
    const bool sure = (squares >= low && squares <= __DBL_MAX__) || (a == b && squares == 0);
    return sure ? __builtin_sqrt(squares) : rescaled(a, b, n, squares);
}

template <class T>
static void distances(const T* f, int64_t stride, int64_t n, int64_t i, int64_t rows, int64_t from,
                      int64_t count, T* out, int64_t ld) {
    for (int64_t j = 0; j < count; j += OTHERS) {
        const T *a[BLOCK], *b[OTHERS];  // past the end: the last row once more
        for (int r = 0; r < BLOCK; r++) a[r] = f + (i + (r < rows ? r : rows - 1)) * stride;
        for (int c = 0; c < OTHERS; c++)
            b[c] = f + (from + (j + c < count ? j + c : count - 1)) * stride;
        V<T> acc[BLOCK][OTHERS] = {};
        for (int64_t k = 0; k < n; k += LANES<T>) {
            V<T> bv[OTHERS];
#pragma GCC unroll 4
            for (int c = 0; c < OTHERS; c++) bv[c] = load(b[c] + k);
#pragma GCC unroll 4
            for (int r = 0; r < BLOCK; r++) {
                const V<T> av = load(a[r] + k);
#pragma GCC unroll 4
                for (int c = 0; c < OTHERS; c++) {
                    const V<T> difference = av - bv[c];
                    acc[r][c] = fma(difference, difference, acc[r][c]);
                }
            }
        }
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < OTHERS && j + c < count; c++)
                out[r * ld + j + c] = T(distance_of(a[r], b[c], n, add_lanes(acc[r][c])));
    }
}

template <class T>
static void pull(const T* f, int64_t stride, const double* share, int64_t i, int64_t rows,
                 int64_t from, int64_t count, T* weights, int64_t ld, T* grad) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < count; j++) {
            const double distance = weights[r * ld + j], own = 1 / share[i + r];
            constexpr double least = sizeof(T) == sizeof(float) ? __FLT_MIN__ : __DBL_MIN__;
            weights[r * ld + j] =
                distance < least ? T(0) : T((1 + own * share[from + j]) / distance);
        }
    for (int64_t k = 0; k < stride; k += LANES<T>) {
        V<T> total[BLOCK], own[BLOCK];
        for (int r = 0; r < BLOCK; r++) {
            total[r] = load(grad + r * stride + k);
            own[r] = load(f + (i + (r < rows ? r : 0)) * stride + k);
        }
        for (int64_t group = 0; group < count; group += GROUP) {
            V<T> part[BLOCK] = {};
            for (int64_t j = group; j < count && j < group + GROUP; j++) {
                const V<T> other = load(f + (from + j) * stride + k);
#pragma GCC unroll 4
                for (int r = 0; r < BLOCK; r++)
                    part[r] =
                        fma(own[r] - other, all(weights[(r < rows ? r : 0) * ld + j]), part[r]);
            }
            for (int r = 0; r < BLOCK; r++) total[r] += part[r];
        }
        for (int r = 0; r < BLOCK; r++) store(grad + r * stride + k, total[r]);
    }
}

template <class T>
static void finish(T* out, const T* values, const T* addend, T weight, double share, int64_t n) {
    for (int64_t k = 0; k < n; k++)
        out[k] = (addend ? addend[k] : T(0)) + weight * T(double(values[k]) * share);
}
