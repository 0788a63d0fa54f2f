// rwkv_ext._native: the tokenizer for Python. C++ errors become ValueError; work runs without Python's lock.
#include "native.h"

#include <algorithm>
#include <deque>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "tokenizer/batch_encoder.h"
#include "tokenizer/decoder.h"

py::array_t<uint16_t> to_array(rwkv::IdBuffer ids) {
  const size_t count = ids.size();
  if (count == 0) return py::array_t<uint16_t>(0);
  std::unique_ptr<uint16_t, rwkv::FreeMemory> memory = ids.release();
  const uint16_t* data = memory.get();
  const py::capsule owner(data, [](void* pointer) { rwkv::FreeMemory()(pointer); });
  (void)memory.release();  // the capsule frees it with the array
  return py::array_t<uint16_t>(count, data, owner);
}

int64_t read_id(const Tokenizer& tokenizer, py::handle item, size_t index) {
  int overflow = 0;
  if (PyLong_CheckExact(item.ptr())) {
    const long long id = PyLong_AsLongLongAndOverflow(item.ptr(), &overflow);
    if (overflow == 0) return id;
  }
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(item.ptr()));
  if (!number) {
    PyErr_Clear();
    throw py::type_error("decode: ids[" + std::to_string(index) + "] must be an integer, got " +
                         type_name(item));
  }
  const long long id = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  if (overflow != 0) rwkv::throw_bad_id(tokenizer.vocabulary, index, py::str(number));
  return id;
}

std::string_view utf8_of(py::handle text) {
  py::ssize_t size = 0;
  const char* bytes = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
  if (!bytes) throw py::error_already_set();
  return {bytes, static_cast<size_t>(size)};
}

namespace {

// Texts that are str or have contiguous bytes, kept as they are while others encode them.
class Texts {
 public:
  // A message calls the text `name`.
  void add(const py::object& text, const std::string& name) {
    if (PyUnicode_Check(text.ptr())) {
      strings_.push_back(text);
      views_.push_back(utf8_of(text));
    } else {
      buffers_.emplace_back(text, name + " must be a str or contiguous bytes", "");
      views_.push_back(buffers_.back().view());
    }
  }
  const std::vector<std::string_view>& views() const { return views_; }

 private:
  std::vector<py::object> strings_;
  std::deque<BytesView> buffers_;
  std::vector<std::string_view> views_;
};

rwkv::IdBuffer encode(const Tokenizer& tokenizer, std::string_view text) {
  const py::gil_scoped_release unlock;
  rwkv::IdBuffer ids;
  ids.reserve(tokenizer.encoder.expected_ids({text}));
  tokenizer.encoder.encode(text, ids);
  return ids;
}

// Every list refers to the same 65536 numbers: making a new one for each id takes longer than encoding.
py::list to_list(Tokenizer& tokenizer, const rwkv::IdBuffer& ids) {
  py::list list(ids.size());
  if (tokenizer.numbers.empty()) {
    std::vector<py::object> numbers;
    for (size_t id = 0; id < rwkv::kVocabSize; ++id) numbers.push_back(py::int_(id));
    tokenizer.numbers = std::move(numbers);  // all or none, should memory run out
  }
  const uint16_t* id = ids.data();
  for (size_t i = 0; i < ids.size(); ++i) {
    PyList_SET_ITEM(list.ptr(), static_cast<py::ssize_t>(i), tokenizer.numbers[id[i]].inc_ref().ptr());
  }
  return list;
}

rwkv::BatchEncoder encode(const Tokenizer& tokenizer, const Texts& texts, size_t threads) {
  const py::gil_scoped_release unlock;
  return rwkv::BatchEncoder(tokenizer.encoder, texts.views(), threads);
}

py::array take_ids(rwkv::BatchEncoder& batch, bool is_wide) {
  if (!is_wide) return to_array(batch.take_ids());
  py::array_t<uint32_t> ids(batch.offsets().back());
  uint32_t* begin = ids.mutable_data();
  const py::gil_scoped_release unlock;
  batch.copy(begin);
  return ids;
}

py::tuple encode_packed(const Tokenizer& tokenizer, const py::object& items, size_t threads, bool is_wide) {
  if (!py::isinstance<py::iterable>(items) || PyUnicode_Check(items.ptr()) || PyObject_CheckBuffer(items.ptr())) {
    throw py::type_error("encode_batch: texts must be several, such as a list of str or bytes, got " +
                         type_name(items) + "; use encode_array() for one text");
  }
  Texts texts;
  for (const py::handle item : items) {
    const std::string index = std::to_string(texts.views().size());
    texts.add(py::reinterpret_borrow<py::object>(item), "encode_batch: texts[" + index + "]");
  }
  rwkv::BatchEncoder batch = encode(tokenizer, texts, threads);
  return py::make_tuple(take_ids(batch, is_wide),
                        py::array_t<int64_t>(batch.offsets().size(), batch.offsets().data()));
}

py::array encode_array(const Tokenizer& tokenizer, const py::object& text, size_t threads, bool is_wide) {
  Texts texts;
  texts.add(text, "encode_array: text");
  if (threads == 1 && !is_wide) return to_array(encode(tokenizer, texts.views()[0]));
  rwkv::BatchEncoder batch = encode(tokenizer, texts, threads);
  return take_ids(batch, is_wide);
}

// Whether bytes keep memory for `room` though they need `size`: to give back so little is not worth its time. Worse,
// glibc maps a large block anew unless one as large was freed before, and bytes that were cut to their size are
// smaller, when they are freed, than the room that the next ones ask for.
bool is_nearly(size_t size, py::ssize_t room) {
  const auto all = static_cast<size_t>(room);
  return size <= all && all - size <= all / 16;
}

template <typename Id>
py::bytes decode_ids(const Tokenizer& tokenizer, const Id* ids, size_t count) {
  py::object bytes;
  const auto resize = [&bytes](size_t size) {
    const py::gil_scoped_acquire lock;
    PyObject* resized = bytes.release().ptr();
    if (resized && is_nearly(size, PyBytes_GET_SIZE(resized))) {
      Py_SET_SIZE(resized, static_cast<py::ssize_t>(size));
      PyBytes_AS_STRING(resized)[size] = '\0';
    } else if (resized) {
      _PyBytes_Resize(&resized, static_cast<py::ssize_t>(size));
    } else {
      resized = PyBytes_FromStringAndSize(nullptr, static_cast<py::ssize_t>(size));
    }
    if (!resized) throw py::error_already_set();
    bytes = py::reinterpret_steal<py::object>(resized);
    return PyBytes_AS_STRING(resized);
  };
  std::optional<py::gil_scoped_release> unlock;
  if (count > 1000) unlock.emplace();  // fewer take less than a microsecond
  rwkv::decode(tokenizer.vocabulary, ids, count, resize);
  unlock.reset();
  return bytes;
}

template <typename Id>
py::bytes decode_array(const Tokenizer& tokenizer, const py::array& array) {
  const py::array_t<Id, py::array::c_style | py::array::forcecast> ids(array);  // MemoryError if a copy finds no room
  return decode_ids(tokenizer, ids.data(), static_cast<size_t>(ids.size()));
}

py::bytes decode_sequence(const Tokenizer& tokenizer, const py::object& ids) {
  std::vector<int64_t> numbers;
  if (PyList_CheckExact(ids.ptr()) || PyTuple_CheckExact(ids.ptr())) {
    numbers.reserve(static_cast<size_t>(PySequence_Fast_GET_SIZE(ids.ptr())));
    // Its size is asked for each time: an item's __index__ may change the list.
    for (py::ssize_t i = 0; i < PySequence_Fast_GET_SIZE(ids.ptr()); ++i) {
      const auto item = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(ids.ptr(), i));
      numbers.push_back(read_id(tokenizer, item, numbers.size()));
    }
  } else {
    for (const py::handle item : ids) numbers.push_back(read_id(tokenizer, item, numbers.size()));
  }
  return decode_ids(tokenizer, numbers.data(), numbers.size());
}

py::bytes decode(const Tokenizer& tokenizer, const py::object& ids) {
  if (py::isinstance<py::array>(ids)) {
    const auto array = py::reinterpret_borrow<py::array>(ids);
    const char kind = array.dtype().kind();
    if (array.ndim() != 1 || (kind != 'i' && kind != 'u' && kind != 'O')) {
      throw py::type_error("decode: ids must be integers in one dimension, got an array of " +
                           std::string(py::str(array.dtype())) + " with " + std::to_string(array.ndim()) +
                           " dimensions");
    }
    if (array.dtype().is(py::dtype::of<uint16_t>())) return decode_array<uint16_t>(tokenizer, array);
    if (array.dtype().is(py::dtype::of<uint32_t>())) return decode_array<uint32_t>(tokenizer, array);
    if (kind == 'u') return decode_array<uint64_t>(tokenizer, array);
    if (kind == 'i') return decode_array<int64_t>(tokenizer, array);
  }
  if (py::isinstance<py::bytes>(ids) || py::isinstance<py::str>(ids) || !py::isinstance<py::iterable>(ids)) {
    throw py::type_error("decode: ids must be a sequence of integers, got " + type_name(ids));
  }
  return decode_sequence(tokenizer, ids);
}

py::bytes to_bytes(const rwkv::Sha256& digest) {
  return py::bytes(reinterpret_cast<const char*>(digest.data()), digest.size());
}

rwkv::Sha256 to_digest(std::string_view bytes) {
  rwkv::Sha256 digest;
  if (bytes.size() != digest.size()) {
    throw py::value_error("compile_vocabulary: sha256 must have 32 bytes, got " + std::to_string(bytes.size()));
  }
  std::copy(bytes.begin(), bytes.end(), digest.begin());
  return digest;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "World tokenizer in C++; see rwkv_ext.tokenizer for the documented names.";

  py::class_<Tokenizer>(module, "Tokenizer")
      .def(py::init([](const py::bytes& text, const std::string& name, bool use_vectors) {
             return std::make_unique<Tokenizer>(rwkv::Vocabulary::parse(std::string_view(text), name), use_vectors);
           }),
           py::arg("vocabulary"), py::arg("name"), py::arg("use_vectors") = true)
      .def_static(
          "map",
          [](const std::string& path, bool use_vectors) {
            return std::make_unique<Tokenizer>(rwkv::Vocabulary::map(path), use_vectors);
          },
          py::arg("path"), py::arg("use_vectors") = true, "The tokenizer of a file that compile_vocabulary() made.")
      .def_property_readonly("source_size",
                             [](const Tokenizer& self) { return self.vocabulary.source_size(); })
      .def_property_readonly("source_digest",
                             [](const Tokenizer& self) { return to_bytes(self.vocabulary.source_digest()); })
      .def("encode",
           [](Tokenizer& self, const py::object& text) {
             if (!PyUnicode_Check(text.ptr())) {
               throw py::type_error("encode: text must be a str, got " + type_name(text) +
                                    "; use encode_bytes() for bytes");
             }
             return to_list(self, encode(self, utf8_of(text)));
           })
      .def("encode_bytes",
           [](Tokenizer& self, const py::object& data) {
             return to_list(self, encode(self, BytesView(data).view()));
           })
      .def("encode_array", &encode_array, py::arg("text"), py::arg("threads") = 1, py::arg("is_wide") = false)
      .def("encode_packed", &encode_packed, py::arg("texts"), py::arg("threads"), py::arg("is_wide"))
      .def("decode_bytes", &decode)
      .def("byte_lengths", [](const Tokenizer& self) {
        return py::array_t<uint8_t>(rwkv::kVocabSize, self.vocabulary.lengths());
      });
  module.def(
      "compile_vocabulary",
      [](const py::bytes& text, const std::string& name, const py::bytes& digest) {
        return py::bytes(rwkv::Vocabulary::parse(std::string_view(text), name, to_digest(digest)).image());
      },
      py::arg("text"), py::arg("name"), py::arg("sha256"), "The bytes of a file for Tokenizer.map().");

  bind_lines(module);
  bind_special(module);
  bind_stream(module);
}
