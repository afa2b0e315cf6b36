#include "cuda/row_dot.h"

#include <cstring>
#include <vector>

#include "check.h"
#include "cuda/row_dot.cuh"
#include "row_dot_cases.h"

namespace {

using namespace nestopt;

// Around the sizes where a group gets more threads, where a thread takes several columns at once, and pieces.
template <class X, class Out>
void check_kernel() {
  for (int64_t columns : {1, 31, 32, 33, 127, 128, 130, 1000, 1024, 1025, 2048, 65536, 65537, 140000}) {
    std::vector<Out> first;
    for (fibre::seed = 0; fibre::seed < 3; ++fibre::seed) {
      RowDotCase<X, Out> problem(columns);
      const RowDots dots = problem.dots();
      const int64_t before = fibre::launches;
      CHECK(cuda::row_dot<X>(dots, nullptr) == cudaSuccess);
      CHECK(fibre::launches - before == (dots.pieces() > 1 ? 2 : 1));
      problem.expect_right();
      if (first.empty()) first = problem.out();
      CHECK(std::memcmp(first.data(), problem.out().data(), first.size() * sizeof(Out)) == 0, "seed", fibre::seed);
    }
  }
  fibre::seed = 0;
}

TEST(kernel_float32) { check_kernel<float, float>(); }
TEST(kernel_float32_into_float64) { check_kernel<float, double>(); }
TEST(kernel_float64) { check_kernel<double, double>(); }
TEST(kernel_bfloat16) { check_kernel<BFloat16, float>(); }
TEST(kernel_float16) { check_kernel<Float16, float>(); }

// More groups than units, and fewer, so that a group takes several.
TEST(any_number_of_blocks) {
  for (uint32_t blocks : {1u, 2u, 5u, 40u}) {
    RowDotCase<float, float> few(33), many(300);
    CHECK(cuda::launch(cuda::row_dot_kernel<float, 32, 64>, blocks, 64, nullptr, few.dots()) == cudaSuccess);
    few.expect_right();
    CHECK(cuda::launch(cuda::row_dot_kernel<float, 64, 64>, blocks, 64, nullptr, many.dots()) == cudaSuccess);
    many.expect_right();
  }
}

TEST(nothing_is_launched_for_nothing) {
  const int64_t before = fibre::launches;
  RowDots dots{};
  dots.columns = 5;
  CHECK(cuda::row_dot<float>(dots, nullptr) == cudaSuccess);
  dots.rows = 5;
  dots.columns = 0;
  CHECK(cuda::row_dot<float>(dots, nullptr) == cudaSuccess);
  CHECK(fibre::launches == before);
}

}  // namespace
