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
    m.def("level", &cpu_level);
    m.def("set_level", [](const std::string& name) { set_cpu_level(name.c_str()); });
    m.attr("build") = MIUE_BUILD_FLAGS;
}
