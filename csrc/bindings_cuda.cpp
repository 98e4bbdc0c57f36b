#include "bindings.h"

namespace {
// Streams arrive as integers; the ops take pointers.
template <auto op, class Args>
void on_stream(const Args& args, uintptr_t stream) {
    op(args, reinterpret_cast<void*>(stream));
}
}  // namespace

PYBIND11_MODULE(_cuda, m) {
    using namespace miue;
    pybind11::register_local_exception<BackendFailure>(m, "BackendFailure", PyExc_RuntimeError);
    define_ops<uintptr_t, on_stream<nt_xent_cuda, NtXentArgs>,
               on_stream<intra_class_distance_cuda, IntraClassDistanceArgs>,
               on_stream<class_covariance_cuda, ClassCovarianceArgs>,
               on_stream<projected_step_cuda, ProjectedStepArgs>,
               on_stream<projected_step_inplace_cuda, ProjectedStepInplaceArgs>,
               on_stream<perturbed_input_cuda, PerturbedInputArgs>,
               on_stream<conv_epilogue_cuda, ConvEpilogueArgs>,
               on_stream<conv_grad_epilogue_cuda, ConvGradEpilogueArgs>>(m);
#ifdef MIUE_HOPPER
    using P = uintptr_t;
    m.def(
        "conv64",
        [](P y, int dtype, P x, P weight, bool transpose, bool reverse, P bias, P residual,
           bool relu, P mask_out, P mask_in, int64_t B, int64_t H, int64_t W, uintptr_t stream) {
            conv64_cuda({at<void>(y), DType(dtype), at<const void>(x), at<const void>(weight),
                         transpose, reverse, at<const float>(bias), at<const void>(residual), relu,
                         at<uint8_t>(mask_out), at<const uint8_t>(mask_in), B, H, W},
                        reinterpret_cast<void*>(stream));
        },
        pybind11::call_guard<pybind11::gil_scoped_release>());
#endif
    m.def("nt_xent_workspace", [](int64_t B, int64_t D, int t, bool g) {
        return nt_xent_workspace_cuda(B, D, DType(t), g);
    });
    m.def("intra_class_distance_workspace", [](int64_t B, int64_t D, int t, bool g) {
        return intra_class_distance_workspace_cuda(B, D, DType(t), g);
    });
    m.def("class_covariance_workspace", [](int64_t B, int64_t D, int t, int64_t K) {
        return class_covariance_workspace_cuda(B, D, DType(t), K);
    });
    m.attr("build") = MIUE_BUILD_FLAGS;
}
