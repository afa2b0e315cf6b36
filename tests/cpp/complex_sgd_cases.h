#pragma once

#include <vector>

#include "math/complex_sgd.h"
#include "math/half.h"
#include "test_list.h"

template <class M>
std::vector<nestopt::ComplexSgdScalars<M>> complex_sgd_cases() {
  return {
      {.lr = M(0.1),
       .momentum = M(0.8),
       .momentum_imag = M(0.4),
       .gain = M(1),
       .weight_decay = M(0),
       .grad_factor = M(1),
       .nesterov = false},
      {.lr = M(0.1),
       .momentum = M(-0.3),
       .momentum_imag = M(0.5),
       .gain = M(0.75),
       .weight_decay = M(0.01),
       .grad_factor = M(-0.125),
       .nesterov = true},
  };
}

// The step as a plain loop over a list.
template <nestopt::Momentum kMomentum, class P, class... Ts>
void plain_complex_sgd(TestList<P, P, Ts...>& list, const nestopt::ComplexSgdScalars<nestopt::math_t<P>>& scalars) {
  using M = nestopt::math_t<P>;
  list.for_each([&](size_t, P& param, P& grad, Ts&... buffers) {
    M weight = nestopt::load(param);
    M none[2] = {};
    M* const all[] = {&buffers..., &none[0], &none[1]};
    nestopt::complex_sgd<kMomentum>(scalars, nestopt::load(grad), weight, *all[0], *all[1]);
    param = nestopt::store<P>(weight);
  });
}
