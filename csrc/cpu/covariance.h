// Kernels of class_covariance, each on panels of NR columns.

// Rows of a class lie anywhere: their memory is asked for this many rows before it is needed.
constexpr int64_t AHEAD = 16;

template <class T>
static void centre(const CovarianceJob<T>& job, int64_t k, int64_t p) {
    using Wide = typename Simd<T>::Wide;
    const ClassCovarianceArgs& args = *job.args;
    const int64_t first = job.starts[k], last = job.starts[k + 1], size = size_of(args.dtype);
    const int64_t left = args.D - p * NR<T>, width = left < NR<T> ? left : NR<T>;
    T* const rows = job.centred + (p * job.rows + first - job.begin) * NR<T>;
    const auto source_of = [&](int64_t i) {
        return static_cast<const char*>(args.features) +
               (job.order[i] * args.row_stride + p * NR<T>)*size;
    };
    Wide total[NV] = {};
    // Doubles are summed less the first of them: of equal ones the mean is exact, as it is of
    // floats summed in doubles.
    const auto origin = [&](int v) {
        return sizeof(T) == sizeof(double) && last > first
                   ? __builtin_convertvector(load(rows + v * LANES<T>), Wide)
                   : Wide{};
    };
    for (int64_t i = first; i < last; i++) {
        T* x = rows + (i - first) * NR<T>;
        const char *source = source_of(i), *later = source_of(i + AHEAD < last ? i + AHEAD : i);
        for (int64_t byte = 0; byte < width * size; byte += 64) __builtin_prefetch(later + byte);
        if (width == NR<T>) {
            widen(x, source, args.dtype, NR<T>);
        } else {
            for (int v = 0; v < NV; v++) store(x + v * LANES<T>, V<T>{});
            widen(x, source, args.dtype, width);
        }
        for (int v = 0; v < NV; v++)
            total[v] += __builtin_convertvector(load(x + v * LANES<T>), Wide) - origin(v);
    }
    // the mean as a sum of two numbers: the rounding of one would be the spread of a collapsed
    // class
    V<T> high[NV], low[NV];
    T mean[NR<T>];
    for (int v = 0; v < NV; v++) {
        total[v] = total[v] / (last > first ? double(last - first) : 1.0) + origin(v);
        high[v] = __builtin_convertvector(total[v], V<T>);
        low[v] = __builtin_convertvector(total[v] - __builtin_convertvector(high[v], Wide), V<T>);
        store(mean + v * LANES<T>, high[v]);
    }
    __builtin_memcpy(static_cast<T*>(args.means) + k * args.D + p * NR<T>, mean, width * sizeof(T));
    for (T* x = rows; x < rows + (last - first) * NR<T>; x += NR<T>)
        for (int v = 0; v < NV; v++)
            store(x + v * LANES<T>, load(x + v * LANES<T>) - high[v] - low[v]);
}

// Writes block [NR, NR] of panels p and q as far as the matrix [D, D] goes.
template <class T>
static void put(T* matrix, int64_t D, int64_t p, int64_t q, const T* block) {
    const int64_t left = D - q * NR<T>, width = left < NR<T> ? left : NR<T>;
    for (int64_t i = p * NR<T>; i < (p + 1) * NR<T> && i < D; i++, block += NR<T>)
        __builtin_memcpy(matrix + i * D + q * NR<T>, block, width * sizeof(T));
}

template <class T>
static void covariance(const CovarianceJob<T>& job, int64_t k, int64_t p, int64_t q) {
    const ClassCovarianceArgs& args = *job.args;
    const int64_t from = job.starts[k] - job.begin, count = job.starts[k + 1] - job.starts[k];
    const T *a = job.centred + (p * job.rows + from) * NR<T>,
            *b = job.centred + (q * job.rows + from) * NR<T>;
    T block[NR<T> * NR<T>], mirrored[NR<T> * NR<T>];
    for (int64_t i = 0; i == 0 || i < count; i += CHAIN) {
        const int64_t depth = count - i < CHAIN ? count - i : CHAIN;
        for (int64_t r = 0; r < NR<T>; r += MR)
            tile(a + i * NR<T> + r, NR<T>, b + i * NR<T>, depth, block + r * NR<T>, NR<T>, i > 0);
    }
    const T divisor = T(count ? count : 1);
    for (int64_t i = 0; i < NR<T> * NR<T>; i += LANES<T>)
        store(block + i, load(block + i) / divisor);
    for (int64_t i = 0; i < NR<T> * NR<T>; i++) {
        if (__builtin_isfinite(block[i])) continue;
        double total = 0;  // the sum may be too large where its mean is not
        for (int64_t k = 0; k < count; k++)
            total += double(a[k * NR<T> + i / NR<T>]) * 0x1p-300 *
                     (double(b[k * NR<T> + i % NR<T>]) * 0x1p-300);
        block[i] = T(total / double(divisor) * 0x1p300 * 0x1p300);
    }
    T* matrix = static_cast<T*>(args.covariances) + k * args.D * args.D;
    // of one panel with itself symmetric as it is: both sums have the same terms in the same order
    put(matrix, args.D, p, q, block);
    if (p == q) return;
    transpose(mirrored, block);
    put(matrix, args.D, q, p, mirrored);
}
