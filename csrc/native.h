// What the bindings of rwkv_ext._native share: one file each for the tokenizer and for streams.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tokenizer/encoder.h"
#include "tokenizer/id_buffer.h"
#include "tokenizer/vocabulary.h"

namespace py = pybind11;

struct Tokenizer {
  rwkv::Vocabulary vocabulary;
  rwkv::Encoder encoder;
  std::vector<py::object> numbers;  // [65536] each id as a Python int, once a list was asked for

  Tokenizer(rwkv::Vocabulary vocabulary, bool use_vectors)
      : vocabulary(std::move(vocabulary)), encoder(this->vocabulary, use_vectors) {}
};

inline std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

// A view of any object with contiguous bytes: bytes, bytearray, memoryview, an array; keeps them alive.
class BytesView {
 public:
  explicit BytesView(const py::object& object, const std::string& need = "encode_bytes: data must be contiguous bytes",
                     const std::string& advice = "; use encode() for a str") {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) {
      PyErr_Clear();
      throw py::type_error(need + ", got " + type_name(object) + advice);
    }
  }
  ~BytesView() { PyBuffer_Release(&view_); }
  BytesView(const BytesView&) = delete;
  BytesView& operator=(const BytesView&) = delete;
  std::string_view view() const {
    return {static_cast<const char*>(view_.buf), static_cast<size_t>(view_.len)};
  }

 private:
  Py_buffer view_;
};

// One id as int64; an id beyond that is out of range as well and is named in full.
int64_t read_id(const Tokenizer& tokenizer, py::handle item, size_t index);

// Hands the ids over without a copy.
py::array_t<uint16_t> to_array(rwkv::IdBuffer ids);

// The UTF-8 of a str, which keeps it alive; UnicodeEncodeError for a lone surrogate.
std::string_view utf8_of(py::handle text);

void bind_lines(py::module_& module);
void bind_special(py::module_& module);
void bind_stream(py::module_& module);
