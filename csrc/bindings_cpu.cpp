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
