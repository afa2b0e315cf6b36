#include "cuda/complex_adam.h"

#include <cmath>
#include <vector>

#include "check.h"
#include "complex_adam_cases.h"
#include "cuda/complex_adam.cuh"
#include "test_list.h"

namespace {

using namespace nestopt;
using cuda::ComplexAdamArguments;
using cuda::kDeviceChunk;
using cuda::kMaxBlocks;
using cuda::Scalar;

const float kLr = 0.03f;
const double kScaleDouble = 3;
const float kZero = 0;
const float kOne = 1;
const float kNan = NAN;

struct Case {
  ComplexAdamArguments arguments;
  ComplexAdamOptions options;  // with the values that the arguments point to
};

std::vector<Case> cases(bool complex) {
  std::vector<Case> all;
  for (const ComplexAdamOptions& options : complex_adam_cases(complex)) {
    ComplexAdamArguments arguments{.options = options};
    arguments.lr.value = options.lr;
    arguments.grad_scale.value = options.grad_scale;
    all.push_back({arguments, options});
  }
  all[1].arguments.lr = {&kLr};
  all[1].options.lr = kLr;
  all[1].arguments.grad_scale = {&kScaleDouble, true};
  all[1].options.grad_scale = kScaleDouble;
  all[1].arguments.found_inf = {&kZero};
  return all;
}

// Step: the type of the steps.
template <class Step>
std::vector<Step> counted_steps(size_t count) {
  std::vector<Step> steps;
  for (size_t i = 0; i < count; ++i) steps.push_back(static_cast<Step>(step_before(i) + 1));
  return steps;
}

template <bool kComplex, bool kAmsgrad, class P, class Step, class... Ms>
void check_kernel() {
  using Lists = ComplexAdamLists<kComplex, kAmsgrad, P, Ms...>;
  const std::vector<Shape> shapes = all_shapes(kDeviceChunk, 1);
  std::vector<Step> steps = counted_steps<Step>(shapes.size());
  for (Case& c : cases(kComplex)) {
    c.arguments.step_is_double = sizeof(Step) == 8;
    Lists want(shapes);
    want.step([&](size_t i) { return complex_adam_scalars<math_t<P>>(c.options, step_before(i) + 1); });
    // In few blocks each meets several tensors, with steps of their own.
    for (uint32_t max_blocks : {3u, kMaxBlocks}) {
      for (fibre::seed = 0; fibre::seed < 2; ++fibre::seed) {
        Lists got(shapes);
        const auto list = got.with_rider([&](size_t i) { return &steps[i]; });
        const cudaError_t error =
            cuda::for_each_element<cuda::ComplexAdamOp<kComplex, kAmsgrad, P>>(list, c.arguments, nullptr, max_blocks);
        CHECK(error == cudaSuccess);
        got.expect_same(want, "seed", fibre::seed, "blocks", max_blocks);
      }
    }
  }
  fibre::seed = 0;
}

template <class P, class Step>
void check_kernels() {
  using M = math_t<P>;
  check_kernel<false, false, P, Step, M, M>();
  check_kernel<false, true, P, Step, M, M, M>();
  check_kernel<true, false, P, Step, M, M, M>();
  check_kernel<true, true, P, Step, M, M, M, M>();
}

TEST(kernel_float32) { check_kernels<float, float>(); }
TEST(kernel_float64) { check_kernels<double, double>(); }
TEST(kernel_bfloat16) { check_kernels<BFloat16, double>(); }
TEST(kernel_float16) { check_kernels<Float16, float>(); }

template <class T>
void check_count() {
  std::vector<T> steps(2000);
  for (size_t i = 0; i < steps.size(); ++i) steps[i] = static_cast<T>(i);
  TensorList<1> list;
  for (T& step : steps) list.flat.push_back({{&step}, 1});
  list.finish();
  CHECK(cuda::count_steps<T>(list, {&kOne}, nullptr) == cudaSuccess);
  CHECK(cuda::count_steps<T>(list, {&kNan}, nullptr) == cudaSuccess);
  for (size_t i = 0; i < steps.size(); ++i) CHECK(steps[i] == static_cast<T>(i), i, steps[i]);
  CHECK(cuda::count_steps<T>(list, {&kZero}, nullptr) == cudaSuccess);
  for (size_t i = 0; i < steps.size(); ++i) CHECK(steps[i] == static_cast<T>(i + 1), i, steps[i]);
}

TEST(steps_are_counted_unless_an_infinity_was_found) {
  check_count<float>();
  check_count<double>();
}

TEST(found_inf_leaves_every_byte) {
  using Lists = ComplexAdamLists<true, true, float, float, float, float, float>;
  for (const float* found_inf : {&kOne, &kNan}) {
    Lists want(all_shapes(kDeviceChunk, 1)), got(all_shapes(kDeviceChunk, 1));
    float step = 1;
    ComplexAdamArguments arguments = cases(true)[0].arguments;
    arguments.found_inf = {found_inf};
    const auto list = got.with_rider([&](size_t) { return &step; });
    CHECK((cuda::complex_adam<true, true, float>(list, arguments, nullptr)) == cudaSuccess);
    got.expect_same(want);
  }
}

// More tensors than a launch has room for: those of the second launch have steps of their own, too.
TEST(a_whole_model_is_a_launch_or_two) {
  using Lists = ComplexAdamLists<true, false, float, float, float, float>;
  for (size_t count : {300u, 900u}) {
    std::vector<Shape> shapes;
    for (size_t i = 0; i < count; ++i) shapes.push_back({{static_cast<int64_t>(10 + i % 7)}});
    std::vector<float> steps = counted_steps<float>(count);
    const Case c = cases(true)[1];
    Lists want(shapes), got(shapes);
    want.step([&](size_t i) { return complex_adam_scalars<float>(c.options, step_before(i) + 1); });
    const auto list = got.with_rider([&](size_t i) { return &steps[i]; });
    const int64_t before = fibre::launches;
    CHECK((cuda::complex_adam<true, false, float>(list, c.arguments, nullptr)) == cudaSuccess);
    CHECK(fibre::launches - before == (count == 300 ? 1 : 2), fibre::launches - before);
    got.expect_same(want, "of", count);
  }
}

}  // namespace
