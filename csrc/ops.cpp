// Every op's schema: the table of contents of rwkv_ext._C. Shapes and meaning: rwkv_ext/ops.py; of a whole model
// step, rwkv5_step and rwkv6_step: rwkv_ext/models/fused_step.py; of the parts of a layer and the loss:
// rwkv_ext/_layer_registration.py. Implementations: cpu/wkv_cpu.cpp, cpu/decode_cpu.cpp, cpu/layer_cpu.cpp,
// cpu/layer_norm_cpu.cpp, cuda/wkv_cuda.cpp. Fake, autograd and autocast: rwkv_ext/_registration.py,
// _step_registration.py and _layer_registration.py.
#include <Python.h>

#include <string>

#include "build_info.h"
#include "torch_api.h"

#ifndef RWKV_CUDA_VERSION
#define RWKV_CUDA_VERSION ""
#define RWKV_CUDA_ARCHS ""
#endif

namespace {

constexpr const char* kCudaOps =
    "wkv5_forward wkv5_backward wkv5_step wkv5_summary wkv5_adjoint_summary "
    "wkv6_forward wkv6_backward wkv6_step wkv6_summary wkv6_adjoint_summary";

// "name=value" lines; lists are separated by spaces.
std::string build_info() {
  return std::string("cpu_instruction_set=") + rwkv::cpu_instruction_set() + "\ncuda_version=" RWKV_CUDA_VERSION +
         "\ncuda_archs=" RWKV_CUDA_ARCHS "\ncuda_ops=" + (*RWKV_CUDA_VERSION ? kCudaOps : "") + "\n";
}

}  // namespace

STABLE_TORCH_LIBRARY(rwkv_ext, m) {
  m.def("wkv5_forward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor? state, Tensor? cu_seqlens, "
        "bool save_for_backward) -> (Tensor y, Tensor state_out, Tensor chunk_states, Tensor scores)");
  m.def("wkv6_forward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor? state, Tensor? cu_seqlens, "
        "bool save_for_backward) -> (Tensor y, Tensor state_out, Tensor chunk_states, Tensor scores)");
  m.def("wkv5_backward(Tensor? dy, Tensor? dstate_out, Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, "
        "Tensor? state, Tensor? cu_seqlens, Tensor chunk_states, Tensor scores) "
        "-> (Tensor dr, Tensor dk, Tensor dv, Tensor dw, Tensor du, Tensor dstate)");
  m.def("wkv6_backward(Tensor? dy, Tensor? dstate_out, Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, "
        "Tensor? state, Tensor? cu_seqlens, Tensor chunk_states, Tensor scores) "
        "-> (Tensor dr, Tensor dk, Tensor dv, Tensor dw, Tensor du, Tensor dstate)");
  m.def("wkv5_summary(Tensor k, Tensor v, Tensor w, Tensor? cu_seqlens) -> (Tensor decay, Tensor state)");
  m.def("wkv6_summary(Tensor k, Tensor v, Tensor w, Tensor? cu_seqlens) -> (Tensor decay, Tensor state)");
  m.def("wkv5_adjoint_summary(Tensor r, Tensor w, Tensor dy, Tensor? cu_seqlens) -> Tensor dstate");
  m.def("wkv6_adjoint_summary(Tensor r, Tensor w, Tensor dy, Tensor? cu_seqlens) -> Tensor dstate");
  m.def("wkv5_step(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor(a!) state, Tensor? slots) -> Tensor");
  m.def("wkv6_step(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor(a!) state, Tensor? slots) -> Tensor");
  m.def("rwkv5_step(Tensor x, Tensor[] weights, Tensor[] scales, Tensor(a!) att_shift, Tensor(b!) wkv, "
        "Tensor(c!) ffn_shift, Tensor? slots) -> Tensor");
  m.def("rwkv6_step(Tensor x, Tensor[] weights, Tensor[] scales, Tensor(a!) att_shift, Tensor(b!) wkv, "
        "Tensor(c!) ffn_shift, Tensor? slots) -> Tensor");
  m.def("cross_entropy_rows(Tensor(a!) logits, Tensor targets, float l2wrap, bool overwrite) -> Tensor");
  m.def("accumulate(Tensor(a!) total, Tensor part, bool first) -> ()");
  m.def("shift_mix(Tensor h, Tensor? last, Tensor weights, Tensor[] low, Tensor? cu_seqlens, bool weighs_current) "
        "-> Tensor[]");
  m.def("shift_mix_backward(Tensor[] dmixed, Tensor h, Tensor? last, Tensor weights, Tensor[] low, "
        "Tensor? cu_seqlens, bool weighs_current) -> (Tensor dh, Tensor dlast, Tensor dweights, Tensor[] dlow)");
  m.def("head_norm_gate(Tensor y, Tensor weight, Tensor bias, Tensor gate, float eps) -> Tensor");
  m.def("head_norm_gate_backward(Tensor dout, Tensor y, Tensor weight, Tensor bias, Tensor gate, float eps) "
        "-> (Tensor dy, Tensor dweight, Tensor dbias, Tensor dgate)");
  m.def("add_layer_norm(Tensor x, Tensor? delta, Tensor weight, Tensor bias, float eps, ScalarType dtype) "
        "-> (Tensor sum, Tensor normal)");
  m.def("add_layer_norm_backward(Tensor dnormal, Tensor? dsum, Tensor sum, Tensor weight, float eps, "
        "bool needs_ddelta) -> (Tensor dx, Tensor ddelta, Tensor dweight, Tensor dbias)");
  m.def("squared_relu(Tensor x) -> Tensor");
  m.def("squared_relu_backward(Tensor dout, Tensor x) -> Tensor");
  m.def("sigmoid_gate(Tensor gate, Tensor x) -> Tensor");
  m.def("sigmoid_gate_backward(Tensor dout, Tensor gate, Tensor x) -> (Tensor dgate, Tensor dx)");
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(rwkv_ext, CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&build_info)); }

// `import rwkv_ext._C` is what loads the library and so registers the ops; the module itself is empty.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
