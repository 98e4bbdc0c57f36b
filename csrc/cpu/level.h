// One instruction set: the includer defines MIUE_LEVEL (its namespace) and MIUE_BYTES (its vector
// width), and has switched the compiler to it. Only own templates in here: an inline function of
// std compiled for AVX-512 could be linked into the other levels.
#include <math.h>

namespace miue {
namespace MIUE_LEVEL {
#include "simd.h"
//
#include "convert.h"
#include "distance.h"
#include "gemm.h"
#include "pointwise.h"
#include "similarity.h"
#include "covariance.h"
//
#include "epilogue.h"
#include "jpeg.h"
#include "transforms.h"
//
#include "tiles.h"
//
#include "weight_grad.h"
//
#include "batch_norm.h"

template <class T>
constexpr LossKernels<T> loss_table() {
    return {NR<T>,        pack<T>, similarity<T>, sums<T>,   gradient<T>, BLOCK,        convert<T>,
            distances<T>, sum<T>,  pull<T>,       finish<T>, centre<T>,   covariance<T>};
}
constexpr TileKernels tile_kernels() {
    return {TILE_ROWS,
            LANES<float>,
            TILE_VECTORS,
            LANES<float> >= 8,
            products,
            pack_panel,
            grad_in,
            outer_products,
            weight_grad,
            {tile_family<Three4>(), tile_family<Three2>(), tile_family<Strided>(),
             tile_family<StridedBack>(), tile_family<One<1>>(), tile_family<One<2>>(),
             tile_family<OneBack>()}};
}
}  // namespace MIUE_LEVEL

#define MIUE_TEXT_(x) #x
#define MIUE_TEXT(x) MIUE_TEXT_(x)
#define MIUE_JOIN_(a, b) a##b
#define MIUE_JOIN(a, b) MIUE_JOIN_(a, b)
extern const Kernels MIUE_JOIN(MIUE_LEVEL, _kernels) = {
    MIUE_TEXT(MIUE_LEVEL),
    MIUE_LEVEL::loss_table<float>(),
    MIUE_LEVEL::loss_table<double>(),
    MIUE_LEVEL::step,
    MIUE_LEVEL::step_inplace,
    MIUE_LEVEL::input,
    MIUE_LEVEL::epilogue,
    MIUE_LEVEL::grad_epilogue,
    MIUE_LEVEL::batch_norm_sums,
    MIUE_LEVEL::batch_norm_out,
    MIUE_LEVEL::jpeg,
    MIUE_LEVEL::jpeg_grad,
    MIUE_LEVEL::tile_kernels(),
};
}  // namespace miue
