// What the ops say on CUDA tensors in a build without CUDA; in one with it, cuda/wkv_cuda.cpp takes their place.
#include <initializer_list>
#include <tuple>
#include <utility>

#include "checks.h"
#include "torch_api.h"

namespace rwkv {
namespace {

// Also reached with the first tensor elsewhere, when another tensor is on a GPU: then that is what is wrong.
[[noreturn]] void refuse(const char* op, const char* name, const Tensor& first,
                         std::initializer_list<std::pair<const char*, const Tensor&>> others) {
  const Checks check(op, first, name);
  for (const auto& [other_name, other] : others) check.device(other_name, other);
  fail<std::runtime_error>(op, ": ", name, " is on ", device_text(first), ", but rwkv_ext was built without CUDA; "
                           "rebuild with RWKV_EXT_CUDA=1 pip install --no-build-isolation -e .");
}

[[noreturn]] void refuse(const char* op, const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w,
                         const Tensor& u) {
  refuse(op, "r", r, {{"k", k}, {"v", v}, {"w", w}, {"u", u}});
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <int kVersion>
Forward forward(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u,
                const OptionalTensor&, const OptionalTensor&, bool) {
  refuse(kVersion == 5 ? "wkv5" : "wkv6", r, k, v, w, u);
}

template <int kVersion>
Backward backward(const OptionalTensor&, const OptionalTensor&, const Tensor& r, const Tensor& k, const Tensor& v,
                  const Tensor& w, const Tensor& u, const OptionalTensor&, const OptionalTensor&, const Tensor&,
                  const Tensor&) {
  refuse(kVersion == 5 ? "wkv5_backward" : "wkv6_backward", r, k, v, w, u);
}

template <int kVersion>
std::tuple<Tensor, Tensor> summary(const Tensor& k, const Tensor& v, const Tensor& w, const OptionalTensor&) {
  refuse(kVersion == 5 ? "wkv5_summary" : "wkv6_summary", "k", k, {{"v", v}, {"w", w}});
}

template <int kVersion>
Tensor adjoint_summary(const Tensor& r, const Tensor& w, const Tensor& dy, const OptionalTensor&) {
  refuse(kVersion == 5 ? "wkv5_adjoint_summary" : "wkv6_adjoint_summary", "r", r, {{"w", w}, {"dy", dy}});
}

template <int kVersion>
Tensor step(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u, Tensor,
            const OptionalTensor&) {
  refuse(kVersion == 5 ? "wkv5_step" : "wkv6_step", r, k, v, w, u);
}

}  // namespace
}  // namespace rwkv

STABLE_TORCH_LIBRARY_IMPL(rwkv_ext, CUDA, m) {
  m.impl("wkv5_forward", TORCH_BOX(&rwkv::forward<5>));
  m.impl("wkv6_forward", TORCH_BOX(&rwkv::forward<6>));
  m.impl("wkv5_backward", TORCH_BOX(&rwkv::backward<5>));
  m.impl("wkv6_backward", TORCH_BOX(&rwkv::backward<6>));
  m.impl("wkv5_summary", TORCH_BOX(&rwkv::summary<5>));
  m.impl("wkv6_summary", TORCH_BOX(&rwkv::summary<6>));
  m.impl("wkv5_adjoint_summary", TORCH_BOX(&rwkv::adjoint_summary<5>));
  m.impl("wkv6_adjoint_summary", TORCH_BOX(&rwkv::adjoint_summary<6>));
  m.impl("wkv5_step", TORCH_BOX(&rwkv::step<5>));
  m.impl("wkv6_step", TORCH_BOX(&rwkv::step<6>));
}
