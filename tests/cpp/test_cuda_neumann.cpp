#include "cuda/neumann.h"

#include <cmath>
#include <vector>

#include "check.h"
#include "cuda/neumann.cuh"
#include "neumann_cases.h"
#include "test_list.h"

namespace {

using namespace nestopt;
using cuda::kDeviceChunk;

template <class T>
T total(const std::vector<double>& partials) {
  T guarded[3] = {-1, -1, -1};
  CHECK(cuda::sum_partials(partials.data(), partials.size(), &guarded[1], sizeof(T) == 8, nullptr) == cudaSuccess);
  CHECK(guarded[0] == -1 && guarded[2] == -1);
  return guarded[1];
}

template <class V, class A>
void check_kernel() {
  for (const auto& scalars : neumann_cases<math_t<V>>()) {
    TestList<V, V, A> want(all_shapes(kDeviceChunk, 2));
    const double want_norm = plain_neumann(want, scalars);
    const float alpha = static_cast<float>(scalars.alpha);
    const double alpha_double = scalars.alpha;
    const cuda::Scalar device_alpha = sizeof(V) == 8 ? cuda::Scalar{&alpha_double, true} : cuda::Scalar{&alpha};
    std::vector<double> first;
    for (fibre::seed = 0; fibre::seed < 3; ++fibre::seed) {
      TestList<V, V, A> got(all_shapes(kDeviceChunk, 2));
      std::vector<double> partials(cuda::neumann_partials(got.list) + 1, NAN);
      CHECK((cuda::neumann<V, A>(got.list, device_alpha, scalars.damping, partials.data(), nullptr)) == cudaSuccess);
      got.expect_same(want, "seed", fibre::seed);
      CHECK(std::isnan(partials.back()), "written behind the end");
      partials.pop_back();
      CHECK(std::abs(total<double>(partials) - want_norm) <= 1e-12 * want_norm, total<double>(partials), want_norm);
      CHECK(total<float>(partials) == static_cast<float>(total<double>(partials)));
      if (fibre::seed == 0) first = partials;
      CHECK(partials == first, "seed", fibre::seed);
    }
    fibre::seed = 0;
    TestList<V, V, A> got(all_shapes(kDeviceChunk, 2));
    CHECK((cuda::neumann<V, A>(got.list, {.value = scalars.alpha}, scalars.damping, nullptr, nullptr)) == cudaSuccess);
    got.expect_same(want, "without a norm");
  }
}

TEST(kernel_float32) { check_kernel<float, float>(); }
TEST(kernel_float32_with_bfloat16) { check_kernel<float, BFloat16>(); }
TEST(kernel_float32_with_float16) { check_kernel<float, Float16>(); }
TEST(kernel_float64) { check_kernel<double, double>(); }
TEST(kernel_bfloat16) { check_kernel<BFloat16, BFloat16>(); }
TEST(kernel_float16) { check_kernel<Float16, Float16>(); }

template <class V>
void check_sum_kernel() {
  TestList<V, V> want(all_shapes(kDeviceChunk, 0));
  const double want_norm = plain_neumann_sum(want);
  std::vector<double> first;
  for (fibre::seed = 0; fibre::seed < 3; ++fibre::seed) {
    TestList<V, V> got(all_shapes(kDeviceChunk, 0));
    std::vector<double> partials(cuda::neumann_partials(got.list) + 1, NAN);
    CHECK(cuda::neumann_sum<V>(got.list, partials.data(), nullptr) == cudaSuccess);
    got.expect_same(want, "seed", fibre::seed);
    CHECK(std::isnan(partials.back()), "written behind the end");
    partials.pop_back();
    CHECK(std::abs(total<double>(partials) - want_norm) <= 1e-12 * want_norm, total<double>(partials), want_norm);
    if (fibre::seed == 0) first = partials;
    CHECK(partials == first, "seed", fibre::seed);
  }
  fibre::seed = 0;
  TestList<V, V> got(all_shapes(kDeviceChunk, 0));
  CHECK(cuda::neumann_sum<V>(got.list, nullptr, nullptr) == cudaSuccess);
  got.expect_same(want, "without a norm");
}

TEST(sum_kernel_float32) { check_sum_kernel<float>(); }
TEST(sum_kernel_float64) { check_sum_kernel<double>(); }
TEST(sum_kernel_bfloat16) { check_sum_kernel<BFloat16>(); }
TEST(sum_kernel_float16) { check_sum_kernel<Float16>(); }

TEST(the_norm_does_not_depend_on_the_grid) {
  std::vector<double> first;
  for (uint32_t max_blocks : {1u, 2u, 5u, 13u, 1000u}) {
    for (fibre::seed = 0; fibre::seed < 4; ++fibre::seed) {
      TestList<float, float, float> list(all_shapes(kDeviceChunk, 2));
      std::vector<double> partials(cuda::neumann_partials(list.list), NAN);
      using Op = cuda::NeumannOp<float, float, true>;
      const cuda::NeumannArguments arguments{{.value = 0.3}, 0.0, partials.data()};
      CHECK(cuda::for_each_element<Op>(list.list, arguments, nullptr, max_blocks) == cudaSuccess);
      if (first.empty()) first = partials;
      CHECK(partials == first, "blocks", max_blocks, "seed", fibre::seed);
    }
  }
  fibre::seed = 0;
}

TEST(the_norm_does_not_depend_on_addresses) {
  std::vector<double> first;
  for (int64_t shift = 0; shift < 8; ++shift) {
    TestList<BFloat16, BFloat16, BFloat16> list(std::vector<Shape>{{{2 * kDeviceChunk + 13}, {}, {shift}}});
    std::vector<double> partials(cuda::neumann_partials(list.list), NAN);
    CHECK((cuda::neumann<BFloat16, BFloat16>(list.list, {.value = 0.3}, 0.1, partials.data(), nullptr)) == cudaSuccess);
    if (shift == 0) first = partials;
    CHECK(partials == first, "shift", shift);
  }
}

TEST(partials_of_a_long_list_lie_in_order) {
  std::vector<Shape> shapes;
  for (int i = 0; i < 2 * cuda::Table<FlatEntry<3>>::kCapacity + 5; ++i) shapes.push_back({{1 + i % 2}});
  for (int i = 0; i < cuda::Table<StridedEntry<3>>::kCapacity + 2; ++i) shapes.push_back({{2, 2}, {{4, 2}}});
  TestList<double, double, double> list(shapes), want(shapes);
  std::vector<double> norms(shapes.size()), partials(cuda::neumann_partials(list.list), NAN);
  plain_neumann(want, {.alpha = 0.3, .damping = 0});
  want.for_each([&](size_t i, double& v, double&, double&) { norms[i] += v * v; });
  const int64_t before = fibre::launches;
  CHECK((cuda::neumann<double, double>(list.list, {.value = 0.3}, 0, partials.data(), nullptr)) == cudaSuccess);
  CHECK(fibre::launches - before == 3 + 2, fibre::launches - before);
  list.expect_same(want);
  CHECK(partials.size() == norms.size());
  for (size_t i = 0; i < norms.size(); ++i)
    CHECK(std::abs(partials[i] - norms[i]) <= 1e-15 * norms[i], i, partials[i], norms[i]);
}

TEST(partials_are_added_up_whatever_their_number) {
  for (int n : {0, 1, 31, 32, 1023, 1024, 1025, 5000}) {
    std::vector<double> partials(n);
    double want = 0;
    for (int i = 0; i < n; ++i) want += partials[i] = 1 + i;  // exact in any order
    for (fibre::seed = 0; fibre::seed < 2; ++fibre::seed)
      CHECK(total<double>(partials) == want, n, total<double>(partials));
  }
  fibre::seed = 0;
}

TEST(nothing_has_norm_zero) {
  TestList<float, float, float> empty(std::vector<Shape>{{{0}}});
  CHECK(cuda::neumann_partials(empty.list) == 0);
  CHECK(total<float>({}) == 0);
}

}  // namespace
