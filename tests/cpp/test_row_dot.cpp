#include "cpu/row_dot.h"

#include <cstdint>
#include <cstring>
#include <vector>

#include "check.h"
#include "row_dot_cases.h"
#include "threads.h"

namespace {

using namespace nestopt;

// Around the vectors, strips and pieces of the kernel.
template <class X, class Out>
void check_kernel() {
  for (int64_t columns : {1, 7, 15, 16, 17, 63, 64, 65, 100, 1023, 1024, 1025, 65536, 65537, 140000}) {
    std::vector<Out> first;
    for (int num_threads : {1, 3}) {
      RowDotCase<X, Out> problem(columns);
      const RowDots dots = problem.dots();
      in_threads(dots.units(), num_threads,
                 [&](int64_t begin, int64_t end) { cpu::row_dot_units<X>(dots, begin, end); });
      if (dots.partials != nullptr) {
        for (int64_t row = 0; row < dots.rows; ++row) dots.add_partials(row);
      }
      problem.expect_right();
      if (first.empty()) first = problem.out();
      CHECK(std::memcmp(first.data(), problem.out().data(), first.size() * sizeof(Out)) == 0, num_threads, "threads");
    }
  }
}

TEST(cpu_kernel_float32) { check_kernel<float, float>(); }
TEST(cpu_kernel_float32_into_float64) { check_kernel<float, double>(); }
TEST(cpu_kernel_float64) { check_kernel<double, double>(); }
TEST(cpu_kernel_bfloat16) { check_kernel<BFloat16, float>(); }
TEST(cpu_kernel_float16) { check_kernel<Float16, float>(); }

TEST(units_cover_each_column_of_each_row_once) {
  for (int64_t columns : {int64_t{1}, RowDots::kPiece, RowDots::kPiece + 1, 3 * RowDots::kPiece}) {
    RowDots dots{};
    dots.rows = 3;
    dots.columns = columns;
    std::vector<int64_t> covered(3);
    for (int64_t unit = 0; unit < dots.units(); ++unit) {
      CHECK(dots.begin_of(unit) == covered[dots.row_of(unit)], "unit", unit, "of", columns);
      CHECK(dots.size_of(unit) > 0 && dots.size_of(unit) <= RowDots::kPiece);
      covered[dots.row_of(unit)] += dots.size_of(unit);
    }
    for (int64_t sum : covered) CHECK(sum == columns, sum, columns);
  }
}

}  // namespace
