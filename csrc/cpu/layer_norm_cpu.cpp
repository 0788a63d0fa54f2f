// The sum of residual stream and delta with its layer norm on CPU tensors: checks, outputs, and work cut as in
// layer_cpu.cpp.
#include <tuple>

#include "cpu/layer_host.h"

namespace rwkv {
namespace {

// The stream's dtype, or a 16-bit one beside an fp32 stream.
void check_activations(const char* op, const Tensor& stream, const char* stream_name, const char* name,
                       ScalarType dtype) {
  const ScalarType own = stream.scalar_type();
  const bool is_half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  if (dtype == own || (own == ScalarType::Float && is_half)) return;
  fail(op, ": ", name, " must be ", dtype_text(own),
       own == ScalarType::Float ? std::string(", bfloat16 or float16") : std::string(), " beside a ", dtype_text(own),
       " ", stream_name, ", got ", dtype_text(dtype));
}

// What both passes know of the stream x [..., D] and its norm.
struct LayerNormCall {
  LayerNormParams params;
  Tensor x, weight;

  LayerNormCall(const char* op, const Tensor& given, const char* name, const Tensor& given_weight, double eps,
                ScalarType dtype)
      : x(made_contiguous(given)), weight(given_weight) {
    const Checks check(op, given, name);
    check.activation();
    if (given.dim() < 1 || given.size(given.dim() - 1) < 1)
      fail(op, ": ", name, " must have a last dimension D of at least 1, got ", shape_text(given));
    LayerNormParams& p = params;
    p.width = given.size(given.dim() - 1), p.rows = given.numel() / p.width, p.eps = eps;
    p.stream_dtype = dtype_of(given), p.dtype = dtype_of(dtype);
    p.x = x.data_ptr();
    check_parameter(check, "weight", given_weight);
    weight = real_copy(check, given_weight);
    p.weight = weight.data_ptr();
  }
  void check_parameter(const Checks& check, const char* name, const Tensor& parameter) const {
    check.shape(name, parameter, "[D]", {params.width});
    check.parameter_dtype(name, parameter);
  }
};

Tensor like_with_dtype(const Tensor& x, ScalarType dtype) {
  return in_torchs_words([&] { return torch::stable::new_empty(x, x.sizes(), dtype); });
}

std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& x, const OptionalTensor& delta, const Tensor& weight,
                                          const Tensor& bias, double eps, ScalarType dtype) {
  const char* op = "add_layer_norm";
  LayerNormCall call(op, x, "x", weight, eps, dtype);
  LayerNormParams& p = call.params;
  const Checks check(op, x, "x");
  check_activations(op, x, "x", "dtype", dtype);
  call.check_parameter(check, "bias", bias);
  const Tensor own_bias = real_copy(check, bias);
  OptionalTensor own_delta;
  if (delta) {
    check.same_shape("delta", *delta);
    if (delta->scalar_type() != dtype)
      fail(op, ": delta must have the result's dtype ", dtype_text(dtype), ", got ", dtype_text(delta->scalar_type()),
           "; convert it with .to()");
    own_delta = made_contiguous(*delta);
  }
  Tensor sum = delta ? contiguous_like(x) : new_empty(x, {0}, x.scalar_type());
  Tensor normal = like_with_dtype(x, dtype);
  p.delta = own_delta ? own_delta->data_ptr() : nullptr, p.bias = own_bias.data_ptr();
  p.sum = sum.data_ptr(), p.out = normal.data_ptr();
  for_rows(p.rows, grain_of(2 * p.width), p.width,
           [&](int64_t begin, int64_t end, double* scratch) { kernels().add_layer_norm(p, begin, end, scratch); });
  return {sum, normal};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(const Tensor& dnormal, const OptionalTensor& dsum,
                                                                   const Tensor& sum, const Tensor& weight,
                                                                   double eps, bool needs_ddelta) {
  const char* op = "add_layer_norm_backward";
  const ScalarType dtype = dnormal.scalar_type();
  LayerNormCall call(op, sum, "sum", weight, eps, dtype);
  LayerNormParams& p = call.params;
  const Checks check(op, sum, "sum");
  check.same_shape("dnormal", dnormal);
  check_activations(op, sum, "sum", "dnormal", dtype);
  if (dsum) check.same_shape_and_dtype("dsum", *dsum);
  const Tensor own_dnormal = made_contiguous(dnormal);
  OptionalTensor own_dsum;
  if (dsum) own_dsum = made_contiguous(*dsum);
  Tensor dx = contiguous_like(sum);
  Tensor ddelta = needs_ddelta ? like_with_dtype(sum, dtype) : new_empty(sum, {0}, dtype);
  const int64_t blocks = blocks_of(p.rows);
  const Tensor partial = new_empty(sum, {blocks, 2, p.width}, check.state_dtype());
  p.dout = own_dnormal.data_ptr(), p.dsum = own_dsum ? own_dsum->data_ptr() : nullptr;
  p.dx = dx.data_ptr(), p.ddelta = needs_ddelta ? ddelta.data_ptr() : nullptr, p.partial = partial.data_ptr();
  for_rows(blocks, 1, 2 * p.width, [&](int64_t begin, int64_t end, double* scratch) {
    for (int64_t block = begin; block < end; ++block) kernels().add_layer_norm_backward(p, block, scratch);
  });
  return {dx, ddelta, sum_of_blocks(partial, 0, weight), sum_of_blocks(partial, 1, weight)};
}

}  // namespace
}  // namespace rwkv

STABLE_TORCH_LIBRARY_IMPL(rwkv_ext, CPU, m) {
  m.impl("add_layer_norm", TORCH_BOX(&rwkv::add_layer_norm));
  m.impl("add_layer_norm_backward", TORCH_BOX(&rwkv::add_layer_norm_backward));
}
