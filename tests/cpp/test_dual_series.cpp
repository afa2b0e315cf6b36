#include "cpu/dual_series.h"

#include <cmath>
#include <cstdint>

#include "check.h"
#include "dual_series_cases.h"
#include "threads.h"

namespace {

using namespace nestopt;

// One row: term j is v (1 - alpha (w g + damping))^j along the row.
TEST(one_row_in_closed_form) {
  const double g = 4, w = 0.5, alpha = 0.2, damping = 0.3, v = 3;
  const DualSeriesScalars s = dual_series_scalars(alpha, damping);
  double d = g * v, c = 0, total = 0, sq_norm = g * v * v;  // of v times the row
  for (int j = 1; j <= 30; ++j) {
    const double e = w * d, f = g * e;
    sq_norm = next_sq_norm(s, sq_norm, d * e, e * f);
    advance_row(s, e, f, d, c, total);
    const double term = v * std::pow(1 - alpha * (w * g + damping), j);
    CHECK(std::abs(d - g * term) < 1e-14, j, d, g * term);
    CHECK(std::abs(std::pow(s.q, j) * v + c - term) < 1e-14, j);
    CHECK(std::abs(sq_norm - g * term * term) < 1e-13, j, sq_norm, g * term * term);
  }
}

TEST(a_squared_norm_is_not_negative_and_a_nan_stays) {
  const DualSeriesScalars s = dual_series_scalars(1, 0);
  CHECK(next_sq_norm(s, 1, 0.75, 0) == 0);
  CHECK(next_sq_norm(s, 1, 0.25, 0.125) == 0.625);
  for (int place = 0; place < 3; ++place)
    CHECK(std::isnan(next_sq_norm(s, place == 0 ? NAN : -1, place == 1 ? NAN : 1, place == 2 ? NAN : 0)), place);
}

template <class G, class V>
void run(DualSeriesCase<G, V>& problem, int num_threads) {
  cpu::DualSeriesTerms<G, V> terms(problem.series(), dual_series_scalars(problem.alpha(), problem.damping()));
  for (int64_t j = 0; j < problem.series().terms; ++j) {
    in_threads(terms.blocks(), num_threads, [&](int64_t first, int64_t last) { terms.multiply(first, last); });
    terms.advance();
  }
  terms.finish();
}

template <class G, class V>
void check_kernel() {
  for (int64_t rows : {0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100}) {
    for (int64_t num_terms : {0, 1, 6}) {
      for (double damping : {0.0, 0.5}) {
        DualSeriesCase<G, V> first(rows, num_terms, damping);
        run(first, 1);
        first.expect_right();
        for (int num_threads : {3, 16}) {
          DualSeriesCase<G, V> again(rows, num_terms, damping);
          run(again, num_threads);
          CHECK(again.same(first), "rows", rows, "threads", num_threads);
        }
        DualSeriesCase<G, V> dense(rows, num_terms, damping, 0);
        run(dense, 1);
        dense.expect_right();
      }
    }
  }
}

TEST(cpu_kernel_float32) { check_kernel<float, float>(); }
TEST(cpu_kernel_float32_with_float64) { check_kernel<float, double>(); }
TEST(cpu_kernel_float64_with_float32) { check_kernel<double, float>(); }
TEST(cpu_kernel_float64) { check_kernel<double, double>(); }

TEST(cpu_kernel_shows_a_nan) {
  for (int64_t rows : {1, 4, 19}) {
    DualSeriesCase<float, double> problem(rows, 3, 0, 0);
    problem.gram()[0] = NAN;
    run(problem, 1);
    for (int64_t j = 1; j <= 3; ++j) CHECK(std::isnan(problem.sq_norm(j)), rows, j);
    CHECK(std::isnan(problem.coefficient(0)), rows);
  }
}

}  // namespace
