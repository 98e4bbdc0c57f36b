// Kernels of nt_xent, each on one panel of NR rows.

// A sum of products in doubles: norms neither overflow nor lose digits.
template <class T>
struct Products {
    static constexpr int N = sizeof(double) / sizeof(T);
    f64v parts[N] = {};
    void add(const T* x, const T* y) {  // LANES<T> of them
#pragma GCC unroll 2
        for (int n = 0; n < N; n++)
            parts[n] += doubles(x + n * LANES<double>) * doubles(y + n * LANES<double>);
    }
    double total() const {
        double sum = 0;
        for (int n = 0; n < N; n++)
            for (int l = 0; l < LANES<double>; l++) sum += parts[n][l];
        return sum;
    }
};

template <class T>
MIUE_INLINE int64_t columns_offset(const NtXentJob<T>& job, int64_t row) {
    return row / NR<T> * job.width_padded * NR<T> + row % NR<T>;
}
template <class T>
MIUE_INLINE int64_t rows_offset(const NtXentJob<T>& job, int64_t d_panel, int64_t row) {
    return (d_panel * job.panels * NR<T> + row) * NR<T>;
}

// z[0..NR) = features [q * NR, (q + 1) * NR) of row i, zeros where there are none
template <class T>
MIUE_INLINE void read(const NtXentJob<T>& job, int64_t i, int64_t q, T* z) {
    const NtXentArgs& args = *job.args;
    const int64_t left = job.D - q * NR<T>;
    const char* source = static_cast<const char*>(args.features) +
                         (i * args.row_stride + q * NR<T>)*size_of(args.dtype);
    if (i < job.B && left >= NR<T>) {
        widen(z, source, args.dtype, NR<T>);
    } else {
        for (int v = 0; v < NV; v++) store(z + v * LANES<T>, V<T>{});
        if (i < job.B) widen(z, source, args.dtype, left);
    }
}

template <class T>
static bool pack(const NtXentJob<T>& job, int64_t p) {
    const int64_t d_panels = job.width_padded / NR<T>;
    bool all_unit = true;
    T shrink[NR<T>], divisors[NR<T>];  // of a row whose norm is no T: times a power of two
    const auto norm_of = [&](int64_t i, T factor) {
        Products<T> squares;
        T x[NR<T>];
        for (int64_t q = 0; q < d_panels; q++) {
            read(job, i, q, x);
            for (int v = 0; v < NV; v++) {
                store(x + v * LANES<T>, load(x + v * LANES<T>) * factor);
                squares.add(x + v * LANES<T>, x + v * LANES<T>);
            }
        }
        return __builtin_sqrt(squares.total());
    };
    for (int64_t i = p * NR<T>; i < (p + 1) * NR<T>; i++) {
        T& factor = shrink[i - p * NR<T>] = 1;
        double norm = norm_of(i, factor);
        if (!__builtin_isfinite(T(norm)))
            norm = norm_of(i, factor = sizeof(T) == sizeof(float) ? T(0x1p-64) : T(0x1p-520));
        const double divisor = norm < 1e-8 ? 1e-8 : norm;
        divisors[i - p * NR<T>] = T(divisor);
        job.norm[i] = T(divisor / double(factor));
        job.own[i] = T(norm / divisor);
        all_unit &= i >= job.B || norm >= 1e-8;
    }
    // block by block, so that it is transposed where it was written: in the level-1 cache
    for (int64_t q = 0; q < d_panels; q++) {
        T* z = job.rows + rows_offset(job, q, p * NR<T>);
        for (int64_t i = 0; i < NR<T>; i++) {
            read(job, p * NR<T> + i, q, z + i * NR<T>);
            for (int v = 0; v < NV; v++) {
                T* at = z + i * NR<T> + v * LANES<T>;
                store(at, load(at) * shrink[i] / divisors[i]);
            }
        }
        transpose(job.columns + (p * job.width_padded + q * NR<T>)*NR<T>, z);
    }
    return all_unit;
}

// out[k - from, 0..NR) = S[k, panel q] for k in [from, to); `from` and the end of the buffer are
// panel boundaries.
template <class T>
static void multiply(const NtXentJob<T>& job, int64_t q, int64_t from, int64_t to, T* out) {
    const T* b = job.columns + q * job.width_padded * NR<T>;
    for (int64_t d = 0; d == 0 || d < job.D; d += CHAIN) {
        const int64_t depth = job.D - d < CHAIN ? job.D - d : CHAIN;
        for (int64_t k = from; k < to; k += MR)
            tile(job.columns + columns_offset(job, k) + d * NR<T>, NR<T>, b + d * NR<T>, depth,
                 out + (k - from) * NR<T>, NR<T>, d > 0);
    }
    // a row's similarity to itself is known exactly
    for (int64_t i = q * NR<T>; i < (q + 1) * NR<T>; i++)
        if (i >= from && i < to) out[(i - from) * NR<T> + i % NR<T>] = job.own[i] * job.own[i];
}

template <class T>
static void similarity(const NtXentJob<T>& job, int64_t p, int64_t q) {
    const int64_t column = job.panels * NR<T> * NR<T>, block = NR<T> * NR<T>;
    T* here = job.similarity + q * column + p * block;
    multiply(job, q, p * NR<T>, (p + 1) * NR<T>, here);
    if (p != q) transpose(job.similarity + p * column + q * block, here);
}

// S of rows [from, to) against panel q: a view of the kept matrix, or computed into `slice`.
template <class T>
MIUE_INLINE T* similarities(const NtXentJob<T>& job, int64_t q, int64_t from, int64_t to,
                            T* slice) {
    if (job.kept) return job.similarity + (q * job.panels * NR<T> + from) * NR<T>;
    multiply(job, q, from, to, slice);
    return slice;
}

// (s - shift) / t, with 1/t as the sum of two numbers so that no digit of the exponent is lost to
// its rounding.
template <class T>
struct Inverse {
    T high, low;
    explicit Inverse(double t) : high(T(1 / t)), low(T((1 - t * double(high)) / t)) {}
    MIUE_INLINE V<T> scaled(V<T> d, const Inverse& self) {
        return fma(d, all(self.high), d * self.low);
    }
};

template <class T>
static void sums(const NtXentJob<T>& job, int64_t q, T* slice) {
    const NtXentArgs& args = *job.args;
    const Inverse<T> inverse(args.temperature);
    V<T> ids[NV], own[NV], top[NV], same_sum[NV] = {}, other_sum[NV] = {};
    for (int v = 0; v < NV; v++) {
        ids[v] = load(job.ids + q * NR<T> + v * LANES<T>);
        own[v] = load(job.own + q * NR<T> + v * LANES<T>);
        top[v] = args.negatives ? all(T(-INFINITY)) : own[v];
    }
    if (args.negatives)
        for (int64_t from = 0; from < job.B; from += SLICE) {
            const int64_t to = job.B - from < SLICE ? job.B : from + SLICE;
            const T* s = similarities(job, q, from, to, slice);
            for (int64_t k = from; k < to; k++, s += NR<T>)
                for (int v = 0; v < NV; v++) {
                    const V<T> x = load(s + v * LANES<T>);
                    top[v] = ids[v] != job.ids[k] ? (x > top[v] ? x : top[v]) : top[v];
                }
        }
    for (int64_t from = 0; from < job.B; from += SLICE) {
        const int64_t to = job.B - from < SLICE ? job.B : from + SLICE;
        T* s = similarities(job, q, from, to, slice);
        for (int64_t group = from; group < to; group += GROUP) {
            V<T> same_part[NV] = {}, other_part[NV] = {};
            for (int64_t k = group; k < to && k < group + GROUP; k++, s += NR<T>)
                for (int v = 0; v < NV; v++) {
                    const auto same = ids[v] == job.ids[k];
                    const V<T> x = load(s + v * LANES<T>),
                               e = exp<T>(
                                   Inverse<T>::scaled(x - (same ? own[v] : top[v]), inverse));
                    same_part[v] += same ? e : V<T>{};
                    other_part[v] += same ? V<T>{} : e;
                    if (job.uniform && job.kept) store(s + v * LANES<T>, e);
                }
            for (int v = 0; v < NV; v++) same_sum[v] += same_part[v], other_sum[v] += other_part[v];
        }
    }
    const double scale = 1 / (double(job.B) * args.temperature);
    for (int64_t i = q * NR<T>; i < (q + 1) * NR<T>; i++) {
        const int v = i % NR<T> / LANES<T>, lane = i % LANES<T>;
        const double same = same_sum[v][lane], other = other_sum[v][lane];
        job.top[i] = top[v][lane];
        if (args.negatives) {
            job.row_loss[i] =
                log(other / same) + (double(job.top[i]) - double(job.own[i])) / args.temperature;
            job.same_weight[i] = T(-scale / same);
            job.other_weight[i] = T(scale / other);
        } else {
            job.row_loss[i] = log1p(other / same);
            job.same_weight[i] = T(-scale * other / (same * (same + other)));
            job.other_weight[i] = T(scale / (same + other));
        }
    }
}

// S (or E) of rows [from, to) against panel q becomes the symmetric weight matrix of the gradient.
template <class T>
static void weigh(const NtXentJob<T>& job, int64_t q, int64_t from, int64_t to, T* s) {
    const Inverse<T> inverse(job.args->temperature);
    const bool ready = job.uniform && job.kept;
    for (int v = 0; v < NV; v++) {
        const int64_t column = q * NR<T> + v * LANES<T>;
        const V<T> ids = load(job.ids + column), own = load(job.own + column),
                   top = load(job.top + column);
        const V<T> same_weight = load(job.same_weight + column),
                   other_weight = load(job.other_weight + column);
        for (int64_t k = from; k < to; k++) {
            T* at = s + (k - from) * NR<T> + v * LANES<T>;
            const auto same = ids == job.ids[k];
            const V<T> x = load(at), weight = same ? same_weight : other_weight;
            const V<T> weight_k = same ? all(job.same_weight[k]) : all(job.other_weight[k]);
            if (job.uniform) {
                const V<T> e = ready ? x : exp<T>(Inverse<T>::scaled(x - T(1), inverse));
                store(at, e * (weight + weight_k));
            } else {
                const V<T> shift = same ? own : top,
                           shift_k = same ? all(job.own[k]) : all(job.top[k]);
                store(at, weight * exp<T>(Inverse<T>::scaled(x - shift, inverse)) +
                              weight_k * exp<T>(Inverse<T>::scaled(x - shift_k, inverse)));
            }
        }
    }
}

template <class T>
static void gradient(const NtXentJob<T>& job, int64_t q, T* slice, T* grad) {
    const NtXentArgs& args = *job.args;
    const int64_t width = job.width_padded, d_panels = width / NR<T>;
    for (int64_t from = 0; from < job.B; from += SLICE) {
        const int64_t to = job.B - from < SLICE ? job.B : from + SLICE;
        T* w = similarities(job, q, from, to, slice);
        weigh(job, q, from, to, w);
        for (int64_t k = from; k < to; k += CHAIN) {
            const int64_t depth = to - k < CHAIN ? to - k : CHAIN;
            for (int64_t d = 0; d < d_panels; d++)
                for (int64_t r = 0; r < NR<T>; r += MR)
                    tile(w + (k - from) * NR<T> + r, NR<T>, job.rows + rows_offset(job, d, k),
                         depth, grad + r * width + d * NR<T>, width, k > 0);
        }
    }
    const DType dtype = args.dtype == DType::f64 ? DType::f64 : DType::f32;
    for (int64_t i = q * NR<T>; i < (q + 1) * NR<T> && i < job.B; i++) {
        T* g = grad + i % NR<T> * width;
        Products<T> products;
        const auto z = [&](int64_t k) {
            return job.rows + rows_offset(job, k / NR<T>, i) + k % NR<T>;
        };
        for (int64_t k = 0; k < width; k += LANES<T>) products.add(g + k, z(k));
        const T along = T(products.total()), norm = job.norm[i];
        for (int64_t k = 0; k < width; k += LANES<T>)
            store(g + k, (load(g + k) - along * load(z(k))) / norm);
        narrow(static_cast<char*>(args.grad) + i * job.D * size_of(dtype), dtype, g, job.D);
    }
}
