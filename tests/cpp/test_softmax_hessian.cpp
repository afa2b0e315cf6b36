#include "cpu/softmax_hessian.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"
#include "softmax_hessian_cases.h"
#include "threads.h"

namespace {

using namespace nestopt;

TEST(exp_is_right_to_a_unit_and_a_half) {
  double worst = 0;
  for (uint32_t bits = 0x80000000u; bits < bits_of(-87.0f); bits += 997) {
    const float x = float_of(bits);
    const double want = std::exp(double{x});
    int exponent;
    std::frexp(want, &exponent);
    worst = std::max(worst, std::abs(exp_nonpositive(x) - want) / std::ldexp(1.0, exponent - 24));
  }
  CHECK(worst < 1.5, worst);
}

TEST(exp_at_its_ends) {
  CHECK(exp_nonpositive(0.0f) == 1 && exp_nonpositive(-0.0f) == 1);
  for (float x : {-88.0f, -104.0f, -1e10f, -std::numeric_limits<float>::max(), -INFINITY})
    CHECK(exp_nonpositive(x) == 0, x, exp_nonpositive(x));
  CHECK(std::isnan(exp_nonpositive(NAN)) && std::isnan(exp_nonpositive(-NAN)));
}

// Two classes: w p0 p1 (u0 - u1), and the opposite.
TEST(two_classes_in_closed_form) {
  for (double gap : {0.0, 1.0, 10.0, 30.0, 60.0, -60.0}) {
    SoftmaxSums<double> sums = SoftmaxSums<double>::none();
    include(sums, gap, 3.0);
    include(sums, 0.0, 1.0);
    const SoftmaxRow<double> row = finish(sums, 5.0);
    const auto result = [&](double z, double u) { return softmax_hessian(row, exp_nonpositive(z - row.largest), u); };
    const double p1 = 1 / (1 + std::exp(gap)), p0 = 1 / (1 + std::exp(-gap));
    const double want = 5 * p0 * p1 * 2;
    CHECK(std::abs(result(gap, 3.0) - want) <= 1e-15 * want, gap, result(gap, 3.0), want);
    CHECK(std::abs(result(0.0, 1.0) + want) <= 1e-15 * want, gap, result(0.0, 1.0), want);
  }
}

TEST(sums_do_not_depend_on_where_they_are_cut) {
  const double z[] = {-INFINITY, 0.5, 2.0, 2.0, -3.0, -INFINITY}, u[] = {7, 1, 2, -3, 4, 9};
  SoftmaxSums<double> whole = SoftmaxSums<double>::none();
  for (int i = 0; i < 6; ++i) include(whole, z[i], u[i]);
  for (int cut = 0; cut <= 6; ++cut) {
    SoftmaxSums<double> parts[2] = {SoftmaxSums<double>::none(), SoftmaxSums<double>::none()};
    for (int i = 0; i < 6; ++i) include(parts[i >= cut], z[i], u[i]);
    const SoftmaxSums<double> sums = join(parts[0], parts[1]);
    CHECK(sums.largest == 2 && sums.head == 2, cut, sums.largest, sums.head);
    CHECK(std::abs(sums.others - whole.others) < 1e-15 && std::abs(sums.weighted - whole.weighted) < 1e-14, cut);
  }
}

template <class V, class A>
void check_kernel() {
  for (int64_t classes : {1, 2, 7, 15, 16, 17, 31, 100, 2047, 2048, 2049, 2064, 4097, 50257}) {
    std::vector<V> first;
    for (int num_threads : {1, 3}) {
      SoftmaxHessianCase<V, A> problem(classes);
      const SoftmaxHessianRows rows = problem.rows();
      in_threads(rows.rows, num_threads,
                 [&](int64_t begin, int64_t end) { cpu::softmax_hessian_rows<V, A>(rows, begin, end); });
      problem.expect_right();
      if (first.empty()) first = problem.u();
      CHECK(std::memcmp(first.data(), problem.u().data(), first.size() * sizeof(V)) == 0, num_threads, "threads");
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
