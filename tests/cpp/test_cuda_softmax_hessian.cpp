#include "cuda/softmax_hessian.h"

#include <cmath>
#include <vector>

#include "check.h"
#include "cuda/softmax_hessian.cuh"
#include "softmax_hessian_cases.h"

namespace {

using namespace nestopt;

// Around the sizes where a group gets more threads, and where a thread takes several classes at once.
template <class V, class A>
void check_kernel() {
  for (int64_t classes : {1, 7, 31, 32, 33, 127, 128, 130, 1000, 1024, 1025, 2049, 16384, 16385}) {
    std::vector<V> first;
    for (fibre::seed = 0; fibre::seed < 3; ++fibre::seed) {
      SoftmaxHessianCase<V, A> problem(classes);
      const int64_t before = fibre::launches;
      CHECK((cuda::softmax_hessian<V, A>(problem.rows(), nullptr)) == cudaSuccess);
      CHECK(fibre::launches - before == 1);
      problem.expect_right();
      if (first.empty()) first = problem.u();
      CHECK(std::memcmp(first.data(), problem.u().data(), first.size() * sizeof(V)) == 0, "seed", fibre::seed);
    }
  }
  fibre::seed = 0;
}

TEST(kernel_float32) { check_kernel<float, float>(); }
TEST(kernel_float32_with_bfloat16) { check_kernel<float, BFloat16>(); }
TEST(kernel_float32_with_float16) { check_kernel<float, Float16>(); }
TEST(kernel_float64) { check_kernel<double, double>(); }
TEST(kernel_bfloat16) { check_kernel<BFloat16, BFloat16>(); }
TEST(kernel_float16) { check_kernel<Float16, Float16>(); }

// More groups than rows, and fewer, so that a group takes several.
TEST(any_number_of_blocks) {
  for (uint32_t blocks : {1u, 2u, 5u, 40u}) {
    SoftmaxHessianCase<float, float> few(33), many(300);
    CHECK(cuda::launch(cuda::softmax_hessian_kernel<float, float, 32, 64>, blocks, 64, nullptr, few.rows()) ==
          cudaSuccess);
    few.expect_right();
    CHECK(cuda::launch(cuda::softmax_hessian_kernel<float, float, 64, 64>, blocks, 64, nullptr, many.rows()) ==
          cudaSuccess);
    many.expect_right();
  }
}

TEST(nothing_is_launched_for_nothing) {
  const int64_t before = fibre::launches;
  SoftmaxHessianRows rows{};
  rows.classes = 5;
  CHECK((cuda::softmax_hessian<float, float>(rows, nullptr)) == cudaSuccess);
  rows.rows = 5;
  rows.classes = 0;
  CHECK((cuda::softmax_hessian<float, float>(rows, nullptr)) == cudaSuccess);
  CHECK(fibre::launches == before);
}

}  // namespace
