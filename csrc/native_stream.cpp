// rwkv_ext._native.Stream: text of ids that arrive a few at a time; StreamEncoder: ids of text that arrives in chunks.
#include <memory>
#include <utility>
#include <vector>

#include "native.h"
#include "tokenizer/decoder.h"
#include "tokenizer/stream_decoder.h"
#include "tokenizer/stream_encoder.h"

namespace {

// One id, or any sequence of them; a bad one is named by its index behind the `pushed` ones.
std::vector<int64_t> read_ids(const Tokenizer& tokenizer, const py::object& ids, size_t pushed) {
  // Arrays and tensors have __index__ whatever their shape.
  const bool is_one = PyLong_Check(ids.ptr()) || (py::hasattr(ids, "ndim") ? py::cast<int>(ids.attr("ndim")) == 0
                                                                          : PyIndex_Check(ids.ptr()) != 0);
  if (is_one) return {read_id(tokenizer, ids, pushed)};
  if (py::isinstance<py::bytes>(ids) || py::isinstance<py::str>(ids) || !py::isinstance<py::iterable>(ids)) {
    throw py::type_error("push: ids must be an id or a sequence of ids, got " + type_name(ids));
  }
  std::vector<int64_t> numbers;
  for (const py::handle item : ids) numbers.push_back(read_id(tokenizer, item, pushed + numbers.size()));
  return numbers;
}

struct DecoderStream {
  const Tokenizer& tokenizer;
  std::string errors;
  rwkv::StreamDecoder decoder;

  // Python's own decoder finds maximal broken pieces, as Unicode recommends.
  py::str to_text(const std::string& bytes) const {
    PyObject* text = PyUnicode_DecodeUTF8(bytes.data(), static_cast<py::ssize_t>(bytes.size()), errors.c_str());
    if (!text) throw py::error_already_set();
    return py::reinterpret_steal<py::str>(text);
  }

  py::str push(const py::object& ids) {
    const std::vector<int64_t> numbers = read_ids(tokenizer, ids, decoder.pushed());
    rwkv::StreamDecoder next = decoder;  // what is refused adds nothing
    py::str text = to_text(next.push(numbers.data(), numbers.size()));
    decoder = std::move(next);
    return text;
  }
};

std::string_view chunk_of(const py::object& text) {
  try {
    return utf8_of(text);
  } catch (py::error_already_set& error) {
    if (error.matches(PyExc_UnicodeEncodeError)) {
      const std::string reason = py::str(error.value().attr("reason"));
      error.value().attr("reason") = reason + "; join the halves of a pair before push(), or push bytes";
    }
    throw;
  }
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
    if (PyUnicode_Check(data.ptr())) return add(chunk_of(data));
    return add(BytesView(data, "push: data must be a str or contiguous bytes", "").view());
  }

  py::array_t<uint16_t> flush() {
    return run("flush", [&](rwkv::IdBuffer& ids) { encoder.flush(ids); });
  }
};

}  // namespace

void bind_stream(py::module_& module) {
  py::class_<DecoderStream>(module, "Stream", "Text of ids that arrive a few at a time.")
      .def(py::init([](const Tokenizer& tokenizer, const std::string& errors) {
             return std::make_unique<DecoderStream>(
                 DecoderStream{tokenizer, errors, rwkv::StreamDecoder(tokenizer.vocabulary)});
           }),
           py::arg("tokenizer"), py::arg("errors"), py::keep_alive<1, 2>())
      .def("push", &DecoderStream::push, py::arg("ids"),
           "Add one id, or a sequence of them, and return the characters they complete, perhaps none.")
      .def(
          "flush", [](DecoderStream& self) { return self.to_text(self.decoder.flush()); },
          "Start anew, and return what `errors` makes of a character that was left incomplete, if one was.");

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
