// What the ops (compiled once) and the kernels (compiled once per instruction set) share: plain
// data and a table of functions.
#pragma once
#include <type_traits>
#include <utility>

#include "../ops.h"

namespace miue {

// Every level's panel width divides PAD, so one workspace serves them all.
constexpr int64_t PAD = 96;
// Rows of the other side handled at a time: such a slice of a panel stays in the level-2 cache.
constexpr int64_t SLICE = 1024;

// libjpeg repeats the chroma of images up to this width instead of interpolating it.
constexpr int64_t JPEG_NARROW = 4;

// One nt_xent call. Rows are grouped in panels of `width` (LossKernels::panel).
template <class T>
struct NtXentJob {
    const NtXentArgs* args;
    int64_t B, D, panels, width_padded;  // panels * panel = padded B; width_padded = padded D
    // class number of each row, -1 in the padding; small integers are exact in T
    const T* ids;
    // one shift for every pair: S may be overwritten by E = exp((S - 1) / t)
    bool uniform;
    bool kept;  // the whole S is in memory
    // z as [panel][d][row in panel], and as [d panel][row][d in panel]
    T *columns, *rows;
    T *norm, *own, *top, *same_weight, *other_weight;
    double* row_loss;
    T* similarity;  // kept: [panel][row][row in panel]
};

// Some classes of a class_covariance call: rows [begin, begin + rows) of the batch sorted by class.
template <class T>
struct CovarianceJob {
    const ClassCovarianceArgs* args;
    const int64_t *starts, *order;  // class k is rows order[starts[k]] to order[starts[k + 1] - 1]
    int64_t begin, rows;
    T* centred;  // [d panel][row - begin][d in panel]
};

template <class T>
struct LossKernels {
    int64_t panel;
    // Normalises and packs the rows of panel p; returns whether all of them have unit length.
    bool (*pack)(const NtXentJob<T>&, int64_t p);
    // Similarity of panels p <= q, stored at both places of the symmetric matrix.
    void (*similarity)(const NtXentJob<T>&, int64_t p, int64_t q);
    // Sums, row losses and weights of panel q. `slice`: SLICE * panel values, unused when S is
    // kept.
    void (*sums)(const NtXentJob<T>&, int64_t q, T* slice);
    // Gradient rows of panel q. `grad`: panel * width_padded values.
    void (*gradient)(const NtXentJob<T>&, int64_t q, T* slice, T* grad);

    int64_t block;  // rows handled together by the distance kernels
    void (*convert)(T* out, const void* in, DType, int64_t n);
    // out[r, j] = ||f[i + r] - f[from + j]|| for r < rows <= block, j < count; f has rows of
    // `stride` values, `n` of them used.
    void (*distances)(const T* f, int64_t stride, int64_t n, int64_t i, int64_t rows, int64_t from,
                      int64_t count, T* out, int64_t ld);
    double (*sum)(const T* values, int64_t n);
    // weights[r, j] = (1 + share[from + j] / share[i + r]) / distance, 0 at a distance below the
    // smallest normal number; then grad[r] += sum_j weights[r, j] (f[i + r] - f[from + j]). (A
    // share alone may be too small for T, and so may its part per distance.)
    void (*pull)(const T* f, int64_t stride, const double* share, int64_t i, int64_t rows,
                 int64_t from, int64_t count, T* weights, int64_t ld, T* grad);
    // out = addend + weight * (share * values); addend may be null, or out.
    void (*finish)(T* out, const T* values, const T* addend, T weight, double share, int64_t n);

    // Mean of panel p of class k, and its rows less that mean.
    void (*centre)(const CovarianceJob<T>&, int64_t k, int64_t p);
    // Covariance of panels p <= q of class k, stored at both places of the symmetric matrix.
    void (*covariance)(const CovarianceJob<T>&, int64_t k, int64_t p, int64_t q);
};

// Memory that will be needed soon, asked for line by line between products.
class Ahead {
  public:
    void range(const void* from, int64_t bytes) {
        if (from && bytes > 0)
            at_[count_] = static_cast<const char*>(from),
            end_[count_++] = static_cast<const char*>(from) + bytes;
    }
    // The next `bytes` of it, or `other` where nothing is left.
    const char* take(int64_t bytes, const char* other) {
        while (now_ < count_ && at_[now_] >= end_[now_]) now_++;
        if (now_ == count_) return other;
        const char* from = at_[now_];
        at_[now_] += bytes;
        return from;
    }

  private:
    const char *at_[3], *end_[3];
    int count_ = 0, now_ = 0;
};

// One packed convolution: x [B, H, W, C] to y [B, P, Q, K] in tiles of the result. The epilogue reads and writes ReLU bits in whole
// vectors, so K must be a multiple of them where there is one (residual, relu or a mask); else it is a pass of its own.
struct TileJob {
    const float *x, *bias, *residual;
    float* y;
    bool relu;
    uint8_t* mask_out;
    const uint8_t* mask_in;
    int64_t B, H, W, C, P, Q, K;
    int64_t tiles_h, tiles_w;
    int64_t block;              // tiles whose products are taken together
    int64_t panel;              // result channels of one register tile
    int64_t group;              // result channels whose products are taken together: panels
    int64_t depth;              // C padded to vectors
    int64_t in_step, out_step;  // values between the transforms' products
};

// Weights of C input channels and some result channels, each `taps` x `taps`, to their transforms.
struct PackJob {
    const float* weight;
    int64_t result_stride, channel_stride, row_stride, column_stride;
    int64_t C, taps, products;  // of one dimension
    double transform[9][3];     // [product][tap]
    int64_t panel;
};

struct TileFamily {
    int64_t inputs, products, results, input_step, result_step, offset;  // of one dimension
    void (*in)(const TileJob&, int64_t first, int64_t count, float* to);
    void (*out)(const TileJob&, int64_t first, int64_t count, int64_t channel, int64_t width,
                const float* from);
};

struct TileKernels {
    int64_t rows, lanes, vectors;  // of a register tile
    bool fused;                    // the epilogue can be taken with the results
    void (*products)(const TileJob&, int64_t products, int64_t count, int64_t panels,
                     const float* in, const float* weights, float* out, Ahead&);
    // Result channels [first, first + count) of one panel, to[c][column]; `step` values between products.
    void (*pack)(const PackJob&, int64_t first, int64_t count, float* to, int64_t step);
    // The weight gradient at stride 1, see weight_grad.h.
    void (*grad_in)(const TileJob&, int64_t first, int64_t count, float* to);
    void (*outer_products)(const TileJob&, int64_t count, const float* in, const float* grad,
                           float* sums, bool add, Ahead&);
    void (*weight_grad)(const double (&transform)[9][3], int64_t C, int64_t K, int64_t rows,
                        int64_t panel, const float* sums, int64_t step, float* to);
    TileFamily families[7];  // in the order of ConvFamily
};

// Batch norm in training: with `grad` its gradient, see batch_norm.h. centre: the mean, or what is
// taken from x before it is summed.
struct BatchNormJob {
    const void *x, *grad;
    void* out;
    DType dtype;
    int64_t rows, channels;
    bool relu;
    const float *centre, *scale, *shift, *slope, *rest;
};

struct Kernels {
    const char* name;
    LossKernels<float> f32;
    LossKernels<double> f64;
    void (*step)(const ProjectedStepArgs&, int64_t from, int64_t to);
    // Pixels [from, to) of batch row b, all channels; returns the number of NaN and Inf in the
    // gradient there.
    int64_t (*step_inplace)(const ProjectedStepInplaceArgs&, int64_t b, int64_t from, int64_t to);
    void (*input)(const PerturbedInputArgs&, int64_t b, int64_t from, int64_t to);
    // Values [from, to), `from` a multiple of 64. The bias repeats for 63 values past its end.
    void (*epilogue)(const ConvEpilogueArgs&, int64_t from, int64_t to);
    void (*grad_epilogue)(const ConvGradEpilogueArgs&, int64_t from, int64_t to);
    // Both sums of each channel over rows [from, to); then the result there.
    void (*batch_norm_sums)(const BatchNormJob&, int64_t from, int64_t to, double* sums);
    void (*batch_norm_out)(const BatchNormJob&, int64_t from, int64_t to);
    // Image b, with 4 * h * w + 4 * w + 4 values of scratch, h and w the sides of halved chroma.
    void (*jpeg)(const JpegRoundTripArgs&, int64_t b, float* scratch);
    void (*jpeg_grad)(const JpegRoundTripGradArgs&, int64_t b, float* scratch);
    TileKernels tiles;
};

template <class T>
const LossKernels<T>& loss_kernels(const Kernels&);
template <>
inline const LossKernels<float>& loss_kernels<float>(const Kernels& k) {
    return k.f32;
}
template <>
inline const LossKernels<double>& loss_kernels<double>(const Kernels& k) {
    return k.f64;
}

extern const Kernels generic_kernels, avx2_kernels, avx512_kernels;
const Kernels& kernels();  // of the level in use

}  // namespace miue
