#include "cpu/hadamard_gram.h"

#include "check.h"
#include "hadamard_gram_cases.h"

namespace {

using namespace nestopt;

template <class D, class G>
void check_kernel() {
  for (const HadamardShape& shape : hadamard_shapes()) {
    HadamardGramCase<D, G> problem(shape);
    cpu::add_hadamard_tile<D, G>(problem.tile());
    problem.expect_right();
  }
}

TEST(cpu_kernel_float32) { check_kernel<float, float>(); }
TEST(cpu_kernel_float32_into_float64) { check_kernel<float, double>(); }
TEST(cpu_kernel_float64) { check_kernel<double, double>(); }

}  // namespace
