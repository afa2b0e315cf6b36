#pragma once

#include <vector>

#include "math/half.h"
#include "math/neumann.h"
#include "test_list.h"

template <class M>
std::vector<nestopt::NeumannScalars<M>> neumann_cases() {
  return {{.alpha = M(0.25), .damping = M(0)}, {.alpha = M(0.1), .damping = M(0.5)}};
}

// The term as a plain loop over a list; returns the squared norm of the new v.
template <class V, class A>
double plain_neumann(TestList<V, V, A>& list, const nestopt::NeumannScalars<nestopt::math_t<V>>& scalars) {
  long double sq_norm = 0;
  list.for_each([&](size_t, V& v, V& p, A& av) {
    nestopt::neumann<V>(scalars, static_cast<nestopt::math_t<V>>(nestopt::load(av)), v, p);
    const long double x = nestopt::load(v);
    sq_norm += x * x;
  });
  return static_cast<double>(sq_norm);
}

// The same where v has been stepped already.
template <class V>
double plain_neumann_sum(TestList<V, V>& list) {
  long double sq_norm = 0;
  list.for_each([&](size_t, V& v, V& p) {
    const long double x = nestopt::load(v);
    p = nestopt::store<V>(nestopt::load(p) + nestopt::load(v));
    sq_norm += x * x;
  });
  return static_cast<double>(sq_norm);
}
