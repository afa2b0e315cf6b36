// Adam with complex momentum, one element. The definition is complex_adam_step_ in nestopt_ext/_reference.py.
#pragma once

#include <cmath>

#include "math/platform.h"

namespace nestopt {

// What the caller gives.
struct ComplexAdamOptions {
  double lr = 0;
  double beta1 = 0;
  double beta1_imag = 0;
  double beta2 = 0;
  double eps = 0;
  double weight_decay = 0;
  double grad_scale = 1;
  bool decoupled_weight_decay = false;
  bool bias_correction = false;
  bool maximize = false;
};

// What one step of one tensor needs of it.
template <class T>
struct ComplexAdamScalars {
  T rate;  // lr over the bias of exp_avg
  T beta1;
  T beta1_imag;
  T gain;  // of the gradient in exp_avg
  T beta2;
  T gain_sq;     // 1 - beta2
  T root_scale;  // from the root of exp_avg_sq to that of its unbiased value
  T eps;
  T weight_decay;  // as part of the gradient
  T shrinkage;     // lr * weight_decay, where it is decoupled
  T grad_factor;   // -1 to maximize, over the gradient scale
};

// In double, since 1 - beta2^t has few digits left while t is small. t counts this step.
template <class T>
NESTOPT_HD ComplexAdamScalars<T> complex_adam_scalars(const ComplexAdamOptions& o, double t) {
  const T reciprocal = static_cast<T>(1 / o.grad_scale);
  return {
      static_cast<T>(o.bias_correction ? o.lr / (1 - std::pow(o.beta1, t)) : o.lr),
      static_cast<T>(o.beta1),
      static_cast<T>(o.beta1_imag),
      static_cast<T>(o.bias_correction ? 1 - o.beta1 : 1),
      static_cast<T>(o.beta2),
      static_cast<T>(1 - o.beta2),
      static_cast<T>(1 / std::sqrt(1 - std::pow(o.beta2, t))),
      static_cast<T>(o.eps),
      static_cast<T>(o.decoupled_weight_decay ? 0 : o.weight_decay),
      static_cast<T>(o.decoupled_weight_decay ? o.lr * o.weight_decay : 0),
      o.maximize ? -reciprocal : reciprocal,
  };
}

// kComplex: there is an imaginary part; kAmsgrad: there is a maximum of avg_sq. What there is not is left alone.
template <bool kComplex, bool kAmsgrad, class T>
NESTOPT_HD void complex_adam(const ComplexAdamScalars<T>& s, T grad, T& param, T& avg, T& avg_imag, T& avg_sq,
                             T& max_avg_sq) {
  T g = s.grad_factor * grad;
  g = s.weight_decay != T(0) ? g + s.weight_decay * param : g;
  if constexpr (kComplex) {
    const T previous = avg;
    avg = s.beta1 * previous - s.beta1_imag * avg_imag + s.gain * g;
    avg_imag = s.beta1 * avg_imag + s.beta1_imag * previous;
  } else {
    avg = s.beta1 * avg + s.gain * g;
  }
  avg_sq = s.beta2 * avg_sq + s.gain_sq * g * g;
  T sq = avg_sq;
  if constexpr (kAmsgrad) {
    max_avg_sq = sq > max_avg_sq || sq != sq ? sq : max_avg_sq;  // a NaN of either stays
    sq = max_avg_sq;
  }
  param = s.shrinkage != T(0) ? param - s.shrinkage * param : param;
  param = param - s.rate * (avg / (std::sqrt(sq) * s.root_scale + s.eps));
}

// The operands of a list: param, grad, exp_avg, exp_avg_imag (if complex), exp_avg_sq, max_exp_avg_sq (with amsgrad),
// and last, of elements of no size, what there is once for each tensor: its ComplexAdamScalars on the CPU, its step on
// CUDA.
constexpr int complex_adam_operands(bool complex, bool amsgrad) { return 5 + (complex ? 1 : 0) + (amsgrad ? 1 : 0); }

}  // namespace nestopt
