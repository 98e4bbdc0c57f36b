// The families of one-dimensional transforms that tiles.h applies to columns and then to rows:
//   IN inputs at a distance of IS tiles from the next ones, the first of them OFF before the
//   tile's place; AL products; OUT results, OS to the next tile.
// Winograd's transforms need fewer products than results times taps (S. Winograd 1980; A. Lavin and
// S. Gray 2016). Points and infinity are chosen for a small rounding error: 0, +-1/sqrt 2,
// +-sqrt 2 for three taps, +-1/2, +-5/4 for two.

constexpr float TA = 0.70710678118654752440f,
                TB = 1.41421356237309504880f;  // their squares are 1/2 and 2

MIUE_INLINE f32v times(float a, f32v b) { return all(a) * b; }
MIUE_INLINE f32v plus(f32v a, float b, f32v c) {  // a + b c
    return fma(all(b), c, a);
}

struct Three4 {  // three taps, stride 1, four results from six inputs
    static constexpr int IN = 6, AL = 6, OUT = 4, IS = 4, OS = 4, OFF = -1;
    MIUE_INLINE void in(const f32v* d, f32v* t) {
        f32v even = plus(d[4], -2.0f, d[2]), odd = plus(d[3], -2.0f, d[1]);
        t[1] = plus(even, TA, odd);
        t[2] = plus(even, -TA, odd);
        even = plus(d[4], -0.5f, d[2]), odd = plus(d[3], -0.5f, d[1]);
        t[3] = plus(even, TB, odd);
        t[4] = plus(even, -TB, odd);
        t[0] = plus(d[0] + d[4], -2.5f, d[2]);
        t[5] = plus(d[1] + d[5], -2.5f, d[3]);
    }
    MIUE_INLINE void out(const f32v* m, f32v* y) {
        const f32v s = m[1] + m[2], d = m[1] - m[2], S = m[3] + m[4], D = m[3] - m[4];
        y[0] = m[0] + (s + S);
        y[1] = plus(times(TB, D), TA, d);
        y[2] = plus(times(2.0f, S), 0.5f, s);
        y[3] = plus(plus(m[5], 2 * TB, D), 0.5f * TA, d);
    }
};

struct
    Three2 {  // three taps, stride 1, two results from four inputs: less than half of the weights' memory
    static constexpr int IN = 4, AL = 4, OUT = 2, IS = 2, OS = 2, OFF = -1;
    MIUE_INLINE void in(const f32v* d, f32v* t) {
        t[0] = d[0] - d[2];
        t[1] = d[1] + d[2];
        t[2] = d[2] - d[1];
        t[3] = d[3] - d[1];
    }
    MIUE_INLINE void out(const f32v* m, f32v* y) {
        y[0] = m[0] + (m[1] + m[2]);
        y[1] = (m[1] - m[2]) + m[3];
    }
};

struct Two4 {  // two taps, four results from five inputs: part of the strided ones below
    static constexpr float QA = 0.5f, QB = 1.25f, A2 = QA * QA, B2 = QB * QB;
    MIUE_INLINE void in(f32v d0, f32v d1, f32v d2, f32v d3, f32v d4, f32v* t) {
        f32v even = plus(d2, -B2, d0), odd = plus(d3, -B2, d1);
        t[0] = plus(odd, QA, even);
        t[1] = plus(odd, -QA, even);
        even = plus(d2, -A2, d0), odd = plus(d3, -A2, d1);
        t[2] = plus(odd, QB, even);
        t[3] = plus(odd, -QB, even);
        t[4] = plus(plus(d4, -(A2 + B2), d2), A2 * B2, d0);
    }
    MIUE_INLINE void out(const f32v* m, f32v* y) {
        const f32v s = m[0] + m[1], d = m[0] - m[1], S = m[2] + m[3], D = m[2] - m[3];
        y[0] = s + S;
        y[1] = plus(times(QB, D), QA, d);
        y[2] = plus(times(B2, S), A2, s);
        y[3] = plus(plus(m[4], QB * B2, D), QA * A2, d);
    }
};

struct
    Strided {  // three taps, stride 2: the outer taps meet the odd places, the middle one the even places
    static constexpr int IN = 9, AL = 9, OUT = 4, IS = 8, OS = 4, OFF = -1;
    MIUE_INLINE void in(const f32v* d, f32v* t) {
        Two4::in(d[0], d[2], d[4], d[6], d[8], t);
        for (int i = 0; i < 4; i++) t[5 + i] = d[2 * i + 1];
    }
    MIUE_INLINE void out(const f32v* m, f32v* y) {
        Two4::out(m, y);
        for (int i = 0; i < 4; i++) y[i] += m[5 + i];
    }
};

struct
    StridedBack {  // its input gradient: results at odd places have two taps, those at even places one
    static constexpr int IN = 5, AL = 9, OUT = 8, IS = 4, OS = 8, OFF = 0;
    MIUE_INLINE void in(const f32v* d, f32v* t) {
        Two4::in(d[0], d[1], d[2], d[3], d[4], t);
        for (int i = 0; i < 4; i++) t[5 + i] = d[i];
    }
    MIUE_INLINE void out(const f32v* m, f32v* y) {
        f32v odd[4];
        Two4::out(m, odd);
        for (int i = 0; i < 4; i++) y[2 * i] = m[5 + i], y[2 * i + 1] = odd[i];
    }
};

template <int STRIDE>
struct One {  // one tap
    static constexpr int IN = 1, AL = 1, OUT = 1, IS = STRIDE, OS = 1, OFF = 0;
    MIUE_INLINE void in(const f32v* d, f32v* t) { t[0] = d[0]; }
    MIUE_INLINE void out(const f32v* m, f32v* y) { y[0] = m[0]; }
};

struct OneBack {  // the input gradient of one tap at stride 2: nothing reaches the places between
    static constexpr int IN = 1, AL = 1, OUT = 2, IS = 1, OS = 2, OFF = 0;
    MIUE_INLINE void in(const f32v* d, f32v* t) { t[0] = d[0]; }
    MIUE_INLINE void out(const f32v* m, f32v* y) {
        y[0] = m[0];
        y[1] = f32v{};
    }
};
