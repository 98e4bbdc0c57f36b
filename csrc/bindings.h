// The Python face that _cpu and _cuda share: it takes numbers and addresses and makes one struct of
// them. `Context` is int (threads) or uintptr_t (stream).
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <utility>
#include <vector>

#include "check.h"
#include "ops.h"

namespace miue {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}
template <class T>
T* maybe(const std::vector<float>& values, T* data) {
    return values.empty() ? nullptr : data;
}

// What Python passes as one tuple: memory with the code of its dtype, and the sizes or strides of a
// tensor of four dimensions.
using Typed = std::pair<uintptr_t, int>;
using Four = std::array<int64_t, 4>;

template <class Context, auto nt_xent, auto distance, auto covariance, auto step, auto step_inplace,
          auto input, auto epilogue, auto grad_epilogue>
void define_ops(pybind11::module_& m) {
    using P = uintptr_t;
    namespace py = pybind11;
    using release = py::call_guard<py::gil_scoped_release>;

    m.def(
        "nt_xent",
        [](P features, int dtype, int64_t row_stride, P labels, int64_t B, int64_t D,
           double temperature, bool negatives, P loss, P grad, P workspace, Context context) {
            nt_xent(
                {at<const void>(features), DType(dtype), row_stride, at<const int64_t>(labels), B,
                 D, temperature, negatives, at<void>(loss), at<void>(grad), at<void>(workspace)},
                context);
        },
        release());
    m.def(
        "intra_class_distance",
        [](P features, int dtype, int64_t row_stride, P labels, int64_t B, int64_t D,
           bool normalize_dim, double weight, P addend_loss, P addend_grad, P loss, P grad,
           P workspace, Context context) {
            distance(
                {at<const void>(features), DType(dtype), row_stride, at<const int64_t>(labels), B,
                 D, normalize_dim, weight, at<const void>(addend_loss), at<const void>(addend_grad),
                 at<void>(loss), at<void>(grad), at<void>(workspace)},
                context);
        },
        release());
    m.def(
        "class_covariance",
        [](P features, int dtype, int64_t row_stride, P labels, int64_t B, int64_t D, int64_t K,
           P counts, P means, P covariances, P workspace, Context context) {
            covariance({at<const void>(features), DType(dtype), row_stride,
                        at<const int64_t>(labels), B, D, K, at<int64_t>(counts), at<void>(means),
                        at<void>(covariances), at<void>(workspace)},
                       context);
        },
        release());
    m.def(
        "projected_step",
        [](P out, P delta, P grad, P image, int dtype, int64_t n, double alpha, double eps,
           Context context) {
            step({at<void>(out), at<const void>(delta), at<const void>(grad), at<const void>(image),
                  DType(dtype), n, alpha, eps},
                 context);
        },
        release());
    m.def(
        "projected_step_inplace",
        [](Typed delta, P index, Typed grad, Four stride, Typed images, P flip, Four size,
           int64_t N, double alpha, double eps, P nonfinite, P view, int64_t grid,
           Context context) {
            const auto [B, C, H, W] = size;
            step_inplace({at<void>(delta.first),
                          DType(delta.second),
                          at<const int64_t>(index),
                          at<const void>(grad.first),
                          DType(grad.second),
                          {stride[0], stride[1], stride[2], stride[3]},
                          at<const void>(images.first),
                          DType(images.second),
                          at<const uint8_t>(flip),
                          B,
                          C,
                          H,
                          W,
                          N,
                          alpha,
                          eps,
                          at<int64_t>(nonfinite),
                          at<const int32_t>(view),
                          grid},
                         context);
        },
        release());
    m.def(
        "perturbed_input",
        [](Typed out, bool channels_last, Typed images, Typed delta, double eps, P index, P flip,
           const std::vector<float>& mean, const std::vector<float>& inv_std, Four size, int64_t N,
           P view, Context context) {
            const auto [B, C, H, W] = size;
            input({at<void>(out.first), DType(out.second), channels_last,
                   at<const void>(images.first), DType(images.second), at<const void>(delta.first),
                   DType(delta.second), eps, at<const int64_t>(index), at<const uint8_t>(flip),
                   maybe(mean, mean.data()), maybe(inv_std, inv_std.data()), B, C, H, W, N,
                   at<const int32_t>(view)},
                  context);
        },
        release());
    m.def(
        "conv_epilogue",
        [](P y, int dtype, P bias, P residual, bool relu, P mask, int64_t channels, int64_t count,
           Context context) {
            epilogue({at<void>(y), DType(dtype), at<const void>(bias), at<const void>(residual),
                      relu, at<uint8_t>(mask), channels, count},
                     context);
        },
        release());
    m.def(
        "conv_grad_epilogue",
        [](P grad, int dtype, P addend, P mask, int64_t count, Context context) {
            grad_epilogue({at<void>(grad), DType(dtype), at<const void>(addend),
                           at<const uint8_t>(mask), count},
                          context);
        },
        release());
}

}  // namespace miue
