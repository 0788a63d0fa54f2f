// Rows of tensors in and out of arithmetic precision T, and the memory that kernels work in. Included after elements.h.

template <class T>
constexpr Dtype kDtypeOf = sizeof(T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;

inline int64_t bytes_of(Dtype dtype) {
  constexpr int64_t kBytes[] = {4, 8, 2, 2};
  return kBytes[static_cast<int>(dtype)];
}

inline char* element(const View& view, int64_t row, int64_t token, int64_t head) {
  const int64_t offset = row * view.batch_stride + token * view.token_stride + head * view.head_stride;
  return static_cast<char*>(view.data) + offset * bytes_of(view.dtype);
}

// Rows of `size` elements that lie `step` bytes apart, of any dtype that is computed in T, to and from rows of T that
// lie `stride` elements apart.
template <class T>
[[gnu::always_inline]] inline void load_rows(T* to, int64_t stride, const char* from, int64_t step, int64_t rows,
                                             Dtype dtype, int64_t size) {
  for_element(dtype, [&](auto element) __attribute__((always_inline)) {
    using E = decltype(element);
    if constexpr (std::is_same_v<Real<E>, T>)
      for (int64_t row = 0; row < rows; ++row)
        for_lanes<T>(size, [&](auto place) __attribute__((always_inline)) {
          put(to + row * stride, place, get(reinterpret_cast<const E*>(from + row * step), place));
        });
  });
}

template <class T>
[[gnu::always_inline]] inline void store_rows(const T* from, int64_t stride, char* to, int64_t step, int64_t rows,
                                              Dtype dtype, int64_t size) {
  for_element(dtype, [&](auto element) __attribute__((always_inline)) {
    using E = decltype(element);
    if constexpr (std::is_same_v<Real<E>, T>)
      for (int64_t row = 0; row < rows; ++row)
        for_lanes<T>(size, [&](auto place) __attribute__((always_inline)) {
          put(reinterpret_cast<E*>(to + row * step), place, get(from + row * stride, place));
        });
  });
}

template <class T>
[[gnu::always_inline]] inline void load_row(T* to, const void* memory, Dtype dtype, int64_t size) {
  load_rows(to, 0, static_cast<const char*>(memory), 0, 1, dtype, size);
}

template <class T>
[[gnu::always_inline]] inline void store_row(const T* from, void* memory, Dtype dtype, int64_t size) {
  store_rows(from, 0, static_cast<char*>(memory), 0, 1, dtype, size);
}

template <class T>
inline void load_row(T* to, const View& view, int64_t row, int64_t token, int64_t head, int64_t size) {
  load_row(to, element(view, row, token, head), view.dtype, size);
}

template <class T>
inline void store_row(const T* from, const View& view, int64_t row, int64_t token, int64_t head, int64_t size) {
  store_row(from, element(view, row, token, head), view.dtype, size);
}

inline int64_t padded(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Memory for one kernel call, handed out in pieces. The thread keeps it for the next call, because fresh pages of this
// size cost as much as a short sequence; what is larger than kKept, or asked for while the kept memory is in use, is
// given back.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : bytes_(padded(count * int64_t(sizeof(T)), 64)), own_(kept().in_use) {
    if (own_) {
      memory_ = allocated(bytes_);
    } else {
      kept().provide(bytes_);
      memory_ = kept().memory;
    }
    kept().in_use = true;
    next_ = static_cast<char*>(memory_);
  }
  ~Scratch() {
    if (own_) {
      release(memory_);
    } else {
      kept().in_use = false;
      if (bytes_ > kKept) kept().drop();
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Room for `count` elements, a multiple of a cache line's worth, with anything in it.
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += count * int64_t(sizeof(T));
    return piece;
  }
  T* take_zeros(int64_t count) {
    T* piece = take(count);
    std::memset(piece, 0, size_t(count) * sizeof(T));
    return piece;
  }

 private:
  static constexpr int64_t kKept = 8 << 20;
  static void* allocated(int64_t bytes) { return ::operator new(size_t(bytes), std::align_val_t(64)); }
  static void release(void* memory) { ::operator delete(memory, std::align_val_t(64)); }

  struct Kept {
    void* memory = nullptr;
    int64_t bytes = 0;
    bool in_use = false;
    ~Kept() { drop(); }
    void drop() {
      if (memory) release(memory);
      memory = nullptr, bytes = 0;
    }
    void provide(int64_t wanted) {
      if (wanted <= bytes) return;
      drop();
      memory = allocated(wanted);
      bytes = wanted;
    }
  };
  static Kept& kept() {
    static thread_local Kept kept;
    return kept;
  }

  const int64_t bytes_;
  const bool own_;
  void* memory_;
  char* next_;
};
