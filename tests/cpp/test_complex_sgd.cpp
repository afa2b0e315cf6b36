#include "cpu/complex_sgd.h"

#include <cmath>
#include <complex>
#include <random>

#include "check.h"
#include "complex_sgd_cases.h"
#include "test_list.h"
#include "threads.h"

namespace {

using nestopt::BFloat16;
using nestopt::ComplexSgdScalars;
using nestopt::Float16;
using nestopt::kChunk;
using nestopt::math_t;
using nestopt::Momentum;

// Ten steps of the formula beside the recurrence on complex numbers of higher precision.
template <Momentum kMomentum, class M>
void check_formula(M tolerance) {
  using Real = long double;
  std::mt19937 random(5);
  std::normal_distribution<double> normal;
  for (ComplexSgdScalars<M> s : complex_sgd_cases<M>()) {
    if (kMomentum == Momentum::kReal) s.momentum_imag = 0;
    const std::complex<Real> beta = kMomentum == Momentum::kNone ? 0 : std::complex<Real>(s.momentum, s.momentum_imag);
    const bool nesterov = kMomentum != Momentum::kNone && s.nesterov;
    const Real gain = kMomentum == Momentum::kNone ? 1 : Real{s.gain};
    M param = static_cast<M>(normal(random));
    M buf = static_cast<M>(normal(random));
    M imag = kMomentum == Momentum::kComplex ? static_cast<M>(normal(random)) : M(0);
    Real weight = param;
    std::complex<Real> b(buf, imag);
    for (int step = 0; step < 10; ++step) {
      const M grad = static_cast<M>(normal(random));
      nestopt::complex_sgd<kMomentum>(s, grad, param, buf, imag);
      const Real g = Real{s.grad_factor} * grad + Real{s.weight_decay} * weight;
      b = beta * b + gain * g;
      weight -= s.lr * (nesterov ? g + (beta * b).real() : b.real());
      CHECK(std::abs(param - weight) <= tolerance, "param at step", step, param, weight);
      if (kMomentum == Momentum::kNone) continue;
      CHECK(std::abs(buf - b.real()) <= tolerance, "buffer at step", step, buf, b.real());
      CHECK(std::abs(imag - b.imag()) <= tolerance, "imaginary buffer at step", step, imag, b.imag());
    }
  }
}

template <class M>
void check_formulas(M tolerance) {
  check_formula<Momentum::kNone, M>(tolerance);
  check_formula<Momentum::kReal, M>(tolerance);
  check_formula<Momentum::kComplex, M>(tolerance);
}

TEST(formula_follows_the_complex_recurrence) {
  check_formulas<double>(1e-14);
  check_formulas<float>(5e-6f);
}

TEST(no_weight_decay_leaves_an_infinite_param_out_of_the_gradient) {
  ComplexSgdScalars<float> s = complex_sgd_cases<float>()[0];
  s.weight_decay = 0;
  float param = INFINITY, buf = 1, imag = 0;
  nestopt::complex_sgd<Momentum::kComplex>(s, 1.0f, param, buf, imag);
  CHECK(std::isfinite(buf), buf);
}

// The kernel in several threads beside a plain loop: all bytes are the same, whatever the number of threads.
template <Momentum kMomentum, class P, class... Buffers>
void check_kernel() {
  for (const auto& scalars : complex_sgd_cases<math_t<P>>()) {
    TestList<P, P, Buffers...> want(all_shapes(kChunk, 1));
    plain_complex_sgd<kMomentum>(want, scalars);
    for (int num_threads : {1, 3, 16}) {
      TestList<P, P, Buffers...> got(all_shapes(kChunk, 1));
      in_threads(got.list.chunks(), num_threads, [&](int64_t first, int64_t last) {
        nestopt::cpu::complex_sgd_chunks<P>(got.list, first, last, scalars);
      });
      got.expect_same(want, "in", num_threads, "threads");
    }
  }
}

template <class P>
void check_kernels() {
  using M = math_t<P>;
  check_kernel<Momentum::kNone, P>();
  check_kernel<Momentum::kReal, P, M>();
  check_kernel<Momentum::kComplex, P, M, M>();
}

TEST(cpu_kernel_float32) { check_kernels<float>(); }
TEST(cpu_kernel_float64) { check_kernels<double>(); }
TEST(cpu_kernel_bfloat16) { check_kernels<BFloat16>(); }
TEST(cpu_kernel_float16) { check_kernels<Float16>(); }

}  // namespace
