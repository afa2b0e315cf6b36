#include "cpu/neumann.h"

#include <cmath>
#include <vector>

#include "check.h"
#include "neumann_cases.h"
#include "test_list.h"
#include "threads.h"

namespace {

using nestopt::BFloat16;
using nestopt::Float16;
using nestopt::kChunk;
using nestopt::load;
using nestopt::math_t;
using nestopt::NeumannScalars;
using nestopt::store;

// With A a number, term j is v (1 - alpha (A + damping))^j and the sum is geometric.
TEST(formula_sums_the_geometric_series) {
  for (const auto& s : neumann_cases<double>()) {
    const long double a = 1.7L;
    const long double ratio = 1 - s.alpha * (a + s.damping);
    double v = 0.8, p = v;
    const long double start = v;
    for (int j = 1; j <= 30; ++j) {
      nestopt::neumann<double>(s, static_cast<double>(a * v), v, p);
      const long double term = start * std::pow(ratio, static_cast<long double>(j));
      const long double sum = start * (1 - std::pow(ratio, static_cast<long double>(j + 1))) / (1 - ratio);
      CHECK(std::abs(v - term) < 1e-15, "term", j, v, term);
      CHECK(std::abs(p - sum) < 1e-14, "sum", j, p, sum);
    }
  }
}

TEST(the_sum_and_the_norm_see_v_as_it_is_stored) {
  BFloat16 v = store<BFloat16>(1.0f), p = store<BFloat16>(0.0f);
  const float now = nestopt::neumann<BFloat16>({.alpha = 1.0f, .damping = 0.0f}, 0.001f, v, p);
  CHECK(load(v) == 1.0f && load(p) == 1.0f && now == 1.0f, load(v), load(p), now);
}

TEST(no_damping_leaves_an_infinite_v_out_of_the_product) {
  float v = INFINITY, p = 0;
  nestopt::neumann<float>({.alpha = 0.0f, .damping = 0.0f}, 1.0f, v, p);
  CHECK(std::isinf(v), v);
}

double sum(const std::vector<double>& x) {
  double total = 0;
  for (double value : x) total += value;
  return total;
}

// The kernel in several threads beside a plain loop: all bytes and all partial norms are the same.
template <class V, class A>
void check_kernel() {
  for (const auto& scalars : neumann_cases<math_t<V>>()) {
    TestList<V, V, A> want(all_shapes(kChunk, 2));
    const double want_norm = plain_neumann(want, scalars);
    std::vector<double> first_norms;
    for (int num_threads : {1, 3, 16}) {
      TestList<V, V, A> got(all_shapes(kChunk, 2));
      std::vector<double> norms(got.list.chunks() + 1, NAN);
      in_threads(got.list.chunks(), num_threads, [&](int64_t first, int64_t last) {
        nestopt::cpu::neumann_chunks<V, A>(got.list, first, last, scalars, norms.data());
      });
      got.expect_same(want, "in", num_threads, "threads");
      CHECK(std::isnan(norms.back()), "written behind the end");
      norms.pop_back();
      CHECK(std::abs(sum(norms) - want_norm) <= 1e-12 * want_norm, sum(norms), want_norm);
      if (num_threads == 1) first_norms = norms;
      CHECK(norms == first_norms, "in", num_threads, "threads");
    }
    TestList<V, V, A> got(all_shapes(kChunk, 2));
    nestopt::cpu::neumann_chunks<V, A>(got.list, 0, got.list.chunks(), scalars, nullptr);
    got.expect_same(want, "without a norm");
  }
}

TEST(cpu_kernel_float32) { check_kernel<float, float>(); }
TEST(cpu_kernel_float32_with_bfloat16) { check_kernel<float, BFloat16>(); }
TEST(cpu_kernel_float32_with_float16) { check_kernel<float, Float16>(); }
TEST(cpu_kernel_float64) { check_kernel<double, double>(); }
TEST(cpu_kernel_bfloat16) { check_kernel<BFloat16, BFloat16>(); }
TEST(cpu_kernel_float16) { check_kernel<Float16, Float16>(); }

template <class V>
void check_sum_kernel() {
  TestList<V, V> want(all_shapes(kChunk, 0));
  const double want_norm = plain_neumann_sum(want);
  std::vector<double> first_norms;
  for (int num_threads : {1, 3, 16}) {
    TestList<V, V> got(all_shapes(kChunk, 0));
    std::vector<double> norms(got.list.chunks() + 1, NAN);
    in_threads(got.list.chunks(), num_threads, [&](int64_t first, int64_t last) {
      nestopt::cpu::neumann_sum_chunks<V>(got.list, first, last, norms.data());
    });
    got.expect_same(want, "in", num_threads, "threads");
    CHECK(std::isnan(norms.back()), "written behind the end");
    norms.pop_back();
    CHECK(std::abs(sum(norms) - want_norm) <= 1e-12 * want_norm, sum(norms), want_norm);
    if (num_threads == 1) first_norms = norms;
    CHECK(norms == first_norms, "in", num_threads, "threads");
  }
  TestList<V, V> got(all_shapes(kChunk, 0));
  nestopt::cpu::neumann_sum_chunks<V>(got.list, 0, got.list.chunks(), nullptr);
  got.expect_same(want, "without a norm");
}

TEST(cpu_sum_kernel_float32) { check_sum_kernel<float>(); }
TEST(cpu_sum_kernel_float64) { check_sum_kernel<double>(); }
TEST(cpu_sum_kernel_bfloat16) { check_sum_kernel<BFloat16>(); }
TEST(cpu_sum_kernel_float16) { check_sum_kernel<Float16>(); }

}  // namespace
