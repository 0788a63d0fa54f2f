// Elementwise work on rows of numbers, in fp32. Included after decode_matrix.h, inside namespace rwkv::RWKV_ISA.
// Rows of the model's widths are a multiple of 32 long, so of whole lanes; a head's need not be.

// Calls body(i) for the start of every lane vector of a row.
template <class Body>
inline void for_lanes(int64_t size, const Body& body) {
  for (int64_t i = 0; i < size; i += kLanes<float>) body(i);
}

// Lanes i, i + 1, ... of a stored row.
inline Floats lanes_at(const Vector& row, int64_t i) {
  switch (row.storage) {
    case Storage::kBFloat16: return widen<Storage::kBFloat16>(static_cast<const uint16_t*>(row.data) + i);
    case Storage::kFloat16: return widen<Storage::kFloat16>(static_cast<const uint16_t*>(row.data) + i);
    default: return load<float>(static_cast<const float*>(row.data) + i);
  }
}

inline float number_at(const Vector& row, int64_t i) {
  switch (row.storage) {
    case Storage::kBFloat16: return get_one(static_cast<const BFloat16*>(row.data) + i);
    case Storage::kFloat16: return get_one(static_cast<const Float16*>(row.data) + i);
    default: return static_cast<const float*>(row.data)[i];
  }
}

inline Dtype dtype_of(Storage storage) {
  return storage == Storage::kBFloat16 ? Dtype::kBFloat16
                                       : storage == Storage::kFloat16 ? Dtype::kFloat16 : Dtype::kFloat32;
}

inline void store_row(const float* from, void* data, Storage storage, int64_t first, int64_t size) {
  const Dtype dtype = dtype_of(storage);
  store_row(from, static_cast<char*>(data) + first * bytes_of(dtype), dtype, size);
}

inline Floats sigmoid_of(Floats x) { return 1.0f / (1.0f + exp_of(-x)); }

inline Floats tanh_of(Floats x) {
  // Beyond 9 fp32's tanh is 1; within it exp stays finite.
  x = x > 9.0f ? Floats{} + 9.0f : x;
  x = x < -9.0f ? Floats{} - 9.0f : x;
  const Floats e = exp_minus_1_of(x + x);
  return e / (e + 2.0f);
}

// To mean 0 and variance 1; any size; in and out may be the same.
inline void normalise(const float* in, int64_t size, float epsilon, float* out) {
  const int64_t whole = size / kLanes<float> * kLanes<float>;
  Floats lanes = {};
  for_lanes(whole, [&](int64_t i) { lanes += load<float>(in + i); });
  float total = sum<float>(lanes);
  for (int64_t i = whole; i < size; ++i) total += in[i];
  const float mean = total / float(size);
  lanes = Floats{};
  for_lanes(whole, [&](int64_t i) {
    const Floats x = load<float>(in + i) - mean;
    lanes += x * x;
  });
  float squares = sum<float>(lanes);
  for (int64_t i = whole; i < size; ++i) squares += (in[i] - mean) * (in[i] - mean);
  const float scale = 1.0f / std::sqrt(squares / float(size) + epsilon);
  for_lanes(whole, [&](int64_t i) { store<float>(out + i, (load<float>(in + i) - mean) * scale); });
  for (int64_t i = whole; i < size; ++i) out[i] = (in[i] - mean) * scale;
}

inline void layer_norm(const float* in, int64_t size, const Vector& weight, const Vector& bias, float* out) {
  normalise(in, size, 1e-5f, out);
  for_lanes(size, [&](int64_t i) {
    store<float>(out + i, load<float>(out + i) * lanes_at(weight, i) + lanes_at(bias, i));
  });
}
