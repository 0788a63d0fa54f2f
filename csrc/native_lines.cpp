// rwkv_ext._native: many documents at once, from JSON lines or from texts back to back, to ids back to back, and those
// in another order.
#include <algorithm>
#include <cerrno>
#include <optional>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "data/document_batch.h"
#include "data/gather.h"
#include "data/line_reader.h"
#include "native.h"

namespace {

void check_texts(const py::array_t<int64_t>& offsets, size_t bytes) {
  if (offsets.ndim() != 1 || offsets.size() == 0) {
    throw std::invalid_argument("encode_texts: offsets must have one dimension and an element or more");
  }
  int64_t before = 0;
  for (py::ssize_t i = 0; i < offsets.size(); ++i) {
    if (offsets.at(i) < before || offsets.at(i) > static_cast<int64_t>(bytes)) {
      throw std::invalid_argument("encode_texts: offsets must ascend from 0 to at most " + std::to_string(bytes) +
                                  ", got " + std::to_string(offsets.at(i)) + " at " + std::to_string(i));
    }
    before = offsets.at(i);
  }
}

// (ids, sizes, text bytes, dropped, lines) as document_batch.h says.
py::tuple to_tuple(rwkv::DocumentBatch batch) {
  const py::array_t<int32_t> sizes(batch.sizes.size(), batch.sizes.data());
  return py::make_tuple(to_array(std::move(batch.ids)), sizes, batch.text_bytes, batch.dropped, batch.lines);
}

// Without Python's lock; a file's errors become OSError.
template <typename Work>
auto read(const Work& work) {
  try {
    const py::gil_scoped_release unlock;
    return work();
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
    throw py::error_already_set();
  }
}

// A LineReader, and the memory or nothing that it reads from. For one thread at a time.
class Lines {
 public:
  explicit Lines(const py::object& data)
      : memory_(std::in_place, data, "LineReader: lines must be contiguous bytes", ""), reader_(memory_->view()) {}
  Lines(int file, size_t begin, size_t end, size_t block) : reader_(file, begin, end, block) {
    if (block == 0) throw std::invalid_argument("LineReader: block must be a number of bytes above 0, got 0");
  }

  size_t position() const { return reader_.position(); }
  size_t end() const { return reader_.end(); }

  py::tuple encode(const Tokenizer& tokenizer, const std::string& key, bool eod, bool drop_blank, bool use_vectors) {
    const size_t begin = position();
    rwkv::DocumentBatch batch = read([&] {
      return rwkv::encode_lines(tokenizer.encoder, reader_, key, {eod, drop_blank, use_vectors}, expected_);
    });
    expected_ = position() - begin;
    return to_tuple(std::move(batch));
  }

  // The next line, with its end, and passes it; no bytes behind the last.
  py::bytes next_line() {
    const std::string_view line = read([&] {
      const std::string_view lines = reader_.lines();
      const size_t end = lines.find('\n');
      return end == std::string_view::npos ? lines : lines.substr(0, end + 1);
    });
    const py::bytes bytes(line.data(), line.size());
    reader_.pass(line.size());
    return bytes;
  }

 private:
  std::optional<BytesView> memory_;
  rwkv::LineReader reader_;
  // Bytes that encode() passes: all, then as many as the last time. Room for all, which comes from the system and goes
  // back to it, takes longer than a few lines between two that are left to Python.
  size_t expected_ = std::max(position(), end()) - position();
};

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

Array<uint16_t> gather(const Array<uint16_t>& ids, const Array<int64_t>& begins, const Array<int32_t>& sizes) {
  if (begins.size() != sizes.size()) throw std::invalid_argument("gather: begins and sizes must be as many");
  int64_t total = 0;
  for (py::ssize_t i = 0; i < sizes.size(); ++i) {
    const int64_t begin = begins.at(i), size = sizes.at(i);
    if (begin < 0 || size < 0 || begin > ids.size() - size) {
      throw std::invalid_argument("gather: document " + std::to_string(i) + " must lie in the " +
                                  std::to_string(ids.size()) + " ids, got " + std::to_string(size) + " from " +
                                  std::to_string(begin) + " on");
    }
    total += size;
  }
  Array<uint16_t> out(total);
  uint16_t* data = out.mutable_data();
  const py::gil_scoped_release unlock;
  rwkv::gather_documents(ids.data(), begins.data(), sizes.data(), static_cast<size_t>(sizes.size()), data);
  return out;
}

}  // namespace

void bind_lines(py::module_& module) {
  py::class_<Lines>(module, "LineReader")
      .def(py::init<const py::object&>(), py::arg("lines"))
      .def(py::init<int, size_t, size_t, size_t>(), py::arg("file"), py::arg("begin"), py::arg("end"),
           py::arg("block"))
      .def_property_readonly("position", &Lines::position)
      .def_property_readonly("end", &Lines::end)
      .def("encode", &Lines::encode, py::arg("tokenizer"), py::arg("key"), py::arg("eod"), py::arg("drop_blank"),
           py::arg("use_vectors") = true)
      .def("next_line", &Lines::next_line);
  module.def(
      "encode_texts",
      [](const Tokenizer& tokenizer, const py::object& data, const py::array_t<int64_t, py::array::c_style>& offsets,
         size_t first, bool eod, bool drop_blank, bool use_vectors) {
        const BytesView texts(data, "encode_texts: data must be contiguous bytes", "");
        check_texts(offsets, texts.view().size());
        rwkv::DocumentBatch batch;
        {
          const py::gil_scoped_release unlock;
          batch = rwkv::encode_texts(tokenizer.encoder, texts.view(), offsets.data(), first,
                                     static_cast<size_t>(offsets.size()) - 1, {eod, drop_blank, use_vectors});
        }
        return to_tuple(std::move(batch));
      },
      py::arg("tokenizer"), py::arg("data"), py::arg("offsets"), py::arg("first"), py::arg("eod"),
      py::arg("drop_blank"), py::arg("use_vectors") = true);
  module.def("gather", &gather, py::arg("ids"), py::arg("begins"), py::arg("sizes"),
             "The documents ids[begins[i] : begins[i] + sizes[i]], back to back.");
}
