// The register tile of every matrix product here: MR x NR, both operands packed with the summed
// index outermost.
#if MIUE_BYTES == 64
constexpr int MR = 8, NV = 2;
#elif MIUE_BYTES == 32
constexpr int MR = 4, NV = 3;
#else
constexpr int MR = 4, NV = 2;
#endif
template <class T>
constexpr int NR = NV * LANES<T>;

// Longest chain of additions in one tile: chains are summed apart, which keeps their roundings from
// piling up.
constexpr int64_t CHAIN = 256;

// The left operand is read in strips of a panel, a step no prefetcher follows into a far cache: it
// is asked for this many k ahead.
constexpr int64_t LATER = 32;

// c[MR, NR] (+)= sum_k a[k * stride + 0..MR) x b[k * NR + 0..NR)
template <class T>
static void tile(const T* a, int64_t stride, const T* b, int64_t depth, T* c, int64_t ld,
                 bool add) {
    V<T> acc[MR][NV] = {};
    for (int64_t k = 0; k < depth; k++, a += stride, b += NR<T>) {
        __builtin_prefetch(a + LATER * stride);
        V<T> bv[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) bv[v] = load(b + v * LANES<T>);
#pragma GCC unroll 8
        for (int r = 0; r < MR; r++) {
            const V<T> av = all(a[r]);
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) acc[r][v] = fma(av, bv[v], acc[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) {
            T* at = c + r * ld + v * LANES<T>;
            store(at, add ? load(at) + acc[r][v] : acc[r][v]);
        }
}

// Element l of the result is element (half * LANES + l) / 2 of a for even l, of b for odd l.
template <class T, int half, int... l>
MIUE_INLINE V<T> zip(V<T> a, V<T> b, std::integer_sequence<int, l...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, ((half * LANES<T> + l) / 2 + l % 2 * LANES<T>)...);
#else
    return __builtin_shuffle(
        a, b, typename Simd<T>::I{((half * LANES<T> + l) / 2 + l % 2 * LANES<T>)...});
#endif
}

// out[NR, NR] = in[NR, NR] transposed, both contiguous, in squares of LANES rows held in registers.
// Zipping row r with row r + LANES / 2 rotates the bits of (row, column) left by one; after
// log2(LANES) times row and column have changed places.
template <class T>
static void transpose(T* __restrict out, const T* __restrict in) {
    constexpr int L = LANES<T>;
    constexpr auto lanes = std::make_integer_sequence<int, L>();
    for (int row = 0; row < NR<T>; row += L)
        for (int column = 0; column < NR<T>; column += L) {
            V<T> x[L], zipped[L];
#pragma GCC unroll 16
            for (int l = 0; l < L; l++) x[l] = load(in + (row + l) * NR<T> + column);
#pragma GCC unroll 4
            for (int stage = 1; stage < L; stage *= 2) {
#pragma GCC unroll 8
                for (int l = 0; l < L / 2; l++) {
                    zipped[2 * l] = zip<T, 0>(x[l], x[l + L / 2], lanes);
                    zipped[2 * l + 1] = zip<T, 1>(x[l], x[l + L / 2], lanes);
                }
#pragma GCC unroll 16
                for (int l = 0; l < L; l++) x[l] = zipped[l];
            }
#pragma GCC unroll 16
            for (int l = 0; l < L; l++) store(out + (column + l) * NR<T> + row, x[l]);
        }
}
