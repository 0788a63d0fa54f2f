// The channel mix's element by element functions (layer_params.h, PointwiseParams), forward and backward:
//   squared ReLU  out = max(a, 0)^2,          da = 2 max(a, 0) dout
//   gate          out = s b, s = sigmoid(a),  da = dout b s (1 - s),  db = dout s
// Included after head_norm.h, inside namespace rwkv::RWKV_ISA.

// Calls body(element, place) for elements begin to end - 1; place counts from the tensors' first element.
template <class Body>
inline void for_elements(const PointwiseParams& p, int64_t begin, int64_t end, const Body& body) {
  for_element(p.dtype, [&](auto element) {
    using T = Real<decltype(element)>;
    for_lanes<T>(end - begin, [&](auto place) {
      place.at += begin;
      body(element, place);
    });
  });
}

template <class T>
inline Lanes<T> relu_of(Lanes<T> x) {
  return x < T(0) ? Lanes<T>{} : x;  // keeps NaN
}

void squared_relu(const PointwiseParams& p, int64_t begin, int64_t end) {
  for_elements(p, begin, end, [&](auto element, auto place) {
    using E = decltype(element);
    const auto x = relu_of<Real<E>>(get(static_cast<const E*>(p.a), place));
    put(static_cast<E*>(p.out), place, x * x);
  });
}

void squared_relu_backward(const PointwiseParams& p, int64_t begin, int64_t end) {
  for_elements(p, begin, end, [&](auto element, auto place) {
    using E = decltype(element);
    const auto x = relu_of<Real<E>>(get(static_cast<const E*>(p.a), place));
    put(static_cast<E*>(p.da), place, (x + x) * get(static_cast<const E*>(p.dout), place));
  });
}

void sigmoid_gate(const PointwiseParams& p, int64_t begin, int64_t end) {
  for_element(p.dtype, [&](auto element) {
    using E = decltype(element);
    const E *gate = static_cast<const E*>(p.a) + begin, *b = static_cast<const E*>(p.b) + begin;
    E* out = static_cast<E*>(p.out) + begin;
    for_lanes_together<Real<E>>(end - begin, [=](const auto& places) {
      const Sigmoids gates(gate, places);
      for (size_t m = 0; m < std::size(places); ++m) put(out, places[m], gates.s[m] * get(b, places[m]));
    });
  });
}

void sigmoid_gate_backward(const PointwiseParams& p, int64_t begin, int64_t end) {
  for_element(p.dtype, [&](auto element) {
    using E = decltype(element);
    using T = Real<E>;
    const E *gate = static_cast<const E*>(p.a) + begin, *b = static_cast<const E*>(p.b) + begin;
    const E* upper = static_cast<const E*>(p.dout) + begin;
    E *dgate = static_cast<E*>(p.da) + begin, *db = static_cast<E*>(p.db) + begin;
    for_lanes_together<T>(end - begin, [=](const auto& places) {
      const Sigmoids gates(gate, places);
      for (size_t m = 0; m < std::size(places); ++m) {
        const Lanes<T> s = gates.s[m], dout = get(upper, places[m]);
        put(dgate, places[m], dout * get(b, places[m]) * (s * (T(1) - s)));
        put(db, places[m], dout * s);
      }
    });
  });
}

// out, in arithmetic precision, becomes a, or out + a where b is out itself.
void accumulate(const PointwiseParams& p, int64_t begin, int64_t end) {
  for_elements(p, begin, end, [&](auto element, auto place) {
    using E = decltype(element);
    auto* total = static_cast<Real<E>*>(p.out);
    const auto part = get(static_cast<const E*>(p.a), place);
    put(total, place, p.b ? get(static_cast<const Real<E>*>(total), place) + part : part);
  });
}
