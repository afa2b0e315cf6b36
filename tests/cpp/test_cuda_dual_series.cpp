#include "cuda/dual_series.h"

#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "cuda/dual_series.cuh"
#include "dual_series_cases.h"

namespace {

using namespace nestopt;

// Runs a kernel through launch(series, alpha, damping, scratch), with all of the scratch poisoned, and one element more
// that is not to be touched.
template <class G, class V, class Launch>
void run(DualSeriesCase<G, V>& problem, uint32_t blocks, Launch launch) {
  const DualSeries series = problem.series();
  const double alpha = problem.alpha();
  std::vector<double> scratch(cuda::series_scratch(series.rows, series.terms, blocks) + 1, NAN);
  const int64_t before = fibre::launches;
  const cuda::Scalar number = fibre::seed % 2 ? cuda::Scalar{&alpha, true} : cuda::Scalar{.value = alpha};
  CHECK(launch(series, number, problem.damping(), scratch.data()) == cudaSuccess);
  CHECK(fibre::launches - before == 1, "one launch for all terms");
  CHECK(std::isnan(scratch.back()), "written behind the end");
}

// In blocks of few threads, so that few rows are many for them. One block has a kernel of its own.
template <class G, class V>
void run_small(DualSeriesCase<G, V>& problem, uint32_t blocks) {
  constexpr uint32_t kThreads = 96;
  constexpr int64_t kStaged = 40;
  run(problem, blocks, [=](const DualSeries& series, cuda::Scalar alpha, double damping, double* scratch) {
    const cuda::SeriesArguments arguments{series, alpha, damping, scratch};
    if (blocks > 1) {
      return cuda::launch_together(cuda::dual_series_kernel<G, V, true, kThreads, kStaged>, blocks, kThreads, nullptr,
                                   arguments);
    }
    return cuda::launch(cuda::dual_series_kernel<G, V, false, kThreads, kStaged>, 1, kThreads, nullptr, arguments);
  });
}

// Fewer rows than warps, about as many, and more, so that a warp has several groups of them; more than are staged.
template <class G, class V>
void check_kernel(uint32_t blocks) {
  for (int64_t rows : {1, 2, 3, 6, 7, 13, 33, 40, 41, 70}) {
    const int64_t terms = 1 + rows % 5;
    DualSeriesCase<G, V> first(rows, terms, 0.5);
    run_small(first, blocks);
    first.expect_right();
    for (fibre::seed = 1; fibre::seed < 4; ++fibre::seed) {
      DualSeriesCase<G, V> again(rows, terms, 0.5);
      run_small(again, blocks);
      CHECK(again.same(first), "rows", rows, "seed", fibre::seed);
    }
    fibre::seed = 0;
  }
}

TEST(one_block_float32) { check_kernel<float, float>(1); }
TEST(one_block_float32_with_float64) { check_kernel<float, double>(1); }
TEST(one_block_float64_with_float32) { check_kernel<double, float>(1); }
TEST(one_block_float64) { check_kernel<double, double>(1); }
TEST(a_grid_float32) { check_kernel<float, float>(3); }
TEST(a_grid_float32_with_float64) { check_kernel<float, double>(2); }
TEST(a_grid_float64_with_float32) { check_kernel<double, float>(2); }
TEST(a_grid_float64) { check_kernel<double, double>(5); }

// With the blocks of a device.
template <class G, class V>
void check_launch(uint32_t blocks) {
  DualSeriesCase<G, V> problem(70, 2, 0.1);
  run(problem, blocks, [=](const DualSeries& series, cuda::Scalar alpha, double damping, double* scratch) {
    return cuda::dual_series<G, V>(series, alpha, damping, {blocks, 0}, scratch, nullptr);
  });
  problem.expect_right();
}

TEST(whole_blocks) {
  check_launch<float, float>(1);
  check_launch<float, double>(2);
  check_launch<double, float>(1);
  check_launch<double, double>(2);
}

TEST(no_rows_and_no_terms) {
  for (uint32_t blocks : {1u, 2u}) {
    DualSeriesCase<float, double> no_rows(0, 4, 0.5), no_terms(7, 0);
    run_small(no_rows, blocks);
    no_rows.expect_right();
    run_small(no_terms, blocks);
    no_terms.expect_right();
  }
  const int64_t before = fibre::launches;
  DualSeriesCase<float, double> nothing(0, 0);
  CHECK((cuda::dual_series<float, double>(nothing.series(), {}, 0, {1, 0}, nullptr, nullptr)) == cudaSuccess);
  CHECK(fibre::launches == before);
}

TEST(more_terms_than_are_added_up_at_once) {
  DualSeriesCase<double, double> problem(2, cuda::kTermTile + 3, 0.01);
  run_small(problem, 1);
  problem.expect_right();
}

TEST(a_nan_shows) {
  for (uint32_t blocks : {1u, 2u}) {
    DualSeriesCase<float, double> problem(19, 3, 0, 0);
    problem.gram()[19 * 19 - 1] = NAN;
    run_small(problem, blocks);
    for (int64_t j = 1; j <= 3; ++j) CHECK(std::isnan(problem.sq_norm(j)), j);
    CHECK(std::isnan(problem.coefficient(18)));
  }
}

TEST(plans) {
  DualSeries series{};
  series.terms = 20;
  const auto blocks = [&](int64_t rows, uint32_t max_blocks) {
    series.rows = rows;
    const cuda::DualSeriesPlan plan = cuda::plan_dual_series(series, max_blocks);
    CHECK(plan.scratch == 5 * rows + 40 * int64_t{plan.blocks}, rows);
    return plan.blocks;
  };
  CHECK(blocks(0, 132) == 1 && blocks(1, 132) == 1 && blocks(256, 132) == 1);
  CHECK(blocks(257, 132) == 9 && blocks(4224, 132) == 132 && blocks(100000, 132) == 132);
  CHECK(blocks(5000, 1) == 1);
}

}  // namespace
