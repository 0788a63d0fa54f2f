// rwkv_ext._native.Stream: text of ids that arrive one at a time; StreamEncoder: ids of text that arrives in chunks.
#include <memory>
#include <utility>

#include "native.h"
#include "tokenizer/decoder.h"
#include "tokenizer/stream_encoder.h"

namespace {

// Python's own decoder makes one U+FFFD of each maximal broken piece, as Unicode recommends.
py::str replace_broken(const std::string& bytes) {
  return py::reinterpret_steal<py::str>(
      PyUnicode_DecodeUTF8(bytes.data(), static_cast<py::ssize_t>(bytes.size()), "replace"));
}

// The UTF-8 of a str, which keeps it alive; UnicodeEncodeError for half a surrogate pair.
std::string_view utf8_of(const py::object& text) {
  py::ssize_t size = 0;
  if (const char* bytes = PyUnicode_AsUTF8AndSize(text.ptr(), &size)) return {bytes, static_cast<size_t>(size)};
  py::error_already_set error;
  if (error.matches(PyExc_UnicodeEncodeError)) {
    const std::string reason = py::str(error.value().attr("reason"));
    error.value().attr("reason") = reason + "; join the halves of a pair before push(), or push bytes";
  }
  throw error;
}

struct EncoderStream {
  const Tokenizer& tokenizer;
  rwkv::StreamEncoder encoder;
  bool is_busy = false;  // read and written with Python's lock held

  // Runs `work` without Python's lock; no other thread may use this stream meanwhile.
  template <typename Work>
  py::array_t<uint16_t> run(const char* where, Work work) {
    if (is_busy) {
      throw std::runtime_error(std::string(where) + ": another thread is using this stream; give each its own");
    }
    struct Claim {
      bool& flag;
      explicit Claim(bool& flag) : flag(flag) { flag = true; }
      ~Claim() { flag = false; }
    } claim(is_busy);
    rwkv::IdBuffer ids;
    {
      const py::gil_scoped_release unlock;
      work(ids);
    }
    return to_array(std::move(ids));
  }

  py::array_t<uint16_t> push(const py::object& data) {
    const auto add = [&](std::string_view chunk) {
      return run("push", [&](rwkv::IdBuffer& ids) { encoder.push(chunk, ids); });
    };
    if (PyUnicode_Check(data.ptr())) return add(utf8_of(data));
    return add(BytesView(data, "push: data must be a str or contiguous bytes", "").view());
  }

  py::array_t<uint16_t> flush() {
    return run("flush", [&](rwkv::IdBuffer& ids) { encoder.flush(ids); });
  }
};

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

  py::class_<EncoderStream>(module, "StreamEncoder", "Ids of text that arrives in chunks.")
      .def(py::init([](const Tokenizer& tokenizer) {
             return std::make_unique<EncoderStream>(EncoderStream{tokenizer, rwkv::StreamEncoder(tokenizer.encoder)});
           }),
           py::keep_alive<1, 2>())
      .def("push", &EncoderStream::push, py::arg("data"),
           "Add a str or contiguous bytes and return the ids that are certain now, uint16, perhaps none.")
      .def("flush", &EncoderStream::flush, "Return the ids of the rest, uint16, and start anew.")
      .def_property_readonly(
          "held", [](const EncoderStream& self) { return self.encoder.held(); },
          "Bytes whose ids are not certain yet: fewer than 255.");
}
