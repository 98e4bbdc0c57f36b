// The native ops. One signature per op; `<op>_cpu` takes a thread count where `<op>_cuda` takes a
// stream. Pointers are to memory of the op's own device unless the comment says "host". No torch,
// no Python.
#pragma once
#include <cstddef>
#include <cstdint>

namespace miue {

enum class DType : int { none = -1, f32 = 0, f16 = 1, bf16 = 2, f64 = 3, u8 = 4, i8 = 5 };

// NT-Xent over all pairs (or, with `negatives`, cross-class pairs only): value, and gradient when
// `grad` is not null.
//   features [B, D], element stride `row_stride` between rows, 1 inside; f32, f16, bf16, f64 (f64:
//       cpu only)
//   labels   [B]
//   loss     one f32 (f64 for f64 features)
//   grad     [B, D] contiguous, f32 (f64 for f64 features): half precision would flush what loss
//            scaling lifts; may be null
//   workspace of at least nt_xent_workspace_*() bytes, 64-byte aligned, never more than 32 MB +
//       O(B*D)
struct NtXentArgs {
    const void* features;
    DType dtype;
    int64_t row_stride;
    const int64_t* labels;
    int64_t B, D;
    double temperature;
    bool negatives;
    void* loss;
    void* grad;
    void* workspace;
};

// Within-class distance: mean_i log(1 + scale * sum_{j: y_j = y_i} ||f_i - f_j||), scale = 1/D or
// 1. Writes loss = addend_loss + weight * distance and grad = addend_grad + weight * gradient; both
// addends may be null, are f32 (f64 for f64 features), and may be the outputs themselves.
struct IntraClassDistanceArgs {
    const void* features;
    DType dtype;
    int64_t row_stride;
    const int64_t* labels;
    int64_t B, D;
    bool normalize_dim;
    double weight;
    const void* addend_loss;
    const void* addend_grad;
    void* loss;
    void* grad;
    void* workspace;
};

// Count, mean and covariance of every class: C = 1/n sum (f - m)(f - m)^T over its rows, 0 for a
// class without rows.
//   labels      [B]; a row whose label is outside [0, K) belongs to no class
//   counts      [K]
//   means       [K, D], covariances [K, D, D]: contiguous, f32 (f64 for f64 features)
//   workspace   as above
struct ClassCovarianceArgs {
    const void* features;
    DType dtype;
    int64_t row_stride;
    const int64_t* labels;
    int64_t B, D, K;
    int64_t* counts;
    void* means;
    void* covariances;
    void* workspace;
};

// out = clamp(image + clamp(delta - alpha * sign(grad), -eps, eps), 0, 1) - image on n values of
// one dtype. sign(0) = sign(NaN) = 0. f16 and bf16 compute in f32 and round once.
struct ProjectedStepArgs {
    void* out;
    const void* delta;
    const void* grad;
    const void* image;
    DType dtype;
    int64_t n;
    double alpha, eps;
};

// How the network sees a row of image + delta: mirrored along W where `mirrored` is not 0, then
// moved down and to the right, with zeros from outside. In memory three i32 for each row of a batch.
struct View {
    int64_t down, right;
    bool mirrored;
};
inline View view_of(const int32_t* views, int64_t b) {
    return {views[3 * b], views[3 * b + 1], views[3 * b + 2] != 0};
}
inline View transposed(const View& v) {
    return {-v.down, v.mirrored ? v.right : -v.right, v.mirrored};
}

// The same step in place on rows `index` of the poison store.
//   delta  [N, C, H, W] contiguous; f32, f16 or i8 levels (value = level * eps/127)
//   grad   [B, C, H, W], any strides (in elements); f32, f16, bf16
//   images [N, C, H, W] contiguous; u8 (value = u8/255) or f32; read mirrored along W where flip[b]
//       != 0
//   index  [B], unique, in [0, N); null = 0..B-1.   flip [B] or null
//   nonfinite: one i64, incremented by the number of NaN or Inf gradient values; may be null
//   view   [B] of `grad`, or null: a pixel takes the gradient from where the view has it, or 0
//   grid   cells of grid x grid pixels take the sign of the sum of their gradients, in f32 down each
//          column of a cell, then over the columns from left to right; 1: every pixel its own
struct ProjectedStepInplaceArgs {
    void* delta;
    DType delta_dtype;
    const int64_t* index;
    const void* grad;
    DType grad_dtype;
    int64_t grad_stride[4];
    const void* images;
    DType image_dtype;
    const uint8_t* flip;
    int64_t B, C, H, W, N;
    double alpha, eps;
    int64_t* nonfinite;
    const int32_t* view;
    int64_t grid;
};

// out[b] = (view_b(flip_b(images[index_b]) + delta[index_b]) - mean) * (1 / std), written contiguous
// or channels-last.
//   images as above; delta as above or null; out f32, f16, bf16 [B, C, H, W]
//   mean, inv_std: C floats in HOST memory, or null for no normalisation; cuda takes C <= 16 there
struct PerturbedInputArgs {
    void* out;
    DType out_dtype;
    bool channels_last;
    const void* images;
    DType image_dtype;
    const void* delta;
    DType delta_dtype;
    double eps;
    const int64_t* index;
    const uint8_t* flip;
    const float* mean;
    const float* inv_std;
    int64_t B, C, H, W, N;
    const int32_t* view;  // [B] or null
};

// y = relu(y + bias + residual) in place on `count` values in NHWC order: channels vary fastest.
//   y, residual: f32, f16, bf16, f64 (f64: cpu only); bias [channels] f32 (f64 for f64); bias and
//       residual may be null
//   mask: ReLU bits, 8 * ceil(count / 64) bytes, 8-byte aligned, or null: bit k of byte b is !(y[8
//       b + k] <= 0) after rounding, 0 past the end
// Sums in f32 (f64), (y + bias) first, rounded once. Without `relu` the values stay as they are and
// the mask is written all the same.
struct ConvEpilogueArgs {
    void* y;
    DType dtype;
    const void* bias;
    const void* residual;
    bool relu;
    uint8_t* mask;
    int64_t channels, count;
};

// grad = bit ? grad + addend : 0 in place on `count` values; addend and mask (as above) may be
// null.
struct ConvGradEpilogueArgs {
    void* grad;
    DType dtype;
    const void* addend;
    const uint8_t* mask;
    int64_t count;
};

// What JPEG leaves of an image, on the [0, 1] scale, and the transpose of its linear parts with
// halved chroma.
//   images, grad, out [B, 3, H, W] contiguous, f32, H and W at least 1; `out` is other memory
//   cosines  [8][8] in HOST memory: the share of sample k in coefficient u; inverse: its transpose
//   steps    [2][8][8] in HOST memory: of the coefficients of luma, then of chroma
//   halved   chroma has one value for 2 x 2 pixels (4:2:0)
struct JpegRoundTripArgs {
    float* out;
    const float* images;
    int64_t B, H, W;
    const float* cosines;
    const float* inverse;
    const float* steps;
    bool halved;
};
struct JpegRoundTripGradArgs {
    float* out;
    const float* grad;
    int64_t B, H, W;
};

// A 3x3 convolution of 64 to 64 channels, stride 1, padding 1: y = relu(x * weight + bias +
// residual), or its input gradient. Hopper only.
//   x, residual, y: [B, H, W, 64] f16 or bf16, W in 4..64; residual may be null
//   weight   [64][3][3][64]: with `transpose` the first 64 are summed over, else the last;
//            `reverse` takes the taps back to front. Forward from [K][3][3][C]: neither. Input
//            gradient: reverse, and transpose unless the memory is [C][3][3][K]
//   bias     [64] f32 or null
//   mask_out the ReLU's bits as above (8 B H W bytes) or null
//   mask_in  what has no bit here becomes 0, not with relu; or null
// All but the masks are multiples of 16 bytes. Sums in f32, (product + bias) first, rounded once.
struct Conv64Args {
    void* y;
    DType dtype;
    const void* x;
    const void* weight;
    bool transpose, reverse;
    const float* bias;
    const void* residual;
    bool relu;
    uint8_t* mask_out;
    const uint8_t* mask_in;
    int64_t B, H, W;
};

// A frozen convolution whose weights were transformed and packed: 3x3 with padding 1 at stride 1 (in tiles of 4x4 or 2x2 results) or 2,
// and 1x1 with padding 0 at stride 1 or 2. The input gradient at stride 1 is a convolution of the same family, at stride 2 one of its own.
enum class ConvFamily : int {
    three4 = 0,
    three2,
    strided,
    strided_back,
    one,
    one_strided,
    one_back
};

//   weight [K][C][taps][taps] of the forward, element strides in `stride`; with `back` its C and K are this one's K and C
//   packed packed_weights_floats_cpu() values, for the instruction level in use
struct PackWeightsArgs {
    ConvFamily family;
    bool back;
    const float* weight;
    int64_t stride[4];
    int64_t C, K;  // input and result channels of the packed convolution
    float* packed;
};

// y = relu(x * weight + bias + residual), its bits in mask_out; or y = mask_in ? x * weight + residual : 0.
//   x [B, H, W, C], y and residual [B, P, Q, K], bias [K], masks as above; all f32; bias, residual and masks may be null
//   mask_out only with relu; mask_in without
struct PackedConvArgs {
    ConvFamily family;
    const float* x;
    const float* packed;
    const float* bias;
    const float* residual;
    bool relu;
    uint8_t* mask_out;
    const uint8_t* mask_in;
    float* y;
    int64_t B, H, W, C, P, Q, K;
    void* workspace;  // packed_conv_workspace_cpu() bytes, 64-byte aligned
};

// The weight gradient of a 3x3 convolution with stride 1 and padding 1: grad_weight [K][3][3][C] from x [B, H, W, C] and grad [B, H, W, K].
struct ConvWeightGradArgs {
    const float* x;
    const float* grad;
    float* grad_weight;
    int64_t B, H, W, C, K;
    void* workspace;  // conv_weight_grad_workspace_cpu() bytes, 64-byte aligned
};

// A convolution of bfloat16 values with products on matrix tiles (AMX), groups 1, or with `back` the input gradient of one.
//   y = relu(x * weight + bias + residual), its bits in mask_out; or y = mask_in ? x * weight + residual : 0
//   x [B, H, W, C], y and residual [B, P, Q, K] bf16; bias [K] f32; masks as above; bias, residual and masks may be null
//   R, S, stride, padding, dilation are the forward's; with `back` x is the gradient of its result and y that of its input
//   packed matrix_weights_values() values by pack_matrix_weights_cpu(); plain: without AMX, slowly, for tests
struct MatrixConvShape {
    int64_t B, H, W, C, P, Q, K, R, S;
    int64_t stride[2], padding[2], dilation[2];
    bool back, plain;
};
struct MatrixConvArgs : MatrixConvShape {
    const uint16_t* x;
    const uint16_t* packed;
    const float* bias;
    const uint16_t* residual;
    bool relu;
    uint8_t* mask_out;
    const uint8_t* mask_in;
    uint16_t* y;
    void* workspace;  // matrix_conv_workspace_cpu() bytes, 64-byte aligned
};

//   weight [C or K][K or C][R][S] bf16, element strides of the summed channel, the result channel, and the two taps in `stride`
struct PackMatrixWeightsArgs {
    const uint16_t* weight;
    int64_t stride[4];
    int64_t C, K, R, S;
    uint16_t* packed;
};

// The weight gradient of a convolution on matrix tiles: grad_weight [K][R][S][C] f32 from x [B, H, W, C] and grad [B, P, Q, K], both bf16.
struct MatrixWeightGradArgs : MatrixConvShape {  // of the forward: back is false
    const uint16_t* x;
    const uint16_t* grad;
    float* grad_weight;
    void* workspace;  // matrix_weight_grad_workspace_cpu() bytes, 64-byte aligned
};

int64_t matrix_weight_grad_workspace_cpu(const MatrixConvShape&);
void matrix_weight_grad_cpu(const MatrixWeightGradArgs&, int threads);

const char* matrix_missing_cpu();  // why this processor has no bf16 matrix tiles, or null
int64_t matrix_weights_values_cpu(int64_t C, int64_t K, int64_t R, int64_t S);
void pack_matrix_weights_cpu(const PackMatrixWeightsArgs&, int threads);
int64_t matrix_conv_workspace_cpu(const MatrixConvShape&, int threads);
void matrix_conv_cpu(const MatrixConvArgs&, int threads);

// Batch norm in training on [rows, channels], the memory of an NHWC tensor; channels a multiple of 16.
// Forward: out, and the mean, the variance (not corrected) and 1 / sqrt(variance + eps) per channel. Gradient: of x, weight and bias from
// grad and the forward's mean and inverse; with relu it is that of a ReLU's result, whose zeros are found again from x.
struct BatchNormArgs {
    DType dtype;  // f32 or bf16: of x, grad and out
    const void* x;
    const void* grad;
    void* out;
    int64_t rows, channels;
    const float *weight, *bias;  // may be null: 1 and 0
    double eps;
    bool relu;
    float *mean, *variance, *inverse, *grad_weight, *grad_bias;
    void* workspace;  // batch_norm_workspace_cpu() bytes, 64-byte aligned
};

int64_t batch_norm_workspace_cpu(int64_t rows, int64_t channels);
void batch_norm_cpu(const BatchNormArgs&, int threads);
void batch_norm_grad_cpu(const BatchNormArgs&, int threads);

int64_t conv_weight_grad_workspace_cpu(int64_t C, int64_t K);
void conv_weight_grad_cpu(const ConvWeightGradArgs&, int threads);
int64_t packed_weights_floats_cpu(ConvFamily, int64_t C, int64_t K);
void pack_weights_cpu(const PackWeightsArgs&, int threads);
int64_t packed_conv_workspace_cpu(ConvFamily, int64_t B, int64_t P, int64_t Q, int64_t C, int64_t K,
                                  int threads);
void packed_conv_cpu(const PackedConvArgs&, int threads);

int64_t nt_xent_workspace_cpu(int64_t B, int64_t D, DType dtype, bool want_grad);
int64_t intra_class_distance_workspace_cpu(int64_t B, int64_t D, DType dtype, bool want_grad);
int64_t class_covariance_workspace_cpu(int64_t B, int64_t D, DType dtype, int64_t K);
void nt_xent_cpu(const NtXentArgs&, int threads);
void intra_class_distance_cpu(const IntraClassDistanceArgs&, int threads);
void class_covariance_cpu(const ClassCovarianceArgs&, int threads);
void projected_step_cpu(const ProjectedStepArgs&, int threads);
void projected_step_inplace_cpu(const ProjectedStepInplaceArgs&, int threads);
void perturbed_input_cpu(const PerturbedInputArgs&, int threads);
void conv_epilogue_cpu(const ConvEpilogueArgs&, int threads);
void conv_grad_epilogue_cpu(const ConvGradEpilogueArgs&, int threads);
void jpeg_round_trip_cpu(const JpegRoundTripArgs&, int threads);
void jpeg_round_trip_grad_cpu(const JpegRoundTripGradArgs&, int threads);

// "generic", "avx2" or "avx512": the best this processor has unless MIUE_CPU_LEVEL or set_cpu_level
// says otherwise.
const char* cpu_level();
void set_cpu_level(const char* name);

int64_t nt_xent_workspace_cuda(int64_t B, int64_t D, DType dtype, bool want_grad);
int64_t intra_class_distance_workspace_cuda(int64_t B, int64_t D, DType dtype, bool want_grad);
int64_t class_covariance_workspace_cuda(int64_t B, int64_t D, DType dtype, int64_t K);
void nt_xent_cuda(const NtXentArgs&, void* stream);
void intra_class_distance_cuda(const IntraClassDistanceArgs&, void* stream);
void class_covariance_cuda(const ClassCovarianceArgs&, void* stream);
void projected_step_cuda(const ProjectedStepArgs&, void* stream);
void projected_step_inplace_cuda(const ProjectedStepInplaceArgs&, void* stream);
void perturbed_input_cuda(const PerturbedInputArgs&, void* stream);
void conv_epilogue_cuda(const ConvEpilogueArgs&, void* stream);
void conv_grad_epilogue_cuda(const ConvGradEpilogueArgs&, void* stream);
#ifdef MIUE_HOPPER  // some of the architectures that _cuda is built for may use csrc/cuda/hopper
void conv64_cuda(const Conv64Args&, void* stream);
#endif

}  // namespace miue
