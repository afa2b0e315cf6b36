#include "cpu/complex_adam.h"

#include <algorithm>
#include <cmath>
#include <complex>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "complex_adam_cases.h"
#include "test_list.h"
#include "threads.h"

namespace {

using nestopt::BFloat16;
using nestopt::complex_adam_scalars;
using nestopt::ComplexAdamOptions;
using nestopt::ComplexAdamScalars;
using nestopt::Float16;
using nestopt::kChunk;
using nestopt::math_t;

// Ten steps of the formula beside the recurrence on complex numbers of higher precision.
template <bool kComplex, bool kAmsgrad, class M>
void check_formula(M tolerance) {
  using Real = long double;
  std::mt19937 random(5);
  std::normal_distribution<double> normal;
  for (const ComplexAdamOptions& o : complex_adam_cases(kComplex)) {
    if (o.bias_correction && o.beta1_imag != 0) continue;
    const std::complex<Real> beta(o.beta1, o.beta1_imag);
    M param = static_cast<M>(normal(random)), avg = static_cast<M>(normal(random)), sq = M(0.5), max = M(0.4);
    M imag = kComplex ? static_cast<M>(normal(random)) : M(0);
    Real weight = param, v = sq, largest = max;
    std::complex<Real> m(avg, imag);
    for (int t = 1; t <= 10; ++t) {
      const M grad = static_cast<M>(normal(random));
      nestopt::complex_adam<kComplex, kAmsgrad>(complex_adam_scalars<M>(o, t), grad, param, avg, imag, sq, max);
      Real g = (o.maximize ? -1 : 1) * Real{grad} / Real{o.grad_scale};
      if (o.decoupled_weight_decay) {
        weight -= Real{o.lr} * o.weight_decay * weight;
      } else {
        g += o.weight_decay * weight;
      }
      m = beta * m + (o.bias_correction ? 1 - Real{o.beta1} : 1) * g;
      v = o.beta2 * v + (1 - Real{o.beta2}) * g * g;
      largest = std::max(largest, v);
      const Real unbiased = (kAmsgrad ? largest : v) / (1 - std::pow(Real{o.beta2}, t));
      const Real rate = o.bias_correction ? o.lr / (1 - std::pow(Real{o.beta1}, t)) : o.lr;
      weight -= rate * m.real() / (std::sqrt(unbiased) + o.eps);
      CHECK(std::abs(param - weight) <= tolerance, "param at step", t, param, weight);
      CHECK(std::abs(avg - m.real()) <= tolerance, "average at step", t, avg, m.real());
      CHECK(std::abs(imag - m.imag()) <= tolerance, "imaginary average at step", t, imag, m.imag());
      CHECK(std::abs(sq - v) <= tolerance, "square at step", t, sq, v);
      if (kAmsgrad) CHECK(std::abs(max - largest) <= tolerance, "maximum at step", t, max, largest);
    }
  }
}

template <class M>
void check_formulas(M tolerance) {
  check_formula<false, false, M>(tolerance);
  check_formula<false, true, M>(tolerance);
  check_formula<true, false, M>(tolerance);
  check_formula<true, true, M>(tolerance);
}

TEST(formula_follows_the_complex_recurrence) {
  check_formulas<double>(1e-13);
  check_formulas<float>(1e-5f);
}

TEST(no_weight_decay_leaves_an_infinite_param_out_of_the_gradient) {
  float param = INFINITY, avg = 1, imag = 0, sq = 1, max = 1;
  const auto scalars = complex_adam_scalars<float>(complex_adam_cases(true)[0], 1);
  nestopt::complex_adam<true, true>(scalars, 1.0f, param, avg, imag, sq, max);
  CHECK(std::isfinite(avg) && std::isfinite(sq) && std::isfinite(max), avg, sq, max);
}

TEST(the_maximum_keeps_a_nan_of_either_side) {
  const auto scalars = complex_adam_scalars<float>(complex_adam_cases(false)[0], 1);
  for (bool of_maximum : {false, true}) {
    float param = 1, avg = 1, none = 0;
    float sq = of_maximum ? 1 : NAN;
    float max = of_maximum ? NAN : 1;
    nestopt::complex_adam<false, true>(scalars, 1.0f, param, avg, none, sq, max);
    CHECK(std::isnan(max) && std::isnan(param) && std::isnan(sq) == !of_maximum, max, param, sq);
  }
}

// The first step has the length lr whatever the gradient, as long as its square is a number.
TEST(corrections_are_exact_at_the_first_step_and_vanish_later) {
  const ComplexAdamOptions o{.lr = 0.25, .beta1 = 0.9, .beta2 = 0.999, .eps = 0, .bias_correction = true};
  for (float grad : {1e-15f, 3.0f, -1e15f}) {
    float param = 0, avg = 0, none = 0, sq = 0;
    nestopt::complex_adam<false, false>(complex_adam_scalars<float>(o, 1), grad, param, avg, none, sq, none);
    CHECK(std::abs(param + std::copysign(0.25f, grad)) <= 2e-7f, grad, param);
  }
  const auto late = complex_adam_scalars<double>(o, 1e6);
  CHECK(late.rate == 0.25 && late.root_scale == 1, late.rate, late.root_scale);
}

// The kernel beside a plain loop: all bytes are the same, in one thread as in several.
template <bool kComplex, bool kAmsgrad, class P, class... Ms>
void check_kernel() {
  using M = math_t<P>;
  using Lists = ComplexAdamLists<kComplex, kAmsgrad, P, Ms...>;
  const std::vector<Shape> shapes = all_shapes(kChunk, 1);
  int num_threads = 1;
  for (const ComplexAdamOptions& options : complex_adam_cases(kComplex)) {
    std::vector<ComplexAdamScalars<M>> scalars;
    for (size_t i = 0; i < shapes.size(); ++i) scalars.push_back(complex_adam_scalars<M>(options, step_before(i) + 1));
    Lists want(shapes), got(shapes);
    want.step([&](size_t i) { return scalars[i]; });
    const auto list = got.with_rider([&](size_t i) { return &scalars[i]; });
    in_threads(list.chunks(), num_threads, [&](int64_t first, int64_t last) {
      nestopt::cpu::complex_adam_chunks<kComplex, kAmsgrad, P>(list, first, last);
    });
    got.expect_same(want, "in", num_threads, "threads");
    num_threads *= 4;
  }
}

template <class P>
void check_kernels() {
  using M = math_t<P>;
  check_kernel<false, false, P, M, M>();
  check_kernel<false, true, P, M, M, M>();
  check_kernel<true, false, P, M, M, M>();
  check_kernel<true, true, P, M, M, M, M>();
}

TEST(cpu_kernel_float32) { check_kernels<float>(); }
TEST(cpu_kernel_float64) { check_kernels<double>(); }
TEST(cpu_kernel_bfloat16) { check_kernels<BFloat16>(); }
TEST(cpu_kernel_float16) { check_kernels<Float16>(); }

}  // namespace
