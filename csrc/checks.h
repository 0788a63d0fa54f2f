// Every check of what a user may pass to an op, and so every message:
// "<op>: <argument> must ..., got <value>[; <what to do>]".
#pragma once

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string>

#include "torch_api.h"
#include "wkv_params.h"

namespace rwkv {

template <class Error = std::invalid_argument, class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

inline std::string sizes_text(const int64_t* sizes, int64_t count) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < count; ++i) text << (i ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}

inline std::string shape_text(const Tensor& x) { return sizes_text(x.sizes().data(), x.dim()); }

inline bool same_sizes(const Tensor& x, const int64_t* sizes, int64_t count) {
  return x.dim() == count && std::equal(sizes, sizes + count, x.sizes().data());
}

inline const char* dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Short: return "int16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return "another dtype";
  }
}

inline std::string device_text(const Tensor& x) {
  if (x.is_cpu()) return "cpu";
  return x.is_cuda() ? "cuda:" + std::to_string(x.get_device_index()) : "another device";
}

// The checks of one op. `like` is the tensor that the others must agree with: r, or what like_name says.
class Checks {
 public:
  Checks(const char* op, const Tensor& like, const char* like_name = "r")
      : op_(op), like_(like), like_name_(like_name) {}

  const char* op() const { return op_; }

  void activation() const {
    const ScalarType dtype = like_.scalar_type();
    if (dtype != ScalarType::Float && dtype != ScalarType::Double && dtype != ScalarType::BFloat16 &&
        dtype != ScalarType::Half)
      fail(op_, ": ", like_name_, " must be float32, float64, bfloat16 or float16, got ", dtype_text(dtype));
  }

  void rank(const char* axes, int64_t wanted) const {
    if (like_.dim() != wanted)
      fail(op_, ": ", like_name_, " must have ", wanted, " dimensions ", axes, ", got ", shape_text(like_));
    if (like_.size(wanted - 1) < 1)
      fail(op_, ": ", like_name_, " must have a head size N of at least 1, got ", shape_text(like_));
  }

  void device(const char* name, const Tensor& x) const {
    if (x.is_cpu() != like_.is_cpu() || x.get_device_index() != like_.get_device_index())
      fail(op_, ": ", name, " must be on ", like_name_, "'s device ", device_text(like_), ", got ", device_text(x),
           "; move it with .to(", like_name_, ".device)");
  }

  void same_shape(const char* name, const Tensor& x) const {
    device(name, x);
    if (!same_sizes(x, like_.sizes().data(), like_.dim()))
      fail(op_, ": ", name, " must have the shape of ", like_name_, " ", shape_text(like_), ", got ", shape_text(x));
  }

  void same_shape_and_dtype(const char* name, const Tensor& x) const {
    same_shape(name, x);
    same_dtype(name, x);
  }

  void same_dtype(const char* name, const Tensor& x) const {
    if (x.scalar_type() != like_.scalar_type())
      fail(op_, ": ", name, " must have ", like_name_, "'s dtype ", dtype_text(like_.scalar_type()), ", got ",
           dtype_text(x.scalar_type()), "; convert it with .to(", like_name_, ".dtype)");
  }

  void shape(const char* name, const Tensor& x, const char* axes, std::initializer_list<int64_t> wanted) const {
    device(name, x);
    const auto dims = static_cast<int64_t>(wanted.size());
    if (!same_sizes(x, wanted.begin(), dims))
      fail(op_, ": ", name, " must have shape ", axes, " = ", sizes_text(wanted.begin(), dims), ", got ",
           shape_text(x));
  }

  // w and u: fp32 or r's own dtype.
  void parameter_dtype(const char* name, const Tensor& x) const {
    const ScalarType got = x.scalar_type(), r = like_.scalar_type();
    if (got == r || (got == ScalarType::Float && r != ScalarType::Double)) return;
    const std::string wanted = r == ScalarType::Double || r == ScalarType::Float
                                   ? dtype_text(r)
                                   : std::string("float32 or ") + dtype_text(r);
    fail(op_, ": ", name, " must be ", wanted, ", got ", dtype_text(got), "; convert it with .to()");
  }

  // States: fp32, or fp64 beside fp64 activations.
  void state_dtype(const char* name, const Tensor& x) const {
    if (x.scalar_type() != state_dtype())
      fail(op_, ": ", name, " must be ", dtype_text(state_dtype()), " beside a ", dtype_text(like_.scalar_type()), " ",
           like_name_, ", got ", dtype_text(x.scalar_type()), "; convert it with .to()");
  }

  ScalarType state_dtype() const {
    return like_.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  void cu_seqlens(const Tensor& x) const {
    device("cu_seqlens", x);
    if (x.scalar_type() != ScalarType::Long && x.scalar_type() != ScalarType::Int)
      fail(op_, ": cu_seqlens must be int64 or int32, got ", dtype_text(x.scalar_type()));
    if (x.dim() != 1 || x.size(0) < 2)
      fail(op_, ": cu_seqlens must have shape [sequences + 1] with at least one sequence, got ", shape_text(x));
    if (like_.size(0) != 1)
      fail(op_, ": ", like_name_, " must have B = 1 with cu_seqlens, got ", shape_text(like_),
           "; concatenate the sequences along T");
  }

 private:
  const char* op_;
  const Tensor& like_;
  const char* like_name_;
};

inline Dtype dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: return Dtype::kFloat32;  // the checks have refused everything else
  }
}

inline Dtype dtype_of(const Tensor& x) { return dtype_of(x.scalar_type()); }

}  // namespace rwkv
