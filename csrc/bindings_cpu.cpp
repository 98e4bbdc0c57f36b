#include <algorithm>
#include <array>

#include "bindings.h"

PYBIND11_MODULE(_cpu, m) {
    using namespace miue;
    define_ops<int, nt_xent_cpu, intra_class_distance_cpu, class_covariance_cpu, projected_step_cpu,
               projected_step_inplace_cpu, perturbed_input_cpu, conv_epilogue_cpu,
               conv_grad_epilogue_cpu>(m);
    m.def("nt_xent_workspace", [](int64_t B, int64_t D, int t, bool g) {
        return nt_xent_workspace_cpu(B, D, DType(t), g);
    });
    m.def("intra_class_distance_workspace", [](int64_t B, int64_t D, int t, bool g) {
        return intra_class_distance_workspace_cpu(B, D, DType(t), g);
    });
    m.def("class_covariance_workspace", [](int64_t B, int64_t D, int t, int64_t K) {
        return class_covariance_workspace_cpu(B, D, DType(t), K);
    });
    using P = uintptr_t;
    using release = pybind11::call_guard<pybind11::gil_scoped_release>;
    m.def("packed_weights_floats", [](int family, int64_t C, int64_t K) {
        return packed_weights_floats_cpu(ConvFamily(family), C, K);
    });
    m.def(
        "pack_weights",
        [](int family, bool back, P weight, std::array<int64_t, 4> stride, int64_t C, int64_t K,
           P packed, int threads) {
            PackWeightsArgs args{ConvFamily(family), back, at<const float>(weight), {}, C, K,
                                 at<float>(packed)};
            std::copy(stride.begin(), stride.end(), args.stride);
            pack_weights_cpu(args, threads);
        },
        release());
    m.def("packed_conv_workspace",
          [](int family, int64_t B, int64_t P_, int64_t Q, int64_t C, int64_t K, int threads) {
              return packed_conv_workspace_cpu(ConvFamily(family), B, P_, Q, C, K, threads);
          });
    m.def(
        "packed_conv",
        [](int family, P x, P packed, P bias, P residual, bool relu, P mask_out, P mask_in, P y,
           std::array<int64_t, 7> size, P workspace, int threads) {
            packed_conv_cpu(
                {ConvFamily(family), at<const float>(x), at<const float>(packed),
                 at<const float>(bias), at<const float>(residual), relu, at<uint8_t>(mask_out),
                 at<const uint8_t>(mask_in), at<float>(y), size[0], size[1], size[2], size[3],
                 size[4], size[5], size[6], at<void>(workspace)},
                threads);
        },
        release());
    m.def("matrix_missing", &matrix_missing_cpu);
    m.def("matrix_weights_values", &matrix_weights_values_cpu);
    m.def(
        "pack_matrix_weights",
        [](P weight, std::array<int64_t, 4> stride, std::array<int64_t, 4> size, P packed,
           int threads) {
            PackMatrixWeightsArgs args{
                at<const uint16_t>(weight), {}, size[0], size[1], size[2], size[3],
                at<uint16_t>(packed)};
            std::copy(stride.begin(), stride.end(), args.stride);
            pack_matrix_weights_cpu(args, threads);
        },
        release());
    pybind11::class_<MatrixConvShape>(m, "MatrixConvShape")
        .def(pybind11::init([](std::array<int64_t, 7> size, std::array<int64_t, 2> taps,
                               std::array<int64_t, 2> stride, std::array<int64_t, 2> padding,
                               std::array<int64_t, 2> dilation, bool back, bool plain) {
            return MatrixConvShape{size[0],
                                   size[1],
                                   size[2],
                                   size[3],
                                   size[4],
                                   size[5],
                                   size[6],
                                   taps[0],
                                   taps[1],
                                   {stride[0], stride[1]},
                                   {padding[0], padding[1]},
                                   {dilation[0], dilation[1]},
                                   back,
                                   plain};
        }));
    m.def("matrix_conv_workspace", &matrix_conv_workspace_cpu);
    m.def(
        "matrix_conv",
        [](const MatrixConvShape& shape, P x, P packed, P bias, P residual, bool relu, P mask_out,
           P mask_in, P y, P workspace, int threads) {
            matrix_conv_cpu(
                {shape, at<const uint16_t>(x), at<const uint16_t>(packed), at<const float>(bias),
                 at<const uint16_t>(residual), relu, at<uint8_t>(mask_out),
                 at<const uint8_t>(mask_in), at<uint16_t>(y), at<void>(workspace)},
                threads);
        },
        release());
    m.def("matrix_weight_grad_workspace", &matrix_weight_grad_workspace_cpu);
    m.def(
        "matrix_weight_grad",
        [](const MatrixConvShape& shape, P x, P grad, P to, P workspace, int threads) {
            matrix_weight_grad_cpu({shape, at<const uint16_t>(x), at<const uint16_t>(grad),
                                    at<float>(to), at<void>(workspace)},
                                   threads);
        },
        release());
    m.def("conv_weight_grad_workspace", &conv_weight_grad_workspace_cpu);
    m.def(
        "conv_weight_grad",
        [](P x, P grad, P grad_weight, std::array<int64_t, 5> size, P workspace, int threads) {
            conv_weight_grad_cpu({at<const float>(x), at<const float>(grad), at<float>(grad_weight),
                                  size[0], size[1], size[2], size[3], size[4], at<void>(workspace)},
                                 threads);
        },
        release());
    m.def("batch_norm_workspace", &batch_norm_workspace_cpu);
    m.def(
        "batch_norm",
        [](int dtype, P x, P out, std::array<int64_t, 2> size, P weight, P bias, double eps,
           std::array<P, 3> sums, P workspace, int threads) {
            BatchNormArgs t{};
            t.dtype = DType(dtype), t.x = at<const void>(x), t.out = at<void>(out);
            t.rows = size[0], t.channels = size[1], t.eps = eps;
            t.weight = at<const float>(weight), t.bias = at<const float>(bias);
            t.mean = at<float>(sums[0]), t.variance = at<float>(sums[1]);
            t.inverse = at<float>(sums[2]), t.workspace = at<void>(workspace);
            batch_norm_cpu(t, threads);
        },
        release());
    m.def(
        "batch_norm_grad",
        [](int dtype, P x, P grad, P out, std::array<int64_t, 2> size, P weight, P bias, bool relu,
           std::array<P, 4> sums, P workspace, int threads) {
            BatchNormArgs t{};
            t.dtype = DType(dtype), t.x = at<const void>(x), t.grad = at<const void>(grad);
            t.out = at<void>(out), t.rows = size[0], t.channels = size[1], t.relu = relu;
            t.weight = at<const float>(weight), t.bias = at<const float>(bias);
            t.mean = at<float>(sums[0]), t.inverse = at<float>(sums[1]);
            t.grad_weight = at<float>(sums[2]), t.grad_bias = at<float>(sums[3]);
            t.workspace = at<void>(workspace);
            batch_norm_grad_cpu(t, threads);
        },
        release());
    m.def(
        "jpeg_round_trip",
        [](P out, P images, int64_t B, int64_t H, int64_t W, const std::vector<float>& cosines,
           const std::vector<float>& inverse, const std::vector<float>& steps, bool halved,
           int threads) {
            jpeg_round_trip_cpu({at<float>(out), at<const float>(images), B, H, W, cosines.data(),
                                 inverse.data(), steps.data(), halved},
                                threads);
        },
        release());
    m.def(
        "jpeg_round_trip_grad",
        [](P out, P grad, int64_t B, int64_t H, int64_t W, int threads) {
            jpeg_round_trip_grad_cpu({at<float>(out), at<const float>(grad), B, H, W}, threads);
        },
        release());
    m.def("level", &cpu_level);
    m.def("set_level", [](const std::string& name) { set_cpu_level(name.c_str()); });
    m.attr("build") = MIUE_BUILD_FLAGS;
}
