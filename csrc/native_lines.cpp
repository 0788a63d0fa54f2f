// rwkv_ext._native: many documents at once, from JSON lines or from texts back to back, to ids back to back, and those
// in another order.
#include <stdexcept>
#include <utility>

#include "data/document_batch.h"
#include "data/gather.h"
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

// (ids, sizes, text bytes, dropped, lines, position) as document_batch.h says.
py::tuple to_tuple(rwkv::DocumentBatch batch) {
  const py::array_t<int32_t> sizes(batch.sizes.size(), batch.sizes.data());
  return py::make_tuple(to_array(std::move(batch.ids)), sizes, batch.text_bytes, batch.dropped, batch.lines,
                        batch.position);
}

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
  module.def(
      "encode_lines",
      [](const Tokenizer& tokenizer, const py::object& data, size_t position, const std::string& key, bool eod,
         bool drop_blank, bool use_vectors) {
        const BytesView lines(data, "encode_lines: lines must be contiguous bytes", "");
        rwkv::DocumentBatch batch;
        {
          const py::gil_scoped_release unlock;
          batch = rwkv::encode_lines(tokenizer.encoder, lines.view(), position, key,
                                     {eod, drop_blank, use_vectors});
        }
        return to_tuple(std::move(batch));
      },
      py::arg("tokenizer"), py::arg("data"), py::arg("position"), py::arg("key"), py::arg("eod"),
      py::arg("drop_blank"), py::arg("use_vectors") = true);
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
