// SGD with complex momentum, one element. The definition is complex_sgd_step_ in nestopt_ext/_reference.py.
#pragma once

#include "math/platform.h"

namespace nestopt {

template <class T>
struct ComplexSgdScalars {
  T lr;
  T momentum;
  T momentum_imag;
  T gain;  // 1 - dampening
  T weight_decay;
  T grad_factor;  // -1 to maximize, over the gradient scale
  bool nesterov;
};

// Which momentum buffers there are.
enum class Momentum { kNone, kReal, kComplex };

template <Momentum kMomentum, class T>
NESTOPT_HD void complex_sgd(const ComplexSgdScalars<T>& s, T grad, T& param, T& buf, T& buf_imag) {
  T g = s.grad_factor * grad;
  g = s.weight_decay != T(0) ? g + s.weight_decay * param : g;
  T step = g;
  if constexpr (kMomentum == Momentum::kReal) {
    buf = s.momentum * buf + s.gain * g;
    step = s.nesterov ? g + s.momentum * buf : buf;
  }
  if constexpr (kMomentum == Momentum::kComplex) {
    const T previous = buf;
    buf = s.momentum * previous - s.momentum_imag * buf_imag + s.gain * g;
    buf_imag = s.momentum * buf_imag + s.momentum_imag * previous;
    step = s.nesterov ? g + s.momentum * buf - s.momentum_imag * buf_imag : buf;
  }
  param = param - s.lr * step;
}

}  // namespace nestopt
