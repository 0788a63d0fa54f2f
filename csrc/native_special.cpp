// rwkv_ext._native.encode_special: texts that a caller allows stand for one id each.
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "native.h"
#include "tokenizer/special_texts.h"

namespace {

py::array_t<uint16_t> encode(const Tokenizer& tokenizer, const rwkv::SpecialTexts& special, std::string_view text) {
  rwkv::IdBuffer ids;
  {
    const py::gil_scoped_release unlock;
    special.encode(tokenizer.encoder, text, ids);
  }
  return to_array(std::move(ids));
}

// `allowed` is a sequence of (text as UTF-8, id); `need` says what the text must be, should it not be that.
py::array_t<uint16_t> encode_special(const Tokenizer& tokenizer, const py::object& text,
                                     const std::vector<std::pair<std::string, uint16_t>>& allowed,
                                     const std::string& need) {
  rwkv::SpecialTexts special;
  for (const auto& [bytes, id] : allowed) special.add(bytes, id);
  if (PyUnicode_Check(text.ptr())) return encode(tokenizer, special, utf8_of(text));
  return encode(tokenizer, special, BytesView(text, need, "").view());
}

}  // namespace

void bind_special(py::module_& module) {
  module.def("encode_special", &encode_special, py::arg("tokenizer"), py::arg("text"), py::arg("allowed"),
             py::arg("need"));
}
