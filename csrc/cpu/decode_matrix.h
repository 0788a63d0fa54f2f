// Products of stored matrices with fp32 vectors, accumulated in fp32. Included after lanes.h, inside
// namespace rwkv::RWKV_ISA. What a row of the result is depends on that row of the matrix and on one vector alone: not
// on the rows beside it, nor on how many vectors share the pass over the weights.

// Partial sums of a row: additions take several cycles each, and with narrower vectors a row has more of them.
constexpr int kSums = RWKV_LANE_BYTES == 64 ? 2 : 4;
constexpr int64_t kBatchBlock = 4;  // vectors that share one read of the weights from memory
constexpr int64_t kRowsMultiple = 8, kMaxItemRows = 128;
constexpr int64_t kItemBytes = 65536;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kAheadBytes = 8192;  // two pages: what the processor asks for by itself ends with a page

template <Storage kStorage>
struct StoredType;
template <>
struct StoredType<Storage::kFloat32> { typedef float type; };
template <>
struct StoredType<Storage::kBFloat16> { typedef uint16_t type; };
template <>
struct StoredType<Storage::kFloat16> { typedef uint16_t type; };
template <>
struct StoredType<Storage::kInt8> { typedef int8_t type; };
template <Storage kStorage>
using Stored = typename StoredType<kStorage>::type;

using Floats = Lanes<float>;
using Integers = LaneTypes<float>::Bits;

#if RWKV_LANE_BYTES == 64
// The intrinsics without a mask make GCC warn of their own uninitialised variable.
constexpr __mmask16 kAllLanes = 0xffff;
#endif

inline Integers load_integers(const int8_t* from) {
#if RWKV_LANE_BYTES == 64
  return Integers(_mm512_maskz_cvtepi8_epi32(kAllLanes, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif RWKV_LANE_BYTES == 32
  return Integers(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  return Integers{from[0], from[1], from[2], from[3]};
#endif
}

// One lane vector of stored numbers.
template <Storage kStorage>
inline Floats widen(const Stored<kStorage>* from) {
  if constexpr (kStorage == Storage::kFloat32) {
    return load<float>(from);
  } else if constexpr (kStorage == Storage::kInt8) {
    return __builtin_convertvector(load_integers(from), Floats);
  } else if constexpr (kStorage == Storage::kBFloat16) {
    return widened(reinterpret_cast<const BFloat16*>(from));
  } else {
    return widened(reinterpret_cast<const Float16*>(from));
  }
}

// Calls body(std::integral_constant<Storage, storage>()).
template <class Body>
inline void with_storage(Storage storage, const Body& body) {
  switch (storage) {
    case Storage::kFloat32: return body(std::integral_constant<Storage, Storage::kFloat32>());
    case Storage::kBFloat16: return body(std::integral_constant<Storage, Storage::kBFloat16>());
    case Storage::kFloat16: return body(std::integral_constant<Storage, Storage::kFloat16>());
    case Storage::kInt8: return body(std::integral_constant<Storage, Storage::kInt8>());
  }
}

// total[s][r][b] = the sum of weights[r, c] x[b, c] over the columns c whose lane vector is number s of its kSums, for
// s = first to first + kTogether - 1.
template <Storage kStorage, int kRows, int kBatch, int kTogether>
inline void add_products(const Stored<kStorage>* weights, const float* x, int64_t columns, int first,
                         Floats (*total)[kRows][kBatch]) {
  constexpr int64_t kStep = kLanes<float>, kBlock = kSums * kStep;
  constexpr int64_t kPerLine = kLineBytes / int64_t(sizeof(Stored<kStorage>));
  constexpr int64_t kAhead = kAheadBytes / int64_t(sizeof(Stored<kStorage>));
  Floats sums[kTogether][kRows][kBatch] = {};
  const auto add = [&](int64_t column, int i) {
    Floats part[kBatch];
    for (int b = 0; b < kBatch; ++b) part[b] = load<float>(x + b * columns + column);
    for (int r = 0; r < kRows; ++r) {
      const Floats weight = widen<kStorage>(weights + r * columns + column);
      for (int b = 0; b < kBatch; ++b) sums[i][r][b] += weight * part[b];
    }
  };
  int64_t column = first * kStep;
  for (; column + kBlock <= columns; column += kBlock) {
    if (first == 0)
      for (int r = 0; r < kRows; ++r)
        for (int64_t i = 0; i < kBlock; i += kPerLine) __builtin_prefetch(weights + r * columns + column + i + kAhead);
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; ++i) add(column + i * kStep, i);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kTogether; ++i)
    if (column + i * kStep < columns) add(column + i * kStep, i);
  std::memcpy(total + first, sums, sizeof sums);
}

// out[b * out_stride + r] = sum_c weights[r, c] x[b, c] for kRows rows and kBatch vectors; columns is a multiple of 32.
template <Storage kStorage, int kRows, int kBatch>
inline void dot_rows(const Stored<kStorage>* weights, const float* x, int64_t columns, float* out, int64_t out_stride) {
  // Where there are more sums than registers: one after the other, over rows that are in the first cache by then.
  constexpr int kTogether = RWKV_LANE_BYTES == 64 || kRows * kBatch <= 2 ? kSums : 1;
  Floats total[kSums][kRows][kBatch];
#pragma GCC unroll 4
  for (int first = 0; first < kSums; first += kTogether)
    add_products<kStorage, kRows, kBatch, kTogether>(weights, x, columns, first, total);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < kBatch; ++b) {
      Floats all = total[0][r][b] + total[1][r][b];
      if constexpr (kSums == 4) all = all + (total[2][r][b] + total[3][r][b]);
      out[b * out_stride + r] = sum<float>(all);
    }
}

// out[c] += sum_r x[r] weights[r * stride + c]: rows of a matrix stored [in, out]; any number of columns.
template <Storage kStorage>
inline void add_rows(const Stored<kStorage>* weights, int64_t stride, int64_t rows, const float* x, int64_t columns,
                     float* out) {
  constexpr int64_t kStep = kLanes<float>;
  const auto panel = [&](int64_t column, auto width) {
    constexpr int kWidth = decltype(width)::value;
    Floats total[kWidth];
    for (int i = 0; i < kWidth; ++i) total[i] = load<float>(out + column + i * kStep);
    for (int64_t row = 0; row < rows; ++row) {
      const auto* from = weights + row * stride + column;
      for (int i = 0; i < kWidth; ++i) total[i] += x[row] * widen<kStorage>(from + i * kStep);
    }
    for (int i = 0; i < kWidth; ++i) store<float>(out + column + i * kStep, total[i]);
  };
  int64_t column = 0;
  for (; column + 8 * kStep <= columns; column += 8 * kStep) panel(column, std::integral_constant<int, 8>());
  for (; column + 2 * kStep <= columns; column += 2 * kStep) panel(column, std::integral_constant<int, 2>());
  if (column == columns) return;
  // The last columns in buffers of whole lanes.
  for (; column < columns; column += kStep) {
    const int64_t count = std::min(kStep, columns - column);
    Floats total = {};
    for (int64_t row = 0; row < rows; ++row) {
      Stored<kStorage> part[kStep] = {};
      std::memcpy(part, weights + row * stride + column, size_t(count) * sizeof part[0]);
      total += x[row] * widen<kStorage>(part);
    }
    for (int64_t i = 0; i < count; ++i) out[column + i] += total[i];
  }
}

inline void add_rows(const Matrix& matrix, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns,
                     const float* x, float* out) {
  with_storage(matrix.storage, [&](auto tag) {
    const auto* weights = static_cast<const Stored<tag.value>*>(matrix.data);
    add_rows<tag.value>(weights + first_row * matrix.columns + first_column, matrix.columns, rows, x, columns, out);
  });
}

// Rows of one piece of work: of the order of kItemBytes, by the matrix's shape alone.
inline int64_t item_rows(const Matrix& matrix) {
  static constexpr int64_t kBytes[] = {4, 2, 2, 1};
  const int64_t rows = kItemBytes / (matrix.columns * kBytes[int(matrix.storage)]) / kRowsMultiple * kRowsMultiple;
  return std::clamp(rows, kRowsMultiple, kMaxItemRows);
}

inline int64_t items_of(const Matrix& matrix) { return (matrix.rows + item_rows(matrix) - 1) / item_rows(matrix); }

// Rows first, first + 1, ... of one storage and kBatch vectors.
template <Storage kStorage, int kBatch>
inline void dot_item(const Matrix& matrix, int64_t first, int64_t rows, const float* x, float* out) {
  // One stream from its beginning to its end is what memory reads fastest; with many vectors arithmetic is the limit,
  // and every load has to serve several products.
  constexpr int kRows = kBatch == 4 ? 2 : 1;
  const auto* weights = static_cast<const Stored<kStorage>*>(matrix.data) + first * matrix.columns;
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows)
    dot_rows<kStorage, kRows, kBatch>(weights + row * matrix.columns, x, matrix.columns, out + row, kMaxItemRows);
  for (; row < rows; ++row)
    dot_rows<kStorage, 1, kBatch>(weights + row * matrix.columns, x, matrix.columns, out + row, kMaxItemRows);
  if (!matrix.scale) return;
  for (int b = 0; b < kBatch; ++b)
    for (int64_t r = 0; r < rows; ++r) out[b * kMaxItemRows + r] *= matrix.scale[first + r];
}

// out[b][r] = row first + r of the matrix times vector b of x [batch][columns], for up to kBatchBlock vectors.
inline void dot_item(const Matrix& matrix, int64_t first, int64_t rows, const float* x, int64_t batch,
                     float (*out)[kMaxItemRows]) {
  with_storage(matrix.storage, [&](auto tag) {
    int64_t b = 0;
    for (; b + 4 <= batch; b += 4) dot_item<tag.value, 4>(matrix, first, rows, x + b * matrix.columns, out[b]);
    for (; b + 2 <= batch; b += 2) dot_item<tag.value, 2>(matrix, first, rows, x + b * matrix.columns, out[b]);
    for (; b < batch; ++b) dot_item<tag.value, 1>(matrix, first, rows, x + b * matrix.columns, out[b]);
  });
}
