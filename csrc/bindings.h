// The Python face shared by _cpu and _cuda: integers in, one struct out. `Context` is int (threads) or uintptr_t (stream).
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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

template <class Context, auto nt_xent>
void define_nt_xent(pybind11::module_& m, const char* name) {
    using P = uintptr_t;
    m.def(name, [](P features, int dtype, int64_t row_stride, P labels, int64_t B, int64_t D, double temperature, bool negatives, P loss,
                   P grad, P workspace, Context context) {
        nt_xent({at<const void>(features), DType(dtype), row_stride, at<const int64_t>(labels), B, D, temperature, negatives,
                 at<void>(loss), at<void>(grad), at<void>(workspace)}, context);
    }, pybind11::call_guard<pybind11::gil_scoped_release>());
}

template <class Context, auto nt_xent, auto distance, auto covariance, auto step, auto step_inplace, auto input, auto epilogue,
          auto grad_epilogue>
void define_ops(pybind11::module_& m) {
    using P = uintptr_t;
    namespace py = pybind11;
    using release = py::call_guard<py::gil_scoped_release>;

    define_nt_xent<Context, nt_xent>(m, "nt_xent");
    m.def("intra_class_distance", [](P features, int dtype, int64_t row_stride, P labels, int64_t B, int64_t D, bool normalize_dim,
                                     double weight, P addend_loss, P addend_grad, P loss, P grad, P workspace, Context context) {
        distance({at<const void>(features), DType(dtype), row_stride, at<const int64_t>(labels), B, D, normalize_dim, weight,
                  at<const void>(addend_loss), at<const void>(addend_grad), at<void>(loss), at<void>(grad), at<void>(workspace)}, context);
    }, release());
    m.def("class_covariance", [](P features, int dtype, int64_t row_stride, P labels, int64_t B, int64_t D, int64_t K, P counts, P means,
                                 P covariances, P workspace, Context context) {
        covariance({at<const void>(features), DType(dtype), row_stride, at<const int64_t>(labels), B, D, K, at<int64_t>(counts),
                    at<void>(means), at<void>(covariances), at<void>(workspace)}, context);
    }, release());
    m.def("projected_step", [](P out, P delta, P grad, P image, int dtype, int64_t n, double alpha, double eps, Context context) {
        step({at<void>(out), at<const void>(delta), at<const void>(grad), at<const void>(image), DType(dtype), n, alpha, eps}, context);
    }, release());
    m.def("projected_step_inplace", [](P delta, int delta_dtype, P index, P grad, int grad_dtype, int64_t s0, int64_t s1, int64_t s2,
                                       int64_t s3, P images, int image_dtype, P flip, int64_t B, int64_t C, int64_t H, int64_t W,
                                       int64_t N, double alpha, double eps, P nonfinite, Context context) {
        step_inplace({at<void>(delta), DType(delta_dtype), at<const int64_t>(index), at<const void>(grad), DType(grad_dtype),
                      {s0, s1, s2, s3}, at<const void>(images), DType(image_dtype), at<const uint8_t>(flip), B, C, H, W, N, alpha, eps,
                      at<int64_t>(nonfinite)}, context);
    }, release());
    m.def("perturbed_input", [](P out, int out_dtype, bool channels_last, P images, int image_dtype, P delta, int delta_dtype, double eps,
                                P index, P flip, const std::vector<float>& mean, const std::vector<float>& inv_std, int64_t B, int64_t C,
                                int64_t H, int64_t W, int64_t N, Context context) {
        input({at<void>(out), DType(out_dtype), channels_last, at<const void>(images), DType(image_dtype), at<const void>(delta),
               DType(delta_dtype), eps, at<const int64_t>(index), at<const uint8_t>(flip), maybe(mean, mean.data()),
               maybe(inv_std, inv_std.data()), B, C, H, W, N}, context);
    }, release());
    m.def("conv_epilogue", [](P y, int dtype, P bias, P residual, bool relu, P mask, int64_t channels, int64_t count, Context context) {
        epilogue({at<void>(y), DType(dtype), at<const void>(bias), at<const void>(residual), relu, at<uint8_t>(mask), channels, count},
                 context);
    }, release());
    m.def("conv_grad_epilogue", [](P grad, int dtype, P addend, P mask, int64_t count, Context context) {
        grad_epilogue({at<void>(grad), DType(dtype), at<const void>(addend), at<const uint8_t>(mask), count}, context);
    }, release());
}

}  // namespace miue
