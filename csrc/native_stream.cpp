// rwkv_ext._native.Stream: text of ids that arrive one at a time.
#include <memory>

#include "native.h"
#include "tokenizer/decoder.h"

namespace {

// Python's own decoder makes one U+FFFD of each maximal broken piece, as Unicode recommends.
py::str replace_broken(const std::string& bytes) {
  return py::reinterpret_steal<py::str>(
      PyUnicode_DecodeUTF8(bytes.data(), static_cast<py::ssize_t>(bytes.size()), "replace"));
}

}  // namespace

void bind_stream(py::module_& module) {
  struct Stream {
    const Tokenizer& tokenizer;
    rwkv::StreamDecoder decoder;
  };
  py::class_<Stream>(module, "Stream", "Text of ids that arrive one at a time.")
      .def(py::init([](const Tokenizer& tokenizer) {
             return std::make_unique<Stream>(Stream{tokenizer, rwkv::StreamDecoder(tokenizer.vocabulary)});
           }),
           py::keep_alive<1, 2>())
      .def(
          "push",
          [](Stream& self, const py::object& id) {
            return replace_broken(self.decoder.push(read_id(self.tokenizer, id, self.decoder.pushed())));
          },
          py::arg("id"), "Add one id and return the characters it completes, perhaps none.")
      .def(
          "flush", [](Stream& self) { return replace_broken(self.decoder.flush()); },
          "Return U+FFFD if a character was left incomplete, else nothing, and start anew.");
}
