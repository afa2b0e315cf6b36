#include "cuda/rank_one_update.h"

#include "check.h"
#include "cuda/rank_one_update.cuh"
#include "rank_one_update_cases.h"
#include "test_list.h"

namespace {

using namespace nestopt;
using cuda::kDeviceChunk;

template <class V, class G>
void check_kernel() {
  for (const auto& scalars : rank_one_cases<math_t<V>>()) {
    TestList<V, G> want(all_shapes(kDeviceChunk, 1));
    plain_rank_one_update(want, scalars);
    const float a = static_cast<float>(scalars.a);
    const double a_double = scalars.a;
    const cuda::Scalar on_device = sizeof(V) == 8 ? cuda::Scalar{&a_double, true} : cuda::Scalar{&a};
    for (fibre::seed = 0; fibre::seed < 2; ++fibre::seed) {
      TestList<V, G> got(all_shapes(kDeviceChunk, 1));
      CHECK((cuda::rank_one_update<V, G>(got.list, on_device, {.value = scalars.b}, nullptr)) == cudaSuccess);
      got.expect_same(want, "seed", fibre::seed);
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

}  // namespace
