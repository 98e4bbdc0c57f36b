#include <algorithm>
#include <array>

#include "bindings.h"

namespace {
struct MatrixConv {  // sizes and geometry of a convolution on matrix tiles
    miue::MatrixConvArgs args;
};
}  // namespace

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
    m.def("matrix_conv_workspace", [](const MatrixConv& conv, int threads) {
        return matrix_conv_workspace_cpu(conv.args, threads);
    });
    m.def(
        "matrix_conv",
        [](const MatrixConv& conv, P x, P packed, P bias, P residual, bool relu, P mask_out,
           P mask_in, P y, P workspace, int threads) {
            MatrixConvArgs args = conv.args;
            args.x = at<const uint16_t>(x), args.packed = at<const uint16_t>(packed);
            args.bias = at<const float>(bias), args.residual = at<const uint16_t>(residual);
            args.relu = relu, args.mask_out = at<uint8_t>(mask_out);
            args.mask_in = at<const uint8_t>(mask_in), args.y = at<uint16_t>(y);
            args.workspace = at<void>(workspace);
            matrix_conv_cpu(args, threads);
        },
        release());
    const auto weight_grad = [](const MatrixConv& conv) {
        MatrixWeightGradArgs args{};
        const MatrixConvArgs& a = conv.args;
        args.B = a.B, args.H = a.H, args.W = a.W, args.C = a.C, args.P = a.P, args.Q = a.Q;
        args.K = a.K, args.R = a.R, args.S = a.S, args.plain = a.plain;
        for (int d = 0; d < 2; d++)
            args.stride[d] = a.stride[d], args.padding[d] = a.padding[d],
            args.dilation[d] = a.dilation[d];
        return args;
    };
    m.def("matrix_weight_grad_workspace", [=](const MatrixConv& conv) {
        return matrix_weight_grad_workspace_cpu(weight_grad(conv));
    });
    m.def(
        "matrix_weight_grad",
        [=](const MatrixConv& conv, P x, P grad, P to, P workspace, int threads) {
            MatrixWeightGradArgs args = weight_grad(conv);
            args.x = at<const uint16_t>(x), args.grad = at<const uint16_t>(grad);
            args.grad_weight = at<float>(to), args.workspace = at<void>(workspace);
            matrix_weight_grad_cpu(args, threads);
        },
        release());
    pybind11::class_<MatrixConv>(m, "MatrixConv")
        .def(pybind11::init([](std::array<int64_t, 7> size, std::array<int64_t, 2> taps,
                               std::array<int64_t, 2> stride, std::array<int64_t, 2> padding,
                               std::array<int64_t, 2> dilation, bool back, bool plain) {
            MatrixConv conv{};
            MatrixConvArgs& a = conv.args;
            a.B = size[0], a.H = size[1], a.W = size[2], a.C = size[3];
            a.P = size[4], a.Q = size[5], a.K = size[6], a.R = taps[0], a.S = taps[1];
            for (int d = 0; d < 2; d++)
                a.stride[d] = stride[d], a.padding[d] = padding[d], a.dilation[d] = dilation[d];
            a.back = back, a.plain = plain;
            return conv;
        }));
    m.def("conv_weight_grad_workspace", &conv_weight_grad_workspace_cpu);
    m.def(
        "conv_weight_grad",
        [](P x, P grad, P grad_weight, std::array<int64_t, 5> size, P workspace, int threads) {
            conv_weight_grad_cpu({at<const float>(x), at<const float>(grad), at<float>(grad_weight),
                                  size[0], size[1], size[2], size[3], size[4], at<void>(workspace)},
                                 threads);
        },
        release());
    m.def("level", &cpu_level);
    m.def("set_level", [](const std::string& name) { set_cpu_level(name.c_str()); });
    m.attr("build") = MIUE_BUILD_FLAGS;
}
