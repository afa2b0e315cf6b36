// One term of a Neumann series, one element. The definition is neumann_step_ in nestopt_ext/_reference.py.
#pragma once

#include "math/half.h"
#include "math/platform.h"

namespace nestopt {

template <class T>
struct NeumannScalars {
  T alpha;
  T damping;
};

// Adds a term to the sum, and returns it.
template <class V>
NESTOPT_HD math_t<V> neumann_sum(const V& v, V& p) {
  const math_t<V> now = load(v);
  p = store<V>(load(p) + now);
  return now;
}

// Returns the new v as it is stored, which is what p and the norm see.
template <class V>
NESTOPT_HD math_t<V> neumann(const NeumannScalars<math_t<V>>& s, math_t<V> av, V& v, V& p) {
  using T = math_t<V>;
  const T old = load(v);
  const T product = s.damping != T(0) ? av + s.damping * old : av;
  v = store<V>(old - s.alpha * product);
  return neumann_sum(v, p);
}

}  // namespace nestopt
