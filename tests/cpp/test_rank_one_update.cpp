#include "cpu/rank_one_update.h"

#include <cmath>

#include "check.h"
#include "rank_one_update_cases.h"
#include "test_list.h"
#include "threads.h"

namespace {

using nestopt::BFloat16;
using nestopt::Float16;
using nestopt::kChunk;
using nestopt::math_t;

TEST(known_numbers) {
  double v = 8;
  nestopt::rank_one_update<double>({.a = 0.5, .b = -0.25}, 4.0, v);
  CHECK(v == 3, v);
  float infinite = INFINITY;
  nestopt::rank_one_update<float>({.a = 0, .b = 1}, 1.0f, infinite);
  CHECK(std::isnan(infinite), infinite);
}

// The kernel in several threads beside a plain loop: all bytes are the same.
template <class V, class G>
void check_kernel() {
  for (const auto& scalars : rank_one_cases<math_t<V>>()) {
    TestList<V, G> want(all_shapes(kChunk, 1));
    plain_rank_one_update(want, scalars);
    for (int num_threads : {1, 3, 16}) {
      TestList<V, G> got(all_shapes(kChunk, 1));
      in_threads(got.list.chunks(), num_threads, [&](int64_t first, int64_t last) {
        nestopt::cpu::rank_one_update_chunks<V, G>(got.list, first, last, scalars);
      });
      got.expect_same(want, "in", num_threads, "threads");
    }
  }
}

TEST(cpu_kernel_float32) { check_kernel<float, float>(); }
TEST(cpu_kernel_float32_with_bfloat16) { check_kernel<float, BFloat16>(); }
TEST(cpu_kernel_float32_with_float16) { check_kernel<float, Float16>(); }
TEST(cpu_kernel_float64) { check_kernel<double, double>(); }
TEST(cpu_kernel_bfloat16) { check_kernel<BFloat16, BFloat16>(); }
TEST(cpu_kernel_float16) { check_kernel<Float16, Float16>(); }

}  // namespace
