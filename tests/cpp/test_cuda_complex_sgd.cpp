#include "cuda/complex_sgd.h"

#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "complex_sgd_cases.h"
#include "cuda/multi_tensor.cuh"
#include "test_list.h"

namespace {

using namespace nestopt;
using cuda::ComplexSgdArguments;
using cuda::kDeviceChunk;
using cuda::Scalar;

// Arguments and the scalars of the formula that they stand for.
template <class M>
struct Case {
  ComplexSgdArguments arguments;
  ComplexSgdScalars<M> scalars;
};

template <class M>
ComplexSgdScalars<M> scalars_of(const ComplexSgdArguments& a) {
  const double sign = a.maximize ? -1 : 1;
  return {static_cast<M>(a.lr.get()),
          static_cast<M>(a.momentum),
          static_cast<M>(a.momentum_imag),
          static_cast<M>(1 - a.dampening),
          static_cast<M>(a.weight_decay),
          static_cast<M>(sign * (1 / a.grad_scale.get())),
          a.nesterov};
}

// All on the device; static, as the kernel reads them later.
const float kLr = 0.03f;
const double kLrDouble = 0.05;
const float kScale = 1024;
const double kScaleDouble = 3;
const float kZero = 0;
const float kOne = 1;
const float kNan = NAN;

std::vector<ComplexSgdArguments> cases() {
  return {
      {.lr = {.value = 0.1}, .momentum = 0.8, .momentum_imag = 0.4},
      {.lr = {&kLr},
       .momentum = 0.8,
       .momentum_imag = -0.4,
       .dampening = 0.1,
       .weight_decay = 0.01,
       .nesterov = true,
       .maximize = true,
       .grad_scale = {&kScale},
       .found_inf = {&kZero}},
      {.lr = {&kLrDouble, true}, .momentum = 0.9, .dampening = 0.2, .grad_scale = {&kScaleDouble, true}},
  };
}

template <Momentum kMomentum, class P, class... Buffers>
void check_kernel() {
  for (const ComplexSgdArguments& arguments : cases()) {
    TestList<P, P, Buffers...> want(all_shapes(kDeviceChunk, 1));
    plain_complex_sgd<kMomentum>(want, scalars_of<math_t<P>>(arguments));
    for (fibre::seed = 0; fibre::seed < 3; ++fibre::seed) {
      TestList<P, P, Buffers...> got(all_shapes(kDeviceChunk, 1));
      CHECK(cuda::complex_sgd<P>(got.list, arguments, nullptr) == cudaSuccess);
      got.expect_same(want, "seed", fibre::seed);
    }
  }
  fibre::seed = 0;
}

template <class P>
void check_kernels() {
  using M = math_t<P>;
  check_kernel<Momentum::kNone, P>();
  check_kernel<Momentum::kReal, P, M>();
  check_kernel<Momentum::kComplex, P, M, M>();
}

TEST(kernel_float32) { check_kernels<float>(); }
TEST(kernel_float64) { check_kernels<double>(); }
TEST(kernel_bfloat16) { check_kernels<BFloat16>(); }
TEST(kernel_float16) { check_kernels<Float16>(); }

TEST(found_inf_leaves_every_byte) {
  for (const float* found_inf : {&kOne, &kNan}) {
    TestList<float, float, float, float> want(all_shapes(kDeviceChunk, 1)), got(all_shapes(kDeviceChunk, 1));
    const ComplexSgdArguments arguments{.lr = {.value = 0.1}, .momentum = 0.9, .found_inf = {found_inf}};
    CHECK(cuda::complex_sgd<float>(got.list, arguments, nullptr) == cudaSuccess);
    got.expect_same(want);
  }
}

// What GradScaler does in float32 is a division in float64 rounded once.
TEST(the_reciprocal_of_the_scale_is_rounded_once) {
  for (double scale : {3.0, 65536.0, 1.0 / 7, 1e-3}) {
    const std::vector<Shape> shapes = {{{1000}}};
    TestList<float, float> want(shapes), got(shapes);
    const ComplexSgdArguments arguments{.lr = {.value = 0.1}, .grad_scale = {&scale, true}};
    ComplexSgdScalars<float> scalars = scalars_of<float>({.lr = {.value = 0.1}});
    scalars.grad_factor = static_cast<float>(1.0 / scale);
    plain_complex_sgd<Momentum::kNone>(want, scalars);
    CHECK(cuda::complex_sgd<float>(got.list, arguments, nullptr) == cudaSuccess);
    got.expect_same(want, "scale", scale);
  }
}

TEST(a_whole_model_is_one_launch) {
  std::vector<Shape> shapes;
  for (int i = 0; i < 300; ++i) shapes.push_back({{10 + i % 7}});
  TestList<float, float, float, float> model(shapes);
  const int64_t before = fibre::launches;
  CHECK(cuda::complex_sgd<float>(model.list, {.lr = {.value = 0.1}, .momentum = 0.9}, nullptr) == cudaSuccess);
  CHECK(fibre::launches == before + (CUDART_VERSION >= 12010 ? 1 : 4), fibre::launches - before);
}

}  // namespace
