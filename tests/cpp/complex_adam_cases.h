#pragma once

#include <cmath>
#include <vector>

#include "math/complex_adam.h"
#include "math/half.h"
#include "test_list.h"

inline std::vector<nestopt::ComplexAdamOptions> complex_adam_cases(bool complex) {
  std::vector<nestopt::ComplexAdamOptions> cases = {
      {.lr = 0.1, .beta1 = 0.8, .beta1_imag = 0.4, .beta2 = 0.999, .eps = 1e-8},
      {.lr = 0.05,
       .beta1 = -0.3,
       .beta1_imag = 0.5,
       .beta2 = 0.9,
       .eps = 1e-3,
       .weight_decay = 0.01,
       .grad_scale = 8,
       .maximize = true},
      {.lr = 0.1,
       .beta1 = 0.9,
       .beta2 = 0.99,
       .eps = 1e-8,
       .weight_decay = 0.1,
       .decoupled_weight_decay = true,
       .bias_correction = true},
  };
  for (nestopt::ComplexAdamOptions& options : cases) {
    if (!complex) options.beta1_imag = 0;
  }
  return cases;
}

// What every list is for: param, grad, average, imaginary average, squares, maximum of the squares.
template <bool kComplex, bool kAmsgrad, class P, class... Ms>
class ComplexAdamLists : public TestList<P, P, Ms...> {
 public:
  using M = nestopt::math_t<P>;
  static constexpr size_t kSquares = 1 + kComplex;  // among the averages

  explicit ComplexAdamLists(const std::vector<Shape>& shapes) : TestList<P, P, Ms...>(shapes) {
    this->for_each([](size_t, P&, P&, Ms&... averages) {
      M* const all[] = {&averages...};
      for (size_t k = kSquares; k < sizeof...(Ms); ++k) *all[k] = std::abs(*all[k]);
    });
  }

  // The step as a plain loop; scalars_of(entry) are those of a tensor.
  template <class ScalarsOf>
  void step(ScalarsOf scalars_of) {
    this->for_each([&](size_t i, P& param, P& grad, Ms&... averages) {
      M* const all[] = {&averages...};
      M weight = nestopt::load(param);
      M none = 0;
      nestopt::complex_adam<kComplex, kAmsgrad>(scalars_of(i), nestopt::load(grad), weight, *all[0],
                                                *(kComplex ? all[1] : &none), *all[kSquares],
                                                *(kAmsgrad ? all[sizeof...(Ms) - 1] : &none));
      param = nestopt::store<P>(weight);
    });
  }
};

// Steps that neighbours in a list share or not.
inline double step_before(size_t entry) { return static_cast<double>(entry / 2 % 4 * 5); }
