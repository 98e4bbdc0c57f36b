// The register tile of every matrix product here: MR x NR, both operands packed with the summed index outermost.
#if MIUE_BYTES == 64
constexpr int MR = 8, NV = 2;
#elif MIUE_BYTES == 32
constexpr int MR = 4, NV = 3;
#else
constexpr int MR = 4, NV = 2;
#endif
template <class T>
constexpr int NR = NV * LANES<T>;

// Longest chain of additions in one tile: chains are summed apart, which keeps their roundings from piling up.
constexpr int64_t CHAIN = 256;

// c[MR, NR] (+)= sum_k a[k * stride + 0..MR) x b[k * NR + 0..NR)
template <class T>
static void tile(const T* a, int64_t stride, const T* b, int64_t depth, T* c, int64_t ld, bool add) {
    V<T> acc[MR][NV] = {};
    for (int64_t k = 0; k < depth; k++, a += stride, b += NR<T>) {
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

// out[NR, NR] = in[NR, NR] transposed, both contiguous
template <class T>
static void transpose(T* __restrict out, const T* __restrict in) {
    for (int r = 0; r < NR<T>; r++)
        for (int c = 0; c < NR<T>; c++) out[r * NR<T> + c] = in[c * NR<T> + r];
}
